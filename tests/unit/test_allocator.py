"""A command's process keeps the memory of freed tensors; one whose user has chosen otherwise does not."""

import os
import platform
import subprocess
import sys

import pytest

# Fills a block of 64 MiB, frees it, fills another, and prints how many pages the system gave for that.
SECOND_BLOCK_S_PAGES = """
import resource
from fastmsflow.allocator import keep_freed_memory
keep_freed_memory()
def pages():
    b"1" * 2**26
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
first = pages()
print(pages() - first)
"""
PAGES = 2**26 // 4096


def second_block_s_pages(**environment: str) -> int:
    # Not by the fixture ``python``, whose programs run in a thread: its arena of glibc's ends at 64 MiB.
    done = subprocess.run(
        [sys.executable, "-c", SECOND_BLOCK_S_PAGES],
        # Set for all other tests.
        env={name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_the_second_block_takes_the_pages_of_the_first() -> None:
    assert second_block_s_pages() < PAGES / 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_the_user_s_own_settings_stay() -> None:
    assert second_block_s_pages(MALLOC_TRIM_THRESHOLD_="131072") > PAGES / 20
