"""Where ``fastmsflow`` and ``python -m fastmsflow`` start: one line for what the user can mend, no traceback."""

import sys

from .errors import PREEMPTED, InputError, Preempted, UnavailableError, in_one_line
from .world import Elsewhere, World


def main() -> None:
    try:
        from .cli import app
    except ImportError as error:
        sys.exit(f"fastmsflow: the command line needs {error.name}: pip install 'fastmsflow[train]'")
    try:
        app()
    except Elsewhere:
        sys.exit(1)
    except Preempted:
        if World.here().first:
            print("fastmsflow: stopped by SIGTERM; the same command with --resume goes on", file=sys.stderr)
        sys.exit(PREEMPTED)
    except (InputError, UnavailableError, OSError) as error:
        rank = World.here().rank
        sys.exit(f"fastmsflow: {f'process {rank}: ' if rank else ''}{in_one_line(error)}")


if __name__ == "__main__":
    main()
