"""Tells how much memory a process may still take."""

from pathlib import Path


def available_memory(root: Path = Path("/")) -> int:
    """Returns the bytes that this process may still take without swapping, within its control group's limit.

    Returns 0 on systems other than Linux, which do not tell: their cache of files serves there.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 0
    try:
        group = root / "sys/fs/cgroup"
        limit = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return available
    return max(0, min(available, limit))
