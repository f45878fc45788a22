"""The errors whose message is meant for a person: one line with the fact and the remedy.

The command line prints them without a traceback; anything else is a fault of this library and shows one.
"""


class InputError(ValueError):
    """Reports input that cannot be used: a file, a key, a shape, an option."""


class InputWarning(UserWarning):
    """Warns that something given can be used, but may mean something else: one line with the fact and the remedy."""


class UnavailableError(RuntimeError):
    """Reports a resource that cannot be had here: a download, an optional package, a backend."""


WITHOUT_READERS = (
    "give --workers 0 (in Python workers=0), or fewer workers or a smaller batch, or more shared memory (docker run"
    " --shm-size 1g)"
)

# The exit code after SIGTERM, where the same work can be gone on with: EX_TEMPFAIL of sysexits.h.
PREEMPTED = 75


class Preempted(BaseException):
    """Reports that SIGTERM stopped work that can be continued; the text says what was saved.

    This is no Exception: nothing may take it for a fault.
    """


def is_meant_for_a_person(error: Exception) -> bool:
    """Tells whether ``error`` is something that the user can mend, with a message of one line."""
    meant = isinstance(error, (InputError, UnavailableError, OSError))
    return meant or _is_of_a_killed_reader(error) or _is_of_memory(error)


def _is_of_a_killed_reader(error: Exception) -> bool:
    """Tells whether a data loader's worker was killed; torch raises the error wherever this process happens to be."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


def _is_of_memory(error: Exception) -> bool:
    """Tells whether memory ran out, in Python, in NumPy, or in PyTorch on a CPU or a GPU."""
    # A process that reads hands NumPy's error on as a RuntimeError.
    signs = ("DefaultCPUAllocator", "out of memory", "not enough memory", "Caught MemoryError")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    )


def in_one_line(error: Exception) -> str:
    """Returns the message of ``error`` on one line, preceded by its type if it is not meant for a person."""
    if _is_of_a_killed_reader(error):
        return (
            "a process that reads images was killed, most often because memory ran out, or shared memory, /dev/shm;"
            f" {WITHOUT_READERS}"
        )
    if _is_of_memory(error) and not isinstance(error, UnavailableError):
        return "memory ran out; give a smaller --image-size or --batch-size, fewer --workers, or more memory"
    # A loader's worker hands its error on with its traceback in front; the last line is the message.
    message = (str(error).strip().splitlines() or [""])[-1]
    for name in ("InputError: ", "UnavailableError: "):
        message = message.split(name)[-1]
    return message if is_meant_for_a_person(error) else f"{type(error).__name__}: {message}"


def first_few(faults: list[str], shown: int = 4) -> str:
    """Returns the first few of a list of faults and how many more there are, on one line."""
    more = f"; and {len(faults) - shown} more" if len(faults) > shown else ""
    return "; ".join(faults[:shown]) + more
