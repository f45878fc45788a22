"""Processes that read images: the same ones for whatever is read, in its order, and others where one was lost."""

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmsflow import InputError
from fastmsflow.data import ImageFileDataset
from fastmsflow.data.reader_pool import ReaderPool
from fastmsflow.errors import in_one_line


def here(number: int) -> dict[str, int]:
    """An item: who reads it."""
    return {"number": number, "process": os.getpid()}


def killed() -> dict[str, int]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def batches(*sizes: int) -> Iterator[list]:
    """Makes batches of items numbered from 0."""
    numbers = iter(range(sum(sizes)))
    return ([partial(here, next(numbers)) for _ in range(size)] for size in sizes)


def processes(read: Iterator[dict]) -> set[int]:
    return {process for batch in read for process in batch["process"].tolist()}


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_come_as_they_were_asked_for(workers: int) -> None:
    with ReaderPool(workers) as readers:
        for sizes in ((2, 2, 1), (3,), (), (1,) * 9):
            read = [batch["number"].tolist() for batch in readers.read(batches(*sizes))]
            numbers = iter(range(sum(sizes)))
            assert read == [[next(numbers) for _ in range(size)] for size in sizes]


def test_what_is_read_next_is_read_by_the_same_processes() -> None:
    with ReaderPool(2) as readers:
        first = processes(readers.read(batches(1, 1, 1, 1)))
        assert len(first) == 2 and os.getpid() not in first
        assert processes(readers.read(batches(1, 1, 1, 1))) == first


def test_they_end_with_the_block() -> None:
    with ReaderPool(1) as readers:
        (process,) = processes(readers.read(batches(1)))
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_what_was_left_unread_does_not_come_later() -> None:
    with ReaderPool(2) as readers:
        before = readers.read(batches(*[1] * 20))
        next(before)
        now = readers.read([partial(here, 100 + i)] for i in range(5))
        assert [batch["number"].tolist() for batch in now] == [[100], [101], [102], [103], [104]]
        assert next(before, None) is None


def test_no_more_is_asked_for_than_is_soon_needed() -> None:
    asked = []

    def endless() -> Iterator[list]:
        while True:
            asked.append(0)
            yield [partial(here, 0)]

    with ReaderPool(2) as readers:
        read = readers.read(endless())
        for _ in range(3):
            next(read)
        assert len(asked) <= 3 + 2 * 2


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_is_named_and_the_next_ones_are_read(tmp_path: Path, workers: int) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    Image.fromarray(np.full((32, 32), 51, np.uint8)).save(tmp_path / "whole.png")
    images = ImageFileDataset([tmp_path / "whole.png", tmp_path / "broken.png"], (32, 32))
    with ReaderPool(workers) as readers:
        with pytest.raises(InputError) as raised:
            list(readers.read([images.to_read(number)] for number in (0, 1, 0)))
        assert in_one_line(raised.value).startswith(f"{tmp_path / 'broken.png'}: not an image")
        (batch,) = readers.read([[images.to_read(0)] * 2])
    assert torch.equal(batch["image"], torch.full((2, 3, 32, 32), 0.2))


def test_where_a_process_is_killed_others_take_its_place() -> None:
    with ReaderPool(2) as readers:
        with pytest.raises(RuntimeError, match=r"killed by signal|exited unexpectedly") as raised:
            list(readers.read([[killed]] * 4))
        assert in_one_line(raised.value).startswith("a process that reads images was killed, most often because memory")
        assert len(list(readers.read(batches(1, 1, 1)))) == 3
