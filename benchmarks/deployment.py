"""Measures each exported graph of a model: the file's size, how far its scores are from the model's, its speed.

``python -m benchmarks.deployment MODEL SOURCE [--class C] [--images N] [--rounds N]`` prints a Markdown table. Scores
are of a set's test images; the AUROC is of their absolute scores. All contestants take turns in one process, on the
same images and threads; times are medians of the rounds. OpenVINO reads the ONNX file. A runtime that is not installed
is named as not measured.
"""

import argparse
import tempfile
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.interleaved import turns
from benchmarks.runtimes import ONNX_PACKAGES, Graph, OpenVINO, not_installed, onnx_runtime
from benchmarks.suite_settings import environment
from fastmsflow import MSFlow, Prediction
from fastmsflow.data import load_image, open_image_set
from fastmsflow.integrations.export import export_onnx, export_package, export_program
from fastmsflow.metrics import auroc

BATCHES = (1, 8)
SCORES = ("score", "log_score", "absolute_score")
RUNTIMES = ("ONNX Runtime", "OpenVINO", "TensorRT")


class Contestant(NamedTuple):
    """A way to predict, and the file that it reads."""

    name: str
    predict: Graph
    file: Path | None = None


def contestants(model: MSFlow, folder: Path) -> list[Contestant]:
    """Everything that can be measured here; exports go into ``folder``."""
    ready = model.for_inference()
    found = [Contestant("`model.predict`", model.predict), Contestant("`model.for_inference().predict`", ready.predict)]
    program = export_program(model, folder / "program.pt2").path
    found.append(Contestant("torch.export program", torch.export.load(program).module(), program))
    package = export_package(model, folder / "package.pt2").path
    found.append(Contestant("AOTInductor package", torch._inductor.aoti_load_package(str(package)), package))
    if not_installed(*ONNX_PACKAGES):
        return found
    onnx = export_onnx(model, folder / "model.onnx").path
    found.append(Contestant("ONNX Runtime", onnx_runtime(onnx), onnx))
    if not_installed("openvino") is None:
        pinned, own = OpenVINO(onnx, "f32"), OpenVINO(onnx)
        found.append(Contestant(f"OpenVINO, {pinned.precision}", pinned, onnx))
        found.append(Contestant(f"OpenVINO, {own.precision}, its own choice", own, onnx))
    return found


def predicted(graph: Graph, images: Tensor) -> Prediction:
    """Scores all images, in the larger of ``BATCHES``."""
    parts = [graph(part) for part in images.split(BATCHES[-1])]
    return Prediction(*(torch.cat(outputs) for outputs in zip(*parts, strict=True)))


def difference(given: Prediction, expected: Prediction) -> float:
    """The largest of ``SCORES``, relative to the larger of 1 and the score, as ``fastmsflow export`` tells it."""
    largest = 0.0
    for name in SCORES:
        ours = getattr(expected, name)
        largest = max(largest, ((getattr(given, name) - ours).abs() / ours.abs().clamp_min(1)).max().item())
    return largest


def milliseconds(graphs: Sequence[Graph], images: Tensor, rounds: int) -> list[float]:
    """Each graph's median time of an image, where all take turns in every round."""
    times = list(islice(turns([partial(graph, images) for graph in graphs]), rounds + 1))
    # The first round warms up.
    return [1e3 * median(taken) / len(images) for taken in zip(*times[1:], strict=True)]


def table(model: MSFlow, images: Tensor, labels: Sequence[int], rounds: int) -> str:
    """A Markdown table with a row for each contestant. ``labels``: 1 where an image is defective."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        found = contestants(model, Path(folder))
        graphs = [contestant.predict for contestant in found]
        speed = [milliseconds(graphs, images[:batch], rounds) for batch in BATCHES]
        titles = ["", "file", "scores off by", "AUROC", *(f"ms an image, batch of {batch}" for batch in BATCHES)]
        rows = [titles, ["---"] * len(titles)]
        expected = predicted(model.predict, images)
        for contestant, *times in zip(found, *speed, strict=True):
            given = predicted(contestant.predict, images)
            size = f"{contestant.file.stat().st_size / 2**20:.0f} MiB" if contestant.file else "-"
            area = auroc(np.asarray(labels), given.absolute_score.numpy())
            cells = [contestant.name, size, f"{difference(given, expected):.0e}", f"{area:.4f}"]
            rows.append([*cells, *(f"{value:.1f}" for value in times)])
    measured = {contestant.name.partition(",")[0] for contestant in found}
    rows += [[name, *["not measured"] * (len(titles) - 1)] for name in RUNTIMES if name not in measured]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("source")
    parser.add_argument("--class", dest="category")
    parser.add_argument("--images", type=int, default=64, help="evenly taken from the test set")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    model = MSFlow.load(options.model).eval()
    test = open_image_set(options.source, options.category).test
    test = test[:: max(1, len(test) // options.images)][: options.images]
    images = torch.stack([load_image(sample.image, model.image_size) for sample in test])
    labels = [sample.label for sample in test]
    print(table(model, images, labels, options.rounds))
    machine = environment()
    # Units for bfloat16, which some runtimes use unasked, are among them.
    chip = ", ".join((machine["device"], *machine["units"]))
    print(
        f"\n{model.extractor.name} at {'x'.join(map(str, model.image_size))}, {len(images)} images, {options.rounds}"
        f" rounds; {chip}, {machine['threads']} threads, torch {machine['torch']}"
    )


if __name__ == "__main__":
    main()
