"""Tests what a process may still take of the machine's memory."""

from pathlib import Path

from fastmsflow.available_memory import available_memory


def test_available_memory_is_within_the_control_groups_limit(tmp_path: Path) -> None:
    assert available_memory(tmp_path) == 0
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:  32 kB\nMemFree:  8 kB\nMemAvailable:   16 kB\n")
    assert available_memory(tmp_path) == 16384
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("3000\n")
    for limit, expected in (("max\n", 16384), ("10000\n", 7000), ("2000\n", 0), ("1000000\n", 16384)):
        (group / "memory.max").write_text(limit)
        assert available_memory(tmp_path) == expected
