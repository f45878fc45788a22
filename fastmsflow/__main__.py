"""The entry point of ``fastmsflow`` and ``python -m fastmsflow``.

An error that the user can mend is printed on one line, without a traceback.
"""

import atexit
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

from .allocator import keep_freed_memory
from .distributed.process_group import ErrorOnAnotherRank, has_joined, is_peer_lost
from .errors import PREEMPTED, InputError, Preempted, UnavailableError, in_one_line, is_meant_for_a_person, printable

# By then a launcher has ended those that are left, and the process that failed has told why.
SILENT_SECONDS = 5.0


def main() -> None:
    _ensure_home()
    keep_freed_memory()
    try:
        from .terminal import print_traceback, printable_streams
    except ImportError as error:
        sys.exit(_needs(error))
    with printable_streams():
        try:
            _run()
        except SystemExit as end:
            if isinstance(end.code, str):
                # Python prints it when the streams are as they were.
                end.code = printable(end.code)
            if end.code and _joined():
                _leave_at_once(end)
            raise
        except Exception:
            if _joined():
                traceback.print_exc()
                _leave_at_once(SystemExit(1))
            # Python shows it when the streams are as they were.
            sys.excepthook = print_traceback
            raise


def _run() -> None:
    try:
        from .cli import app
    except ImportError as error:
        sys.exit(_needs(error))
    try:
        app()
    except Preempted as preempted:
        # It may come again, also while this process ends.
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
        # Before the processes have met, each one of this machine has the same error; the first one reports it.
        is_shared = isinstance(error, (InputError, UnavailableError)) and not has_joined()
        if isinstance(error, ErrorOnAnotherRank) or (is_shared and os.environ.get("LOCAL_RANK", "0") != "0"):
            sys.exit(1)
        process = "" if _rank() == "0" else f"process {_rank()}: "
        sys.exit(f"fastmsflow: {process}{in_one_line(error)}")


def _needs(error: ImportError) -> str:
    return f"fastmsflow: the command line needs {error.name}: pip install 'fastmsflow[train]'"


def _ensure_home() -> None:
    """Gives this process a home that ends with it, where the user has none: a container's user of any number.

    Libraries store in it what they have compiled, and ask for the user's name.
    """
    try:
        home = Path.home()
    except RuntimeError:
        home = None
    if home is not None and os.access(home, os.F_OK):
        return
    temporary = TemporaryDirectory(prefix="fastmsflow-home-", ignore_cleanup_errors=True)
    # The last reference to it would remove it.
    atexit.register(temporary.cleanup)
    os.environ["HOME"] = temporary.name
    os.environ.setdefault("USER", "nobody")


def _joined() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _leave_at_once(end: SystemExit) -> NoReturn:
    """Ends this process at once: threads that wait for other processes would abort an orderly end."""
    if isinstance(end.code, str):
        print(end.code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if isinstance(end.code, str) else int(end.code or 0))


def _rank() -> str:
    """Returns this process's number as torchrun gives it; nothing is checked, since the error may be about it."""
    return os.environ.get("RANK", "0")


if __name__ == "__main__":
    main()
