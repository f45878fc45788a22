"""Shares a set between the tests of writing shards and of reading them; the set itself is ``jpeg_shards``."""

import json
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from fastmsflow import InputError
from fastmsflow.data import ShardedImages

SIZE = (32, 32)
ORDER = [22, 21, 33, 34, 4, 6, 32, 5]
IMAGES, PER_SHARD, SHARDS = 46, 4, 12


@contextmanager
def refused_in_a_worker(message: str) -> Iterator[None]:
    with pytest.raises(InputError, match=message) as caught:
        yield
    # torch's error and its loader hold each other; left to the garbage collector, the workers are waited for in vain.
    traceback.clear_frames(caught.tb)


def numbers(images: ShardedImages, workers: int = 0, batch_size: int = 2) -> list[int]:
    return [int(i) for batch in DataLoader(images, batch_size, num_workers=workers) for i in batch["index"]]


def rewritten(folder: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
