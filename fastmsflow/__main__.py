"""Where ``fastmsflow`` and ``python -m fastmsflow`` start: one line for what the user can mend, no traceback."""

import sys

from .errors import InputError, UnavailableError
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
    except (InputError, UnavailableError, OSError) as error:
        # A loader's worker hands its error on with its traceback in front; the last line is the message.
        message = str(error).strip().splitlines()[-1]
        for name in ("InputError: ", "UnavailableError: "):
            message = message.split(name)[-1]
        rank = World.here().rank
        sys.exit(f"fastmsflow: {f'process {rank}: ' if rank else ''}{message}")


if __name__ == "__main__":
    main()
