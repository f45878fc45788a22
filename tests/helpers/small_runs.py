"""Runs of seconds on classes a and b of ``two_classes``."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fastmsflow import InputError, MSFlow

SMALL = ("--extractor", "test_resnet.r160_in1k", "--image-size", 64, "--standardise", "--lr", 1e-3, "--batch-size", 8)


@contextmanager
def small_flows(**more: object) -> Iterator[None]:
    """Makes flows of one block a level unless another number is given, which train in a third of the time. ``more``:
    what every model is given besides."""
    made = MSFlow.__init__

    def init(self, *positional, **options) -> None:
        names = ("extractor", "pretrained", "image_size", "pool")
        given = dict(zip(names, positional, strict=False)) | options
        made(self, **{"blocks": (1, 1, 1), **given, **more})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MSFlow, "__init__", init)
        yield


@contextmanager
def untrained() -> Iterator[None]:
    """Makes extractors that are not pretrained, and small flows."""
    with small_flows(pretrained=False):
        yield


def run(*args: object) -> None:
    """Outside of a test's own ``command``."""
    from fastmsflow.cli import app

    app([*map(str, args)], standalone_mode=False)


def train_args(tiles: Path, out: Path, *more: object) -> tuple[object, ...]:
    return ("train", tiles, "--class", "a", "--out", out, *SMALL, "--meta-epochs", 3, "--sub-epochs", 1, *more)


def interrupted(tiles: Path, out: Path, command, monkeypatch) -> None:
    """A run that ends after its state was kept once."""
    from fastmsflow.training.checkpointing import ResumeCheckpoint

    def keep_and_fail(self, trainer, module):
        trainer.save_checkpoint(self._path)
        raise InputError("pulled the plug")

    with monkeypatch.context() as patch:
        patch.setattr(ResumeCheckpoint, "on_train_epoch_end", keep_and_fail)
        code, text = command(*train_args(tiles, out))
    assert code == 1
    assert "pulled the plug" in text
