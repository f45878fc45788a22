"""Memory for Python's frames, at hand before a test begins."""

from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def with_frame_memory(function: Callable[..., Result], *arguments: object) -> Result:
    """Calls ``function`` with memory at hand for its frames and those of all that it calls.

    CPython keeps frames in chunks of 16 KB, maps a chunk when it is needed and gives it back when it is empty. Where
    calls in a loop cross the end of a chunk, every call maps one: an export under pytest took half as long again. A
    chunk is at least as large as its first frame, and the one that this call begins is 2 MB, half of it for others.
    """
    return function(*arguments)


with_frame_memory.__code__ = with_frame_memory.__code__.replace(co_stacksize=2**17 + 1)
