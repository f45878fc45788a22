"""Compares OpenVINO in each precision with the model: scores, labels, AUROC, and processor time of one thread.

``python -m benchmarks.openvino_precisions MODEL SOURCE [--class C] [--good N]`` prints a Markdown table. All take
turns, batch by batch, on a set's test images; times are medians. ``model.xml`` in INT8 is made from N training images.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from benchmarks.suite_settings import environment
from fastmsflow import MSFlow
from fastmsflow.data import load_image, open_image_set
from fastmsflow.inference.openvino_engine import OpenVinoModel
from fastmsflow.inference.openvino_graph import compiled
from fastmsflow.integrations.export import export_openvino
from fastmsflow.metrics import auroc

BATCH = 8
AbsoluteScores = Callable[[Tensor], np.ndarray]


def contestants(model: MSFlow, good: list[Path], folder: Path) -> dict[str, AbsoluteScores]:
    """The model and OpenVINO in each precision, by name; exports go into ``folder``."""
    plain = export_openvino(model, folder / "plain.xml").path
    int8 = export_openvino(model, folder / "int8.xml", good)
    print(f"{int8.int8}.\n")
    engines = [model.for_inference(), OpenVinoModel(model), OpenVinoModel(model, "bfloat16")]
    names = ["`model.for_inference()`", "`--engine openvino`", "`--engine openvino --dtype bfloat16`"]
    found: dict[str, AbsoluteScores] = {
        name: lambda x, engine=engine: engine.scores(x).absolute_score.numpy()
        for name, engine in zip(names, engines, strict=True)
    }
    for name, path, precision in (
        ("`model.xml`, INT8", int8.path, "f32"),
        ("`model.xml`, all in bfloat16, OpenVINO's own choice", plain, "bf16"),
    ):
        graph = compiled(path, precision)
        found[name] = lambda x, graph=graph: graph(x.numpy())["absolute_score"]
    return found


@torch.no_grad()
def table(found: dict[str, AbsoluteScores], images: Tensor, labels: np.ndarray, threshold: float) -> str:
    """A Markdown table with a row for each of ``found``; the first is what the others are compared with."""
    scores: dict[str, list[np.ndarray]] = {name: [] for name in found}
    times: dict[str, list[float]] = {name: [] for name in found}
    for batch in images.split(BATCH):
        for name, score in found.items():
            start = time.process_time()
            scores[name].append(score(batch))
            times[name].append(1e3 * (time.process_time() - start) / len(batch))
    lines = ["| | absolute scores off by | labels changed | AUROC | ms an image |", "|---" * 5 + "|"]
    expected = np.concatenate(next(iter(scores.values())))
    for name, parts in scores.items():
        given = np.concatenate(parts)
        off = (np.abs(given - expected) / np.maximum(1, np.abs(expected))).max()
        changed = ((given > threshold) != (expected > threshold)).sum()
        lines.append(f"| {name} | {off:.0e} | {changed} | {auroc(labels, given):.4f} | {median(times[name]):.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a calibrated model")
    parser.add_argument("source")
    parser.add_argument("--class", dest="category")
    parser.add_argument("--good", type=int, default=95, help="training images for INT8, evenly taken")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, images = MSFlow.load(options.model).eval(), open_image_set(options.source, options.category)
    if model.calibration is None:
        parser.error(f"{options.model}: has no threshold; calibrate it with `fastmsflow calibrate`")
    good = [Path(sample.image) for sample in images.train]
    good = good[:: max(1, len(good) // options.good)][: options.good]
    pixels = torch.stack([load_image(sample.image, model.image_size) for sample in images.test])
    labels = np.array([sample.label for sample in images.test])
    with tempfile.TemporaryDirectory() as folder:
        found = contestants(model, good, Path(folder))
        print(table(found, pixels, labels, model.calibration.threshold().value))
    machine = environment()
    print(f"\n{len(pixels)} images; {', '.join((machine['device'], *machine['units']))}; torch {machine['torch']}")


if __name__ == "__main__":
    main()
