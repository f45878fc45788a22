"""Measures what the filter that resizes images does to the scores: Lanczos, as fastmsflow reads images, against the
antialiased bicubic of tensors, which decoding on a GPU would bring.

``python benchmarks/resize_filter.py MODEL SOURCE [--class C] [--images N]`` prints the scores' differences, the AUROC.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import interpolate

from fastmsflow import MSFlow
from fastmsflow.data import load_image, open_image_set, read_image
from fastmsflow.metrics import auroc


def bicubic(path: Path, image_size: tuple[int, int]) -> Tensor:
    """(3, H, W) float32 in [0, 1], rounded to 8 bits as Lanczos' are."""
    pixels = rearrange(torch.from_numpy(np.array(read_image(path))), "h w c -> 1 c h w").float()
    resized = interpolate(pixels, image_size, mode="bicubic", antialias=True, align_corners=False)
    return resized[0].round().clamp(0, 255) / 255


def absolute_scores(model: MSFlow, images: list[Tensor]) -> Tensor:
    """(N,) nats."""
    return torch.cat([model.predict(torch.stack(images[i : i + 8])).absolute_score for i in range(0, len(images), 8)])


def spearman(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("source")
    parser.add_argument("--class", dest="category")
    parser.add_argument("--images", type=int, default=200, help="evenly taken from the test set")
    options = parser.parse_args()
    model = MSFlow.load(options.model)
    test = open_image_set(options.source, options.category).test
    test = test[:: max(1, len(test) // options.images)]
    labels = np.array([sample.label for sample in test])
    found = {
        name: absolute_scores(model, [read(sample.image, model.image_size) for sample in test])
        for name, read in (("Lanczos", load_image), ("bicubic", bicubic))
    }
    for name, scores in found.items():
        print(f"{name}: {len(test)} images, AUROC {auroc(labels, scores.numpy()):.4f}, spread {scores.std():.3f} nats")
    difference = (found["bicubic"] - found["Lanczos"]).abs()
    print(f"difference: at most {difference.max():.3f} nats, mean {difference.mean():.3f}")
    print(f"rank correlation: {spearman(*found.values()):.5f}")


if __name__ == "__main__":
    main()
