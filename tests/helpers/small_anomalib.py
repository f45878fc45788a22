"""Msflow in anomalib on a few images, without downloads."""

from pathlib import Path
from typing import Any

from anomalib.data import Folder

from tests.helpers.noise_images import noise_set

SIDE = 64
UNTRAINED = {"extractor": "test_resnet.r160_in1k", "pretrained": False, "image_size": (SIDE, SIDE)}
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
PARTS = {"normal_dir": "train", "normal_test_dir": "test/good", "abnormal_dir": "test/bad"}


def noise_data(root: Path, train: int = 5, **options: Any) -> Folder:
    """A data module of ``noise_set``, which is made if it is not there."""
    if not root.exists():
        noise_set(root, train)
    defaults = {"num_workers": 0, "train_batch_size": 2, "eval_batch_size": 3, "val_split_mode": "same_as_test"}
    return Folder(name="noise", root=root, **PARTS, **{**defaults, **options})
