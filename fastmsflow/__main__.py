"""Runs ``fastmsflow`` and ``python -m fastmsflow``; prints one line, not a traceback, for what the user can repair."""

import os
import signal
import sys
import time
import traceback
from typing import NoReturn

from .distributed.process_group import ErrorOnAnotherRank, has_joined, is_peer_lost
from .errors import PREEMPTED, InputError, Preempted, UnavailableError, in_one_line, is_meant_for_a_person

# Within this time a launcher ends the remaining processes, and the process that failed has printed its error.
SILENT_SECONDS = 5.0


def main() -> None:
    try:
        _run()
    except SystemExit as end:
        if end.code and _joined():
            _leave_at_once(end)
        raise
    except Exception:
        if not _joined():
            raise
        traceback.print_exc()
        _leave_at_once(SystemExit(1))


def _run() -> None:
    try:
        from .cli import app
    except ImportError as error:
        sys.exit(f"fastmsflow: the command line needs {error.name}: pip install 'fastmsflow[train]'")
    try:
        app()
    except Preempted as preempted:
        # SIGTERM may be repeated while this process ends.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if _rank() == "0":
            print(f"fastmsflow: stopped by SIGTERM; {preempted}", file=sys.stderr)
        sys.exit(PREEMPTED)
    except Exception as error:
        if _joined() and is_peer_lost(error):
            time.sleep(SILENT_SECONDS)
            sys.exit(f"fastmsflow: process {_rank()}: another process has gone ({in_one_line(error)})")
        if not is_meant_for_a_person(error):
            raise
        if isinstance(error, ErrorOnAnotherRank) or _is_told_by_another(error):
            sys.exit(1)
        process = "" if _rank() == "0" else f"process {_rank()}: "
        sys.exit(f"fastmsflow: {process}{in_one_line(error)}")


def _is_told_by_another(error: Exception) -> bool:
    """Returns whether another process prints the error, which all have alike before they have met."""
    alike = isinstance(error, (InputError, UnavailableError)) and not has_joined()
    return alike and os.environ.get("LOCAL_RANK", "0") != "0"


def _joined() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _leave_at_once(end: SystemExit) -> NoReturn:
    """Ends the process without waiting for threads, which wait for other processes that may never answer."""
    if isinstance(end.code, str):
        print(end.code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if isinstance(end.code, str) else int(end.code or 0))


def _rank() -> str:
    """Returns the rank as torchrun gives it, unchecked, since the error may be about it."""
    return os.environ.get("RANK", "0")


if __name__ == "__main__":
    main()
