"""Reads a file that lies far away, or that a command prints, in parts each of which must arrive in time."""

import io
from contextlib import AbstractContextManager, suppress
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, BinaryIO

from ..ahead_loader import show_life

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed import WriteableBuffer

TIMEOUT = 60.0
"""The seconds in which the next part must arrive."""
PART = 2**20
"""The bytes of a part; the last one of a file may have fewer."""


class TimedReading(io.RawIOBase):
    """The bytes of the file that ``open`` opens, which a thread reads one part ahead.

    Raises, on reading: the errors of ``open`` and of its file; TimeoutError if a part does not arrive within TIMEOUT
    seconds. Few libraries let one say how long they may wait, and none how slow a server may be.
    """

    def __init__(self, open: "Callable[[], AbstractContextManager[BinaryIO]]") -> None:
        super().__init__()
        self._parts: Queue[bytes | Exception] = Queue(maxsize=1)
        self._rest = memoryview(b"")
        self._at_end = False
        self._left = Event()
        self._process: Any = None
        Thread(target=self._read_ahead, args=(open,), daemon=True).start()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        if not self._rest and not self._at_end:
            try:
                part = self._parts.get(timeout=TIMEOUT)
            except Empty:
                raise TimeoutError(f"less than {PART / 2**20:g} MiB came within {TIMEOUT:g} s") from None
            show_life()
            if isinstance(part, Exception):
                raise part
            self._rest, self._at_end = memoryview(part), not part
        target = memoryview(buffer).cast("B")
        count = min(len(target), len(self._rest))
        target[:count], self._rest = self._rest[:count], self._rest[count:]
        return count

    def close(self) -> None:
        self._left.set()
        if self._process is not None and not self.closed:
            # A command that prints nothing would stay.
            self._process.kill()
        super().close()

    def _read_ahead(self, open: "Callable[[], AbstractContextManager[BinaryIO]]") -> None:
        try:
            with open() as file:
                # It is a command of webdataset's.
                self._process = getattr(file, "proc", None)
                while not self._left.is_set() and (part := _part_of(file)):
                    self._hand_over(part)
            # The file is closed before: only then a command's exit status is known.
            self._hand_over(b"")
        except Exception as error:  # every kind of storage has its own
            self._hand_over(error)

    def _hand_over(self, part: bytes | Exception) -> None:
        while not self._left.is_set():
            with suppress(Full):
                self._parts.put(part, timeout=1)
                return


def _part_of(file: BinaryIO) -> bytes:
    """Returns the next PART bytes, however few arrive at a time; less at the end."""
    part = bytearray()
    while len(part) < PART and (more := file.read(PART - len(part))):
        part += more
    return bytes(part)
