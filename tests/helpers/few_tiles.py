"""A sample set cut short, for what trains on it in a test."""

import shutil
from pathlib import Path

from fastmsflow.data import textures


def few_tiles(root: Path) -> Path:
    """``brick`` in ``root``: 24 tiles to train on, 6 good ones, 3 with holes and 3 with stains to test on."""
    textures("brick", root)
    for kind in ("patch", "scratch", "smear"):
        shutil.rmtree(root / "brick/test" / kind)
        shutil.rmtree(root / "brick/ground_truth" / kind)
    counts = {"train/good": 24, "test/good": 6, "test/hole": 3, "test/stain": 3}
    for folder, count in {**counts, "ground_truth/hole": 3, "ground_truth/stain": 3}.items():
        files = sorted((root / "brick" / folder).iterdir())
        # Training tiles overlap: they are taken from all over the photograph.
        chosen = files[:: len(files) // count][:count] if folder == "train/good" else files[:count]
        for file in set(files) - set(chosen):
            file.unlink()
    return root
