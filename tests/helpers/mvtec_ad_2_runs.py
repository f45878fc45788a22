"""Runs for a tree of MVTec AD 2 whose models have learned nothing, with thresholds from its validation images."""

from collections.abc import Sequence
from pathlib import Path

from fastmsflow import MSFlow
from fastmsflow.data import list_images
from fastmsflow.evaluation.calibrate_model import calibrate_on_files
from fastmsflow.tiling import Tiling
from tests.helpers.tiny_model import tiny_model


def write_runs(runs: Path, root: Path, objects: Sequence[str], tiling: Tiling | None = None) -> Path:
    """Writes a checkpoint for each of ``objects`` of the tree ``root`` below ``runs``, which it returns."""
    for name in objects:
        write_run(runs / name, root / name, tiny(tiling))
    return runs


def tiny(tiling: Tiling | None = None) -> MSFlow:
    side = 32 if tiling is None else tiling.tile
    model = tiny_model(image_size=(side, side)).eval()
    model.tiling = tiling
    return model


def write_run(run: Path, folder: Path, model: MSFlow) -> Path:
    """Calibrates ``model`` on the object's validation images, and writes it; returns the checkpoint."""
    run.mkdir(parents=True, exist_ok=True)
    model.calibration = calibrate_on_files(model, list_images(folder / "validation/good"), false_alarms=0.4)
    checkpoint = run / "best.safetensors"
    model.save(checkpoint, images=folder.name)
    return checkpoint
