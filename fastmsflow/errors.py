"""The errors whose message is meant for a person: one line with the fact and the remedy.

The command line prints them without a traceback; anything else is a fault of this library and shows one.
"""

LONGEST_MESSAGE = 4000
LONGEST_VALUE = 200


def cut(text: str, most: int = LONGEST_VALUE) -> str:
    """Returns ``text``, which a stranger's file may hold, or both its ends if it has more than ``most`` characters."""
    # A text that has been cut once is not cut again.
    if len(text) <= most + 40:
        return text
    return f"{text[: most // 2]} ... {text[-(most // 2) :]} ({len(text)} characters)"


class InputError(ValueError):
    """Reports input that cannot be used: a file, a key, a shape, an option."""

    def __init__(self, message: str = "") -> None:
        super().__init__(cut(message, LONGEST_MESSAGE))


class InputWarning(UserWarning):
    """Warns that something given can be used, but may mean something else: one line with the fact and the remedy."""


class UnavailableError(RuntimeError):
    """Reports a resource that cannot be had here: a download, an optional package, a backend."""

    def __init__(self, message: str = "") -> None:
        super().__init__(cut(message, LONGEST_MESSAGE))


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


def printable(text: str, kept: str = "") -> str:
    """Returns ``text`` with all characters escaped, as ``\\x1b``, that are neither printable nor ``kept``.

    Newlines, escape sequences, marks that turn the direction of writing and lone surrogates are not printable.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode("ascii") for c in text)


def is_meant_for_a_person(error: Exception) -> bool:
    """Tells whether ``error`` is something that the user can mend, with a message of one line."""
    meant = isinstance(error, (InputError, UnavailableError, OSError))
    return meant or is_of_a_killed_reader(error) or _is_of_memory(error)


def is_of_a_killed_reader(error: Exception) -> bool:
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
    if is_of_a_killed_reader(error):
        return (
            "a process that reads images was killed, most often because memory ran out, or shared memory, /dev/shm;"
            f" {WITHOUT_READERS}"
        )
    if _is_of_memory(error) and not isinstance(error, UnavailableError):
        return "memory ran out; give a smaller batch or image size, fewer workers, or more memory"
    message = str(error).strip()
    is_of_a_worker = message.startswith(f"Caught {type(error).__name__} in ")
    if is_of_a_worker or not isinstance(error, (InputError, UnavailableError)):
        # A loader's worker hands its error on with its traceback in front; the last line is the message.
        message = (message.splitlines() or [""])[-1]
        for name in ("InputError: ", "UnavailableError: "):
            message = message.split(name)[-1]
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        message = f"{error.filename}: {error.strerror.lower()}; look after it, or give another file or folder"
    message = printable(message)
    return message if is_meant_for_a_person(error) else f"{type(error).__name__}: {message}"


def first_few(faults: list[str], shown: int = 4) -> str:
    """Returns the first few of a list of faults and how many more there are, on one line."""
    more = f"; and {len(faults) - shown} more" if len(faults) > shown else ""
    return "; ".join(map(cut, faults[:shown])) + more
