"""Compares results in half precision: the metrics of a trained model in float32 and as ``for_inference`` makes it.

``python benchmarks/precision.py MODEL SOURCE [--class C]`` prints a row a variant, and the shift in points
(hundredths). On a CPU ``for_inference`` leaves the extractor in float32, and on a GPU it takes float16 for it: both are
among the variants, and so is the extractor in bfloat16, which ``for_inference`` never makes.
"""

import argparse
import warnings
from pathlib import Path

import torch

from fastmsflow import MSFlow
from fastmsflow.data import open_image_set
from fastmsflow.errors import InputWarning
from fastmsflow.training import evaluate

# The flow's dtype and the extractor's.
VARIANTS = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float16),
    (torch.float16, torch.float16),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("source")
    parser.add_argument("--class", dest="category")
    options = parser.parse_args()
    # A CPU may be slow in some of these.
    warnings.simplefilter("ignore", InputWarning)
    images = open_image_set(options.source, options.category)
    model = MSFlow.load(options.model).to("cuda" if torch.cuda.is_available() else "cpu")
    exact = _metrics(model, images)
    print("| " + " | ".join(["flow", "extractor", *exact]) + " |\n" + "|---" * (len(exact) + 2) + "|")
    print("| as trained | | " + " | ".join(f"{value:.4f}" for value in exact.values()) + " |", flush=True)
    for flow, extractor in VARIANTS:
        fast = model.for_inference(flow)
        fast.extractor.to(extractor)
        found = _metrics(fast, images)
        cells = (f"{found[key]:.4f} ({100 * (found[key] - exact[key]):+.3f})" for key in exact)
        print(f"| {str(flow)[6:]} | {str(extractor)[6:]} | " + " | ".join(cells) + " |", flush=True)


def _metrics(model: MSFlow, images) -> dict[str, float]:
    evaluation, _ = evaluate(model, images, dtype=None)
    return {key: value for key, value in evaluation.as_dict().items() if value is not None}


if __name__ == "__main__":
    main()
