"""The errors whose message is meant for a person: one line with the fact and the remedy.

The command line prints them without a traceback; anything else is a fault of this library and shows one.
"""


class InputError(ValueError):
    """What was given cannot be used: a file, a key, a shape, an option."""


class InputWarning(UserWarning):
    """Warns that something given can be used, but may mean something else: one line with the fact and the remedy."""


class UnavailableError(RuntimeError):
    """What was asked for cannot be had here: a download, an optional package, a backend."""


# The exit code after SIGTERM, where the same work can be gone on with: EX_TEMPFAIL of sysexits.h.
PREEMPTED = 75


class Preempted(BaseException):
    """SIGTERM came: work that can be gone on with has stopped; its text is what was kept. Not an Exception: nothing may
    take it for a fault."""


def is_meant_for_a_person(error: Exception) -> bool:
    """Whether it is something that the user can mend, told in one line."""
    return isinstance(error, (InputError, UnavailableError, OSError)) or _is_of_a_killed_reader(error)


def _is_of_a_killed_reader(error: Exception) -> bool:
    """torch raises it wherever this process happens to be."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


def in_one_line(error: Exception) -> str:
    """What it says to a person; of an error that is not meant for one, its kind too."""
    if _is_of_a_killed_reader(error):
        return (
            "a process that reads images was killed, most often because memory ran out; try fewer workers or a smaller"
            " batch"
        )
    # A loader's worker hands its error on with its traceback in front; the last line is the message.
    message = (str(error).strip().splitlines() or [""])[-1]
    for name in ("InputError: ", "UnavailableError: "):
        message = message.split(name)[-1]
    return message if is_meant_for_a_person(error) else f"{type(error).__name__}: {message}"


def first_few(faults: list[str], shown: int = 4) -> str:
    """Returns the first few of a list of faults and how many more there are, on one line."""
    more = f"; and {len(faults) - shown} more" if len(faults) > shown else ""
    return "; ".join(faults[:shown]) + more
