"""Processes that read images: started once, for all that a run reads, or the runs of all classes."""

import multiprocessing
import os
import signal
from collections.abc import Generator, Iterable, Iterator
from contextlib import AbstractContextManager
from threading import Thread
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from .datasets import ToRead

Batch = dict[str, Any]


class _Asked(NamedTuple):
    images: list[ToRead]
    encoded: bool


class ReaderPool(AbstractContextManager["ReaderPool"]):
    """``workers`` processes, or none: this one then reads. They start when they are first needed, and end with the
    block, or when one of them fails; they read one thing at a time."""

    def __init__(self, workers: int = 0) -> None:
        self._workers = workers
        self._asked = _InTurn()
        self._loader: DataLoader[Batch] | None = None
        self._reading: Generator[Batch, None, None] | None = None

    def read(self, batches: Iterable[list[ToRead]], encoded: bool = False) -> Iterator[Batch]:
        """Each of ``batches``, which are asked for as they are needed: its images' items, stacked. It ends what was
        being read before. ``encoded``: the images are not pixels yet but bytes, of any length, which make a list.

        Errors: as the images'; RuntimeError where a process is killed.
        """
        self._stop()
        self._reading = self._read(batches, encoded)
        return self._reading

    def _read(self, batches: Iterable[list[ToRead]], encoded: bool) -> Generator[Batch, None, None]:
        # Only what is asked for goes to a process, so that it need not know of an image before.
        self._asked.batches = (_Asked(images, encoded) for images in batches)
        if self._loader is None:
            self._loader = DataLoader(
                _Reader(),
                batch_size=None,
                sampler=self._asked,
                num_workers=self._workers,
                collate_fn=_as_it_is,
                pin_memory=torch.cuda.is_available(),
                worker_init_fn=survive_sigterm,
                persistent_workers=self._workers > 0,
            )
        try:
            yield from self._loader
        except Exception as error:
            # What they were doing is lost, and maybe one of them: others take their place.
            self._loader = None
            if self._workers:
                # Without torch's frames, which would hold them; as garbage each would take 5 s to end.
                raise error.with_traceback(None) from None
            raise

    def end(self) -> None:
        """The processes, whatever they are doing; others take their place when they are needed."""
        self._stop()
        self._loader = None

    def _stop(self) -> None:
        if self._reading is not None:
            self._reading.close()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end()


class _InTurn(Sampler[_Asked]):
    """Whatever ``batches`` is at the time."""

    batches: Iterator[_Asked] = iter(())

    def __iter__(self) -> Iterator[_Asked]:
        return self.batches


class _Reader(Dataset[Batch]):
    def __getitem__(self, asked: _Asked) -> Batch:
        items = [read() for read in asked.images]
        return encoded_together(items) if asked.encoded else default_collate(items)


def encoded_together(items: list[dict[str, Any]]) -> Batch:
    """As usual, but for images, which may be encoded and of any length."""
    rest = default_collate([{key: value for key, value in item.items() if key != "image"} for item in items])
    return {**rest, "image": [item["image"] for item in items]}


def survive_sigterm(worker: int) -> None:
    """One that was sent to all processes: the training still needs batches, to end with a whole step. That of the
    process which started the worker ends it: at its exit it waits for it."""
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_end_by_parent, daemon=True).start()


def _end_by_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)


def _as_it_is(batch: Any) -> Any:
    return batch
