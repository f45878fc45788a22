"""Ends a run on SIGTERM, when its machine is taken away, so that the run can be resumed elsewhere."""

import signal
import threading
from types import FrameType
from typing import Any

from ...errors import Preempted

STATE_SAVED = "its state is kept, and the same command with --resume goes on"
RESUME_FROM_LAST = "the same command with --resume goes on from the last state, or, if none was kept yet, begins anew"


class PreemptionHandler:
    """Raises Preempted on SIGTERM within its block.

    While ``deferred``, SIGTERM only sets ``asked``, so that the state can be saved first. Outside the main thread
    signals are left as they are.
    """

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

    def __exit__(self, *error: object) -> None:
        if self._in_main:
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

    def install(self) -> None:
        """Installs the handler, again if another one has taken its place."""
        if self._in_main:
            signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if not self.deferred:
            raise Preempted(RESUME_FROM_LAST)
