"""Records runs of fastmsflow as of commit cee3306, before names and files moved: run with that commit on PYTHONPATH.

``python record.py`` writes ``runs.tar.xz`` beside this file: images, a finished run (the
metrics of ``evaluate`` included) and the same run interrupted after its first round. Nothing of later versions is used.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
from fastmsflow.training.module import MSFlowModule
from PIL import Image

from fastmsflow import MSFlow
from fastmsflow.__main__ import main

EXTRACTOR = "test_efficientnet.r160_in1k"
OPTIONS = (
    "--extractor", EXTRACTOR, "--image-size", "32", "--standardise",
    "--meta-epochs", "3", "--sub-epochs", "2", "--batch-size", "2", "--lr", "0.001", "--warm-up", "2",
    "--hold-out", "0.25", "--false-alarms", "0.3", "--freeze", "fusion", "--lr-of", "level2=0.0005",
    "--accumulate", "2", "--memory", "recompute", "--ema", "0.9",
)  # fmt: skip
MADE, STEP = MSFlow.__init__, MSFlowModule.training_step


def small(self, *arguments, **options) -> None:
    """Makes a new model small and without a download; one that is read from a checkpoint is described by it."""
    if not arguments:
        options = {"blocks": (1, 1, 1), "condition_channels": (4, 4, 4)} | options | {"pretrained": False}
    MADE(self, *arguments, **options)


def interrupted_step(self, batch, batch_index: int):
    if self.current_epoch == 3:
        raise KeyboardInterrupt
    return STEP(self, batch, batch_index)


def write_images(root: Path) -> None:
    noise = np.random.default_rng(5)
    for kind, count in (("train", 12), ("test/good", 3), ("test/spot", 3)):
        (root / kind).mkdir(parents=True)
        for i in range(count):
            pixels = noise.integers(0, 100, (32, 32, 3), dtype=np.uint8)
            if kind == "test/spot":
                pixels[6:14, 6:14] += 120
                mask = np.zeros((32, 32), np.uint8)
                mask[6:14, 6:14] = 255
                (root / "ground_truth/spot").mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(root / f"ground_truth/spot/{i}.png")
            Image.fromarray(pixels).save(root / kind / f"{i}.png")


def run(*arguments: str) -> None:
    sys.argv = ["fastmsflow", *arguments]
    try:
        main()
    except SystemExit as end:
        print(arguments[0], "ended with", end.code)


def record(target: Path) -> None:
    write_images(Path("images"))
    with patch.object(MSFlow, "__init__", small):
        run("train", "images", "--out", "finished", *OPTIONS)
        run("evaluate", "finished", "images")
        with patch.object(MSFlowModule, "training_step", interrupted_step):
            run("train", "images", "--out", "interrupted", *OPTIONS)
    for shown in (*Path().rglob("*.html"), *Path("finished").rglob("*.png"), *Path().rglob(".*")):
        shutil.rmtree(shown) if shown.is_dir() else shown.unlink()
    with tarfile.open(target, "w:xz", preset=9) as archive:
        for path in sorted(Path().iterdir()):
            archive.add(path)


if __name__ == "__main__":
    target = Path(__file__).resolve().with_name("runs.tar.xz")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        record(target)
        subprocess.run(["find", ".", "-type", "f", "-size", "+0", "-printf", "%p %s\n"], check=True)
