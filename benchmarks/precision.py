"""Compares results in half precision: the metrics of a trained model in float32 and as ``for_inference`` makes it.

``python benchmarks/precision.py MODEL SOURCE [--class C]`` prints a row a dtype, and the shift in points (hundredths).
"""

import argparse
from pathlib import Path

import torch

from fastmsflow import MSFlow
from fastmsflow.data import open_image_set
from fastmsflow.training import evaluate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("source")
    parser.add_argument("--class", dest="category")
    options = parser.parse_args()
    images = open_image_set(options.source, options.category)
    model = MSFlow.load(options.model).to("cuda" if torch.cuda.is_available() else "cpu")
    exact = _metrics(model, images)
    print("| " + " | ".join(["", *exact]) + " |\n" + "|---" * (len(exact) + 1) + "|")
    print("| as trained | " + " | ".join(f"{value:.4f}" for value in exact.values()) + " |")
    for dtype in DTYPES:
        found = _metrics(model.for_inference(dtype), images)
        cells = (f"{found[key]:.4f} ({100 * (found[key] - exact[key]):+.3f})" for key in exact)
        print(f"| for_inference({str(dtype)[6:]}) | " + " | ".join(cells) + " |", flush=True)


def _metrics(model: MSFlow, images) -> dict[str, float]:
    evaluation, _ = evaluate(model, images, dtype=None)
    return {key: value for key, value in evaluation.as_dict().items() if value is not None}


if __name__ == "__main__":
    main()
