"""Tests the maps, the archive and the going on of submissions for MVTec AD 2's server."""

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torch import Tensor

from fastmsflow import InputError, MSFlow
from fastmsflow.data import load_image
from fastmsflow.data.layouts.mvtec_ad_2 import OBJECTS, PRIVATE_SPLITS
from fastmsflow.files import Busy, claimed_folder
from fastmsflow.inference import TiledPredictor
from fastmsflow.models.checkpoint import read_checkpoint, write_checkpoint
from fastmsflow.submission import SubmissionOptions, submit
from fastmsflow.submission.submit import resized
from fastmsflow.tiling import Tiling
from tests.helpers.mvtec_ad_2_runs import tiny, write_run, write_runs
from tests.helpers.mvtec_ad_2_tree import write_mvtec_ad_2
from tests.helpers.tolerances import SUBMITTED_MAP

pytestmark = pytest.mark.filterwarnings("ignore:.*is not the whole published set")
TWO = ("can", "rice")


@pytest.fixture
def tree(submission_made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(submission_made / "set", tmp_path / "set")


@pytest.fixture
def runs(submission_made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(submission_made / "runs", tmp_path / "runs")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "submission"


def unpacked(archive: Path, folder: Path) -> dict[str, Path]:
    """The files of the archive, by name."""
    with tarfile.open(archive) as tar:
        assert all(entry.isfile() for entry in tar)
        tar.extractall(folder, filter="data")
        return {entry.name: folder / entry.name for entry in tar}


def images_of(tree: Path, name: str) -> list[Path]:
    return [path for split in PRIVATE_SPLITS for path in sorted((tree / name / split).iterdir())]


def whole_map(model: MSFlow, path: Path) -> Tensor:
    return model.scores(load_image(path, model.image_size)[None]).absolute_map[0]


def tiled_map(model: MSFlow, path: Path) -> Tensor:
    assert model.tiling is not None
    pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
    predictor = TiledPredictor(model, model.tiling.tile, model.tiling.overlap, model.tiling.scale)
    return next(iter(predictor.scores([pixels]))).absolute_map[0]


@pytest.mark.parametrize(
    ("tiling", "score_map"), [(None, whole_map), (Tiling(32, 0.25, 0.9), tiled_map)], ids=["whole", "tiled"]
)
def test_the_archive_holds_the_maps_of_every_private_image_and_nothing_else(
    tiling: Tiling | None, score_map: Callable[[MSFlow, Path], Tensor], tree: Path, tmp_path: Path, out: Path
) -> None:
    runs = write_runs(tmp_path / "own_runs", tree, TWO, tiling)
    result = submit(runs, tree, out)
    assert result.archive == out / "submission.tar.gz"
    found = unpacked(result.archive, tmp_path / "unpacked")
    expected = {
        f"submission/{kind}/{name}/{path.parent.name}/{path.stem}.{suffix}"
        for kind, suffix in (("anomaly_images", "tiff"), ("anomaly_images_thresholded", "png"))
        for name in TWO
        for path in images_of(tree, name)
    }
    assert found.keys() == expected
    for of in result.objects:
        model = MSFlow.load(of.checkpoint)
        threshold = model.calibration.pixel_threshold().value
        assert of.threshold == threshold
        marked = dict.fromkeys(PRIVATE_SPLITS, 0.0)
        for path in images_of(tree, of.name):
            place = f"{of.name}/{path.parent.name}/{path.stem}"
            written = tifffile.imread(found[f"submission/anomaly_images/{place}.tiff"])
            png = np.asarray(Image.open(found[f"submission/anomaly_images_thresholded/{place}.png"]))
            width, height = Image.open(path).size
            assert (written.dtype, png.dtype) == (np.float16, np.uint8)
            assert written.shape == png.shape == (height, width)
            with torch.no_grad():
                right = resized(score_map(model, path).numpy(), (width, height))
            bound = SUBMITTED_MAP * right.max()
            np.testing.assert_allclose(written.astype(np.float32), right, rtol=0, atol=bound)
            near = np.abs(right - threshold) < bound
            assert set(np.unique(png)) <= {0, 255}
            assert ((png == 255) == (right > threshold))[~near].all()
            marked[path.parent.name] += (png == 255).mean() / 3
        assert of.marked == pytest.approx(marked)


def test_all_eight_objects_are_submitted(tmp_path: Path, out: Path) -> None:
    tree = write_mvtec_ad_2(tmp_path / "set", counts={"test_private": 1, "test_private_mixed": 1})
    result = submit(write_runs(tmp_path / "runs", tree, OBJECTS), tree, out)
    assert [of.name for of in result.objects] == sorted(OBJECTS)
    assert result.archive is not None
    assert len(unpacked(result.archive, tmp_path / "unpacked")) == 8 * 2 * 2


def test_values_beyond_float16_become_its_largest(tree: Path, runs: Path, out: Path) -> None:
    model = tiny()
    with torch.no_grad():
        for parameter in model.flow.parameters():
            parameter.mul_(30)
    write_run(runs / "can", tree / "can", model)
    assert submit(runs, tree, out).archive is not None
    written = [tifffile.imread(path) for path in (out / "anomaly_images/can/test_private").iterdir()]
    assert max(np.max(pixels) for pixels in written) == 65504


def test_an_archive_tells_nothing_of_its_maker_and_is_the_same_each_time(
    tree: Path, runs: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = submit(runs, tree, out).archive
    assert archive is not None
    before = archive.read_bytes()
    monkeypatch.setattr("time.time", lambda: 1.0)
    submit(runs, tree, out)
    assert archive.read_bytes() == before
    with tarfile.open(out / "submission.tar.gz") as tar:
        entries = list(tar)
    assert {(entry.uid, entry.gid, entry.uname, entry.gname, entry.mtime) for entry in entries} == {(0, 0, "", "", 0)}
    assert [entry.name for entry in entries] == sorted(entry.name for entry in entries)


def test_it_goes_on_where_it_stopped(tree: Path, runs: Path, out: Path) -> None:
    broken = tree / "can/test_private/001_regular.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    result = submit(runs, tree, out)
    assert result.archive is None
    assert len(result.faults) == 1
    assert result.faults[0].startswith(f"{broken}: ")
    assert not (out / "submission.tar.gz").exists()
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.tiff")}
    # All maps but one are there already.
    assert len(stamps) == 2 * 6 - 1
    assert {of.name: dict(of.images) for of in result.objects}["can"] == {"test_private": 2, "test_private_mixed": 3}
    broken.write_bytes(whole)
    again = submit(runs, tree, out)
    assert again.archive is not None
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


def test_maps_stay_if_nothing_has_changed(tree: Path, runs: Path, out: Path) -> None:
    submit(runs, tree, out)
    missing = out / "anomaly_images/can/test_private/001_regular.tiff"
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.tiff")}
    missing.unlink()
    assert submit(runs, tree, out).archive is not None
    changed = {path for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp}
    assert changed == {missing}


def test_the_map_of_an_image_that_was_replaced_is_made_anew(tree: Path, runs: Path, out: Path) -> None:
    submit(runs, tree, out)
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.*") if path.suffix in (".tiff", ".png")}
    Image.new("L", (40, 50)).save(tree / "rice/test_private/000_regular.png")
    assert submit(runs, tree, out).archive is not None
    changed = {path.stem for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp}
    assert changed == {"000_regular"}
    assert tifffile.imread(out / "anomaly_images/rice/test_private/000_regular.tiff").shape == (50, 40)


@pytest.mark.parametrize("change", ["model", "threshold"])
def test_maps_of_an_object_are_made_anew_if_its_model_or_threshold_has_changed(
    change: str, tree: Path, runs: Path, out: Path
) -> None:
    submit(runs, tree, out)
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    options = SubmissionOptions()
    if change == "model":
        write_run(runs / "can", tree / "can", tiny(Tiling(32)))
    else:
        options = SubmissionOptions(false_pixels=0.1)
    submit(runs, tree, out, options)
    anew = {path.parts[-3] for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp}
    assert anew == ({"can"} if change == "model" else {"can", "rice"})


def test_a_model_that_cannot_score_costs_no_maps_of_the_one_before(tree: Path, runs: Path, out: Path) -> None:
    submit(runs, tree, out)
    maps = {path: path.stat().st_mtime_ns for path in out.rglob("*.*") if path.suffix in (".tiff", ".png")}
    checkpoint = runs / "can/best.safetensors"
    whole = checkpoint.read_bytes()
    tensors, config = read_checkpoint(checkpoint)
    del tensors[next(iter(tensors))]
    write_checkpoint(checkpoint, tensors, config)
    with pytest.raises(InputError, match=r"can/best\.safetensors"):
        submit(runs, tree, out)
    checkpoint.write_bytes(whole)
    assert submit(runs, tree, out).archive is not None
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in maps.items())


def test_an_object_without_a_model_is_named_and_the_others_are_scored(tree: Path, runs: Path, out: Path) -> None:
    for path in (runs / "rice").iterdir():
        path.unlink()
    result = submit(runs, tree, out)
    assert result.archive is None
    assert result.without_model == {"rice": f"{runs / 'rice'} holds no best.safetensors or last.safetensors"}
    assert len(list(out.rglob("*.tiff"))) == 6
    write_run(runs / "rice", tree / "rice", tiny())
    assert submit(runs, tree, out).archive is not None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tiff, png: tiff.write_bytes(b"II"), "{tiff}: cannot be read"),
        (lambda tiff, png: png.write_bytes(b"\x89PNG"), "{png}: cannot be read"),
        (lambda tiff, png: tifffile.imwrite(tiff, np.zeros((8, 8), np.float16)), "{tiff}: is 8x8 float16, not 48x64"),
        (lambda tiff, png: tifffile.imwrite(tiff, np.zeros((48, 64), np.float32)), "{tiff}: is 48x64 float32, not"),
        (
            lambda tiff, png: tifffile.imwrite(tiff, np.zeros((2, 48, 64), np.float16)),
            "{tiff}: is 2x48x64 float16, not",
        ),
        (lambda tiff, png: tifffile.imwrite(tiff, np.full((48, 64), np.nan, np.float16)), "{tiff}: has values"),
        (lambda tiff, png: Image.fromarray(np.ones((48, 64), np.uint8)).save(png), "{png}: has other values than 0"),
        (lambda tiff, png: Image.new("RGB", (64, 48)).save(png), "{png}: is 48x64 of mode RGB, not 48x64 uint8"),
    ],
    ids=["no tiff", "no png", "size", "dtype", "pages", "nan", "values", "color"],
)
def test_a_damaged_map_is_named_before_anything_is_packed(
    damage: Callable[[Path, Path], object], message: str, tree: Path, runs: Path, out: Path
) -> None:
    archive = submit(runs, tree, out).archive
    assert archive is not None
    before = archive.read_bytes()
    tiff = out / "anomaly_images/can/test_private/001_regular.tiff"
    png = out / "anomaly_images_thresholded/can/test_private/001_regular.png"
    damage(tiff, png)
    with pytest.raises(InputError) as error:
        submit(runs, tree, out)
    assert str(error.value).startswith(message.format(tiff=tiff, png=png))
    assert str(error.value).endswith("remove it, and the same command makes it again")
    assert archive.read_bytes() == before
    for path in (tiff, png):
        path.unlink()
    assert submit(runs, tree, out).archive is not None


def test_a_map_whose_header_claims_a_size_that_fills_the_memory_is_not_decoded(
    tree: Path, runs: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(runs, tree, out)
    tiff = out / "anomaly_images/can/test_private/001_regular.tiff"
    # It has no data, and takes no space.
    tifffile.imwrite(tiff, shape=(20_000, 20_000), dtype=np.float16)
    decode = tifffile.TiffFile.asarray

    def decoded(file: tifffile.TiffFile, *args: object, **options: object) -> np.ndarray:
        assert file.series[0].shape == (48, 64), "decoded"
        return decode(file, *args, **options)

    monkeypatch.setattr(tifffile.TiffFile, "asarray", decoded)
    with pytest.raises(InputError, match=r"001_regular.tiff: is 20000x20000 float16, not 48x64 float16"):
        submit(runs, tree, out)


def test_a_folder_of_something_else_is_refused(tree: Path, runs: Path, out: Path) -> None:
    (out / "anomaly_images").mkdir(parents=True)
    with pytest.raises(InputError, match="anomaly_images: is in the way, and `submit` has not written it"):
        submit(runs, tree, out)
    (out / "anomaly_images").rmdir()
    for content, message in (
        ("{", "no record of a submission"),
        (json.dumps({"format": "x", "objects": {}}), "is of something else"),
    ):
        (out / "submission.json").write_text(content)
        with pytest.raises(InputError, match=message):
            submit(runs, tree, out)


def test_nothing_behind_a_link_is_written_or_removed(tree: Path, runs: Path, out: Path, tmp_path: Path) -> None:
    submit(runs, tree, out)
    (out / "anomaly_images/can").rename(tmp_path / "elsewhere")
    (out / "anomaly_images/can").symlink_to(tmp_path / "elsewhere")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "elsewhere").rglob("*.tiff")}
    write_run(runs / "can", tree / "can", tiny(Tiling(32)))
    with pytest.raises(InputError, match="anomaly_images/can: is a link"):
        submit(runs, tree, out)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "elsewhere").rglob("*.tiff")} == before


def test_two_processes_do_not_write_one_submission(tree: Path, runs: Path, out: Path) -> None:
    with claimed_folder(out), pytest.raises(Busy, match="another process is writing there"):
        submit(runs, tree, out)


def test_a_full_disk_is_told_before_scoring(tree: Path, runs: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(InputError, match="the maps of 12 images and the archive take up to"):
        submit(runs, tree, out)
    assert not list(out.rglob("*.tiff"))


@pytest.mark.parametrize("size", [(64, 48), (20, 30), (32, 32)])
def test_a_constant_map_stays_constant_at_any_size(size: tuple[int, int]) -> None:
    score_map = resized(np.full((32, 32), 3.5, np.float32), size)
    np.testing.assert_allclose(score_map, np.full(size[::-1], 3.5), rtol=1e-6)
