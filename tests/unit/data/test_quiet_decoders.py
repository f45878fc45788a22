"""Decoders' warnings are silenced, and the process's filters are left alone."""

import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from fastmsflow import InputError
from fastmsflow.data import read_image

COLOUR = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)


def test_threads_that_read_good_and_bad_files_leave_the_filters_of_warnings_alone(tmp_path: Path) -> None:
    good = tmp_path / "good.png"
    Image.fromarray(COLOUR).convert("P").save(good, transparency=bytes(range(256)))
    bad = tmp_path / "bad.png"
    bad.write_bytes(good.read_bytes()[:-100])

    def read(path: Path) -> bool:
        try:
            read_image(path)
        except InputError:
            return False
        return True

    before, interval = list(warnings.filters), sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-6)
        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(read, [good, bad] * 100)) == [True, False] * 100
    finally:
        sys.setswitchinterval(interval)
    assert warnings.filters == before
