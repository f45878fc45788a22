"""The report page as a file: its size, its memory, its errors."""

import dataclasses
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage
from skimage import data as photographs

from fastmsflow.errors import InputError
from fastmsflow.visualization.html_report import ReportRow, write_report
from tests.helpers.report_samples import RNG, ROW, SIDE, mask_of, page


def test_one_row_at_a_time_is_in_memory(tmp_path: Path) -> None:
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0

    def watched() -> Iterator[ReportRow]:
        nonlocal most
        for i in range(20):
            row = ReportRow(Path(f"{i}.png"), 0, "good", float(i), np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8)))
            alive.append(weakref.ref(row.pixels))
            most = max(most, sum(ref() is not None for ref in alive))
            yield row
            del row

    write_report(tmp_path / "report.html", page(rows=watched()))
    assert most <= 2  # the one that is made while the loop still names the one before


def test_430_photographs_take_less_than_12_mb(tmp_path: Path) -> None:
    pixels = np.repeat(photographs.coins()[:256, :256, None], 3, axis=2)
    heat = ndimage.gaussian_filter(RNG.normal(size=(256, 256)), 10) * 80 + 2
    row = ReportRow(Path("coins.png"), 1, "crack", 1.0, pixels, heat, mask_of(1).repeat(4, 0).repeat(4, 1))
    write_report(tmp_path / "one.html", page(rows=[row]))
    write_report(tmp_path / "two.html", page(rows=[row, row]))
    one, two = ((tmp_path / name).stat().st_size for name in ("one.html", "two.html"))
    assert one + 429 * (two - one) < 12e6


def test_large_images_are_shrunk_and_keep_their_shape(tmp_path: Path) -> None:
    big = ReportRow(Path("a.png"), 0, "good", 1.0, np.zeros((1000, 2000, 3), np.uint8), np.zeros((1000, 2000)))
    write_report(tmp_path / "report.html", page(rows=[big]))
    text = (tmp_path / "report.html").read_text()
    assert '"ratio":2.0' in text and '"box":"0 0 1024 512"' in text


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "at least one image"),
        ([dataclasses.replace(ROW, score=float("nan"))], r"part0\.png: its score or heat map is not finite"),
        ([dataclasses.replace(ROW, score_map=np.full((SIDE, SIDE), np.inf))], "not finite"),
        ([dataclasses.replace(ROW, score_map=np.zeros((SIDE, 3)))], "shapes"),
        ([dataclasses.replace(ROW, mask=np.zeros((3, SIDE), bool))], "shapes"),
    ],
)
def test_errors_leave_no_file(tmp_path: Path, given: list[ReportRow], says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        write_report(tmp_path / "report.html", page(rows=given))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
