"""Settings of the C library's memory allocator, for a process that is the library's own."""

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_NEVER = -1
_LARGEST_KEPT = 2**30


def keep_freed_memory() -> None:
    """Has glibc keep the memory of freed tensors for the next ones, blocks of 1 GiB and more excepted.

    By default glibc gives blocks of 32 MiB back to the system when they are freed, and the free end of its heap too.
    The system then clears every page anew, in each layer of each batch. The setting is the whole process's. Nothing is
    changed if the user has chosen these settings by glibc's environment variables, or under another C library.
    """
    if any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_TRIM_THRESHOLD, _NEVER)
