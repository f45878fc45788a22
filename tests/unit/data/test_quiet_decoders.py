"""Decoders' warnings are silenced by threads together, and the process's filters are left alone."""

import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmsflow import InputError
from fastmsflow.data import read_image
from fastmsflow.data.image_io import _Quiet

COLOUR = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)


def test_warnings_are_silent_while_one_thread_is_inside_and_as_before_after_the_last() -> None:
    quiet, first_in, last_out = _Quiet(), threading.Event(), threading.Event()

    def first() -> None:
        with quiet:
            first_in.set()
            assert last_out.wait(10)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        with ThreadPoolExecutor(1) as threads:
            done = threads.submit(first)
            assert first_in.wait(10)
            # It came later and leaves earlier; the other one is still inside.
            with pytest.raises(KeyError), quiet, quiet:
                warnings.warn("unheard", stacklevel=1)
                raise KeyError
            warnings.warn("unheard", stacklevel=1)
            last_out.set()
            done.result()
        assert warnings.filters == before
        with pytest.raises(UserWarning, match="heard"):
            warnings.warn("heard", stacklevel=1)


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
