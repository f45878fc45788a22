"""Where ``fastmsflow`` and ``python -m fastmsflow`` start: one line for what the user can mend, no traceback."""

import os
import sys

from .errors import PREEMPTED, InputError, Preempted, UnavailableError, in_one_line
from .world import Elsewhere


def main() -> None:
    try:
        from .cli import app
    except ImportError as error:
        sys.exit(f"fastmsflow: the command line needs {error.name}: pip install 'fastmsflow[train]'")
    try:
        app()
    except Elsewhere:
        sys.exit(1)
    except Preempted as preempted:
        if _rank() == "0":
            print(f"fastmsflow: stopped by SIGTERM; {preempted}", file=sys.stderr)
        sys.exit(PREEMPTED)
    except (InputError, UnavailableError, OSError) as error:
        process = "" if _rank() == "0" else f"process {_rank()}: "
        sys.exit(f"fastmsflow: {process}{in_one_line(error)}")


def _rank() -> str:
    """As torchrun has it, which may be what the error is about."""
    return os.environ.get("RANK", "0")


if __name__ == "__main__":
    main()
