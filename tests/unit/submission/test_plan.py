"""Tests what a submission finds wrong with runs and private sets before anything is scored."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmsflow import InputError
from fastmsflow.data.layouts.mvtec_ad_2 import PRIVATE_SPLITS
from fastmsflow.errors import InputWarning
from fastmsflow.models.checkpoint import read_checkpoint, write_checkpoint
from fastmsflow.submission import SubmissionOptions, submit
from fastmsflow.submission.plan import IMAGES_OF, plan_submission
from tests.helpers.mvtec_ad_2_runs import tiny

TWO = ("can", "rice")
NO_OPTIONS = SubmissionOptions()
pytestmark = pytest.mark.filterwarnings("ignore:.*is not the whole published set")


def refusal(out: str = "out") -> str:
    """The one line with which a submission is refused; nothing is written."""
    with pytest.raises(InputError) as error:
        submit("runs", "set", out)
    assert not Path(out).exists()
    line = str(error.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("split", PRIVATE_SPLITS)
def test_an_image_missing_in_the_middle_is_named(split: str, submission_here: Path) -> None:
    next(iter((submission_here / "set/rice" / split).glob("001_*"))).unlink()
    assert refusal() == f"set/rice/{split}: holds images from 000 to 002 without 001; copy the set again"


def test_numbers_of_other_objects_may_have_gaps(submission_here: Path) -> None:
    for folder in ("set", "runs"):
        (submission_here / folder / "can").rename(submission_here / folder / "bolt")
    (submission_here / "set/bolt/test_private/001_regular.png").unlink()
    tensors, config = read_checkpoint("runs/bolt/best.safetensors")
    write_checkpoint("runs/bolt/best.safetensors", tensors, config | {"notes": {}})
    planned = plan_submission(Path("runs"), Path("set"), NO_OPTIONS).objects
    assert {of.name: len(of.images) for of in planned} == {"bolt": 5, "rice": 6}


def test_an_image_whose_header_cannot_be_read_is_named(submission_here: Path) -> None:
    (submission_here / "set/can/test_private/001_regular.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert refusal().startswith("set/can/test_private/001_regular.png: ")


def test_two_images_with_one_name_are_named(submission_here: Path) -> None:
    Image.fromarray(np.zeros((48, 64), np.uint8)).save("set/can/test_private/001_regular.bmp")
    line = refusal()
    assert "its map would have the name of 001_regular" in line
    assert line.endswith("remove one of them")


@pytest.mark.parametrize("split", PRIVATE_SPLITS)
def test_a_private_set_that_is_not_there_is_named(split: str, submission_here: Path) -> None:
    shutil.rmtree(submission_here / "set/can" / split)
    line = refusal()
    assert line.startswith(f"set/can/{split}: no such folder")


def test_an_object_that_is_no_folder_is_named(submission_here: Path) -> None:
    (submission_here / "set/vial").write_text("")
    assert refusal() == "set/vial: is no folder; unpack the object vial there"


def test_an_object_that_is_a_link_to_nothing_is_named(submission_here: Path) -> None:
    (submission_here / "set/vial").symlink_to("nowhere")
    assert refusal() == "set/vial: is no folder; unpack the object vial there"


@pytest.mark.parametrize("out", ["set/can", "set/can/test_private", "set/rice/new/submission"])
def test_a_submission_is_not_written_among_an_objects_images(out: str, submission_here: Path) -> None:
    before = sorted(submission_here.rglob("*"))
    with pytest.raises(InputError, match=f"^{out}: lies in set/(can|rice), among the images of (can|rice); choose"):
        submit("runs", "set", out)
    assert sorted(submission_here.rglob("*")) == before


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ("runs/can", "runs/can: holds no finished run of can, rice, but is a run itself; give the folder that holds"),
        ("runs/can/best.safetensors", "runs/can/best.safetensors: is a file; give the folder that holds"),
    ],
)
def test_a_run_or_a_checkpoint_in_place_of_the_folder_of_runs_is_told(
    runs: str, message: str, submission_here: Path
) -> None:
    with pytest.raises(InputError, match=f"^{message} the folder of a run for each object$"):
        submit(runs, "set", "out")


def test_bad_options_are_refused_before_anything_is_written() -> None:
    with pytest.raises(InputError, match=r"^dtype int8: give float32"):
        SubmissionOptions(dtype="int8")
    with pytest.raises(InputError, match=r"^workers is -1"):
        SubmissionOptions(workers=-1)


def test_a_root_without_objects_is_named(submission_here: Path) -> None:
    with pytest.raises(InputError, match="set/can: holds no objects"):
        submit("runs", "set/can", "out")
    with pytest.raises(InputError, match="nowhere: no such folder"):
        submit("runs", "nowhere", "out")


def test_a_run_of_another_object_is_named(submission_here: Path) -> None:
    shutil.rmtree("runs/rice")
    shutil.copytree("runs/can", "runs/rice")
    assert refusal() == (
        "runs/rice/best.safetensors: was trained on can, not on rice; put each run into the folder of its object's name"
    )


def test_a_run_of_an_earlier_version_is_told_by_its_results(submission_here: Path) -> None:
    tensors, config = read_checkpoint("runs/rice/best.safetensors")
    write_checkpoint("runs/rice/best.safetensors", tensors, config | {"notes": {}})
    Path("runs/rice/results.json").write_text(json.dumps({"images": {"name": "can"}}))
    assert "was trained on can, not on rice" in refusal()
    Path("runs/rice/results.json").write_text(json.dumps({"images": {"name": "rice"}}))
    plan_submission(Path("runs"), Path("set"), NO_OPTIONS)


def test_a_model_without_a_threshold_of_pixels_is_named(submission_here: Path) -> None:
    tiny().save("runs/can/best.safetensors")
    assert refusal() == (
        "runs/can/best.safetensors: has no threshold of pixels; `fastmsflow calibrate runs/can/best.safetensors"
        " set/can/validation/good` sets one"
    )


def test_runs_without_any_model_are_named(submission_here: Path) -> None:
    shutil.rmtree("runs")
    assert refusal() == (
        "runs: holds no finished run of can, rice; `fastmsflow train set --class all --out runs` trains them"
    )


def test_a_run_that_has_not_finished_is_no_model(submission_here: Path) -> None:
    Path("runs/can/state-settings.json").write_text("{}")
    plan = plan_submission(Path("runs"), Path("set"), NO_OPTIONS)
    assert plan.without_model == {"can": "the run in runs/can has not finished"}
    assert [of.name for of in plan.objects] == ["rice"]


def test_the_last_checkpoint_serves_without_a_best_one_and_the_best_on_test_never(submission_here: Path) -> None:
    run = Path("runs/can")
    (run / "best.safetensors").rename(run / "last.safetensors")
    plan = plan_submission(Path("runs"), Path("set"), NO_OPTIONS)
    assert plan.objects[0].checkpoint == run / "last.safetensors"
    (run / "last.safetensors").rename(run / "best_on_test.safetensors")
    assert "can" in plan_submission(Path("runs"), Path("set"), NO_OPTIONS).without_model


def test_a_warning_tells_what_the_server_would_refuse(submission_here: Path) -> None:
    with pytest.warns(InputWarning, match="not the whole published set") as caught:
        plan_submission(Path("runs"), Path("set"), NO_OPTIONS)
    (line,) = [str(warning.message) for warning in caught]
    assert "it lacks fabric, fruit_jelly, sheet_metal, vial, wallplugs, walnuts" in line
    assert "can/test_private has 3 images, not 321" in line


def test_a_missing_last_image_is_a_difference_from_the_published_set(
    submission_here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastmsflow.submission.plan.OBJECTS", TWO)
    monkeypatch.setattr("fastmsflow.submission.plan.IMAGES_OF", dict.fromkeys(TWO, 3))
    for path in [*submission_here.glob("set/*/test_private_mixed/*")]:
        path.rename(path.with_name(f"{path.name[:3]}_mixed.png"))
    (submission_here / "set/rice/test_private/002_regular.png").unlink()
    plan = plan_submission(Path("runs"), Path("set"), NO_OPTIONS)
    assert plan.differences == ["rice/test_private has 2 images, not 3"]


def test_a_whole_set_of_published_names_causes_no_warning(
    submission_here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastmsflow.submission.plan.OBJECTS", TWO)
    monkeypatch.setattr("fastmsflow.submission.plan.IMAGES_OF", dict.fromkeys(TWO, 3))
    for path in [*submission_here.glob("set/*/test_private_mixed/*")]:
        path.rename(path.with_name(f"{path.name[:3]}_mixed.png"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", InputWarning)
        plan_submission(Path("runs"), Path("set"), NO_OPTIONS)
    assert sum(IMAGES_OF.values()) == 2045
