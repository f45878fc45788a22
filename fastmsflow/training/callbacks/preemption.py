"""SIGTERM: a machine is taken away, and the run on it ends so that it can go on elsewhere."""

import signal
import threading
from contextlib import AbstractContextManager
from types import FrameType, TracebackType
from typing import Any

from ...errors import Preempted

KEPT = "its state is kept, and the same command with --resume goes on"
LAST_KEPT = "the same command with --resume goes on from the last state, or, if none was kept yet, begins anew"


class PreemptionHandler(AbstractContextManager["PreemptionHandler"]):
    """In its block SIGTERM raises Preempted: at once, or, while ``deferred``, only sets ``asked``, for whoever looks
    there to save first. In a thread other than the main one signals stay what they are."""

    def __init__(self) -> None:
        self.asked = False
        self.deferred = False
        self._before: Any = None
        self._in_main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "PreemptionHandler":
        if self._in_main:
            self._before = signal.getsignal(signal.SIGTERM)
        self.install()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._in_main:
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

    def install(self) -> None:
        """Once more, where somebody else has put a handler of his own in its place."""
        if self._in_main:
            signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if not self.deferred:
            raise Preempted(LAST_KEPT)
