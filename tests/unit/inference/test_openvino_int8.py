"""INT8 is refused where it, or the images, will not do; test_export_openvino.py quantizes a converted graph."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastmsflow import InputError
from fastmsflow.calibration import Calibration
from fastmsflow.inference import openvino_int8
from fastmsflow.inference.openvino_int8 import ImageScores, compare, faults, quantize
from tests.helpers.openvino_graphs import noisy_model, write_bricks

pytest.importorskip("nncf", reason="needs NNCF: pip install 'fastmsflow[openvino]'")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_bricks(tmp_path_factory.mktemp("good"), 44)


def scores(values: np.ndarray, maps: np.ndarray | None = None) -> ImageScores:
    return ImageScores(values, values, np.tile(np.arange(9.0), (len(values), 1)) if maps is None else maps)


def test_too_few_good_images_are_refused_in_one_line(good: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        quantize(None, good[:39], noisy_model(), tmp_path / "scratch.xml")
    assert str(caught.value) == (
        "INT8 needs 40 good images, half of them to be compared, and there are 39: give more, or export without --int8"
    )


def test_copies_of_one_image_are_refused_in_one_line(good: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    alike = np.ones(20, np.float32)
    monkeypatch.setattr(openvino_int8, "_scored", lambda graph, files, size: scores(alike))
    with pytest.raises(InputError) as caught:
        quantize(None, good[:40], noisy_model(), Path("scratch.xml"))
    assert str(caught.value) == (
        "INT8 needs good images that differ, and the 20 that are held out all score alike: give others, or export"
        " without --int8"
    )


def test_of_many_images_some_are_taken_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_int8, "LARGEST_HALF", 4)
    assert openvino_int8._thinned([Path(str(i)) for i in range(10)]) == [Path("0"), Path("2"), Path("5"), Path("7")]


def test_the_same_scores_are_without_fault() -> None:
    values = np.random.default_rng(0).normal(size=40)
    figures = compare(scores(values), scores(values))
    assert figures.same_label == 1
    assert figures.threshold_shift == 0
    assert figures.rank_correlation == pytest.approx(1)
    assert faults(figures) == []


@pytest.mark.parametrize(
    ("disturbed", "fault"),
    [
        (lambda x: x[::-1], "rank correlation of scores"),
        (lambda x: x + 0.3 * x.std(), "shift of the threshold over the scores' spread 0.3, at most 0.25"),
        (lambda x: x - x.std(), "share of images with the same label"),
        (np.zeros_like, "rank correlation of scores nan, at least 0.95"),
    ],
    ids=["reversed", "a bit too high", "far too low", "constant"],
)
def test_disturbed_scores_are_told(disturbed: Any, fault: str) -> None:
    values = np.sort(np.random.default_rng(0).normal(size=40))
    if "label" in fault:
        calibration = Calibration((float(np.median(values)),) * 20, (0.0,) * 20, 0.0)
        found = faults(compare(scores(values), scores(disturbed(values)), calibration))
    else:
        found = faults(compare(scores(values), scores(disturbed(values))))
    assert any(text.startswith(fault) for text in found), found


def test_disturbed_maps_are_told() -> None:
    values = np.random.default_rng(0).normal(size=40)
    maps = np.random.default_rng(1).normal(size=(40, 9))
    figures = compare(scores(values, maps), scores(values, maps[:, ::-1]))
    assert [text.partition(" of maps")[0] for text in faults(figures)] == ["rank correlation"]
