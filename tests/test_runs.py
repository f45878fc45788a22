"""What a person does with a run from the command line: configure, resume, compare, calibrate, log."""

import csv
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock
from PIL import Image
from skimage import data as photographs

from fastmsflow import InputError, MSFlow, UnavailableError
from fastmsflow.checkpoint import read_checkpoint
from fastmsflow.files import LOCK_FILE
from fastmsflow.metrics import auroc
from fastmsflow.training import Evaluation
from fastmsflow.training.comparison import Judged, mean_of
from fastmsflow.training.folder import SETTINGS_FILE, STATE_FILE
from fastmsflow.training.loggers import check_loggers
from tests.helpers.disks import remount, small_disk
from tests.helpers.listing import names_in

SMALL = ("--extractor", "test_resnet.r160_in1k", "--image-size", 64, "--standardise", "--lr", 1e-3, "--batch-size", 8)


@pytest.fixture(scope="module", autouse=True)
def no_downloads():
    """The tiny extractor is not pretrained: nothing is fetched."""
    patch, made = pytest.MonkeyPatch(), MSFlow.__init__

    def untrained(self, extractor: str, pretrained: bool = True, *rest, **options) -> None:
        made(self, extractor, False, *rest, **options)

    patch.setattr(MSFlow, "__init__", untrained)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def tiles(tmp_path_factory) -> Path:
    """Classes a and b of 48 good training tiles, 10 good and 8 defective test tiles each, without masks."""
    root = tmp_path_factory.mktemp("tiles")
    for name, photograph in (("a", photographs.brick()), ("b", photographs.gravel())):
        for i in range(66):
            pixels = photograph[i * 6 : i * 6 + 80, (i % 3) * 100 : (i % 3) * 100 + 80].copy()
            if i < 48:
                target = root / name / f"train/good/{i:02}.png"
            elif i < 58:
                target = root / name / f"test/good/{i:02}.png"
            else:
                target = root / name / f"test/spot/{i:02}.png"
                pixels[30:50, 30:50] = 255 - pixels[30:50, 30:50]
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(target)
    return root


@pytest.fixture(scope="module")
def runs(tiles: Path, tmp_path_factory) -> Path:
    """A run's folder for each class, a fifth of the images held out for 10% false alarms."""
    out = tmp_path_factory.mktemp("runs")
    for name in ("a", "b"):
        run(
            "train", tiles, "--class", name, "--out", out / name, *SMALL, "--meta-epochs", 3, "--sub-epochs", 1,
            "--hold-out", 0.2, "--false-alarms", 0.1,
        )  # fmt: skip
    return out


def run(*args: object) -> None:
    """Outside of a test's own ``command``."""
    from fastmsflow.cli import app

    app([*map(str, args)], standalone_mode=False)


def test_a_run_is_configured_by_the_file_that_an_earlier_one_left(runs: Path, tiles: Path, command, tmp_path) -> None:
    config = yaml.safe_load((runs / "a/config.yaml").read_text())
    assert config["hold-out"] == 0.2
    assert (config["class"], config["lr"], config["milestones"]) == ("a", 1e-3, [0.7, 0.9])
    code, out = command("train", "--config", runs / "a/config.yaml", "--out", tmp_path / "again", "--quiet")
    assert (code, out) == (0, "")
    first, again = (json.loads((folder / "results.json").read_text()) for folder in (runs / "a", tmp_path / "again"))
    assert again["nll"] == first["nll"]
    assert again["metrics"] == first["metrics"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("batch_sise: 4", "train has no option 'batch_sise'; did you mean 'batch_size'?"),
        ("zebra: 4", "train has no option 'zebra'; there are accumulate, batch_size, cache_dtype, class,"),
        ("- 4", "holds a list; give one 'option: value' a line"),
        ("lr: [", "not YAML"),
    ],
)
def test_a_configuration_that_is_wrong_is_one_line(content: str, message: str, tiles, command, tmp_path) -> None:
    (tmp_path / "c.yaml").write_text(content)
    code, out = command("train", tiles, "--class", "a", "--out", tmp_path / "out", "--config", tmp_path / "c.yaml")
    assert code == 1
    assert out.strip().splitlines()[-1].startswith(f"fastmsflow: {tmp_path / 'c.yaml'}: {message}")
    assert not (tmp_path / "out").exists()


def test_a_configuration_may_say_how_a_verb_speaks(runs: Path, tiles: Path, command, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"source: {tiles}\nclass: a\njson: true\n")
    code, out = command("evaluate", "--config", tmp_path / "c.yaml", runs / "a")
    assert code == 0
    assert json.loads(out)["rows"]


def test_the_command_line_counts_more_than_the_file(runs: Path, command, tmp_path: Path) -> None:
    code, out = command(
        "train", "--config", runs / "a/config.yaml", "--out", tmp_path / "out", "--meta-epochs", 1, "--json"
    )
    assert code == 0
    assert len(json.loads(out)["nll"]) == 1
    assert yaml.safe_load((tmp_path / "out/config.yaml").read_text())["meta-epochs"] == 1


def test_evaluate_shows_a_runs_checkpoints_side_by_side(runs: Path, tiles: Path, command, tmp_path: Path) -> None:
    code, out = command("evaluate", runs / "a", tiles, "--class", "a", "--out", tmp_path)
    assert code == 0
    for heading in ("chosen on held-out", "last", "best on test", "false-alarm rate", "F1"):
        assert heading in out
    rows = json.loads((tmp_path / "metrics.json").read_text())
    assert [row["checkpoint"] for row in rows] == ["chosen on held-out", "last", "best on test"]
    with (tmp_path / "metrics.csv").open() as file:
        assert [float(row["image_auroc"]) for row in csv.DictReader(file)] == [row["image_auroc"] for row in rows]
    with (tmp_path / "scores.csv").open() as file:
        scores = list(csv.DictReader(file))
    labels, absolute = ([float(row[key]) for row in scores] for key in ("label", "absolute_score"))
    assert rows[0]["image_auroc_absolute"] == pytest.approx(auroc(labels, absolute))
    threshold = MSFlow.load(runs / "a/best.safetensors").calibration.threshold().value
    called = [score > threshold for score in absolute]
    alarms = sum(c for c, label in zip(called, labels, strict=True) if not label)
    assert rows[0]["false_alarm_rate"] == alarms / 10
    assert (rows[0]["threshold_value"], rows[0]["threshold_false_alarms"]) == (threshold, 0.1)
    assert rows[0]["f1"] == pytest.approx(2 * (sum(called) - alarms) / (8 + sum(called)))
    assert all(Path(row["image"]).name in (tmp_path / "report.html").read_text() for row in scores)


def test_evaluate_of_all_classes_ends_with_the_mean(runs: Path, tiles: Path, command, tmp_path: Path) -> None:
    code, out = command("evaluate", runs, tiles, "--class", "all", "--out", tmp_path, "--json")
    assert code == 0
    rows = json.loads(out)["rows"]
    assert [row["class"] for row in rows] == ["a"] * 3 + ["b"] * 3 + ["mean"] * 3
    for checkpoint in ("last", "chosen on held-out", "best on test"):
        a, b, mean = (row["image_auroc"] for row in rows if row["checkpoint"] == checkpoint)
        assert mean == pytest.approx((a + b) / 2)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "metrics.csv", "metrics.json"}
    seconds = json.loads(out)["seconds"]
    assert list(seconds) == ["load", "extractor", "flow", "metrics", "report"]


def test_evaluate_at_another_rate_of_false_alarms(runs: Path, tiles: Path, command) -> None:
    found = []
    for rate in (0.1, 0.5):
        code, out = command("evaluate", runs / "a", tiles, "--class", "a", "--false-alarms", rate, "--json")
        assert code == 0
        found.append(json.loads(out)["rows"][0]["recall"])
    assert found[0] <= found[1]
    code, out = command("evaluate", runs / "a", tiles, "--class", "a", "--false-alarms", 0.01)
    assert code == 1
    assert "needs 99 held-out good images, and there are 10: hold out more, or allow 9.10%" in out


def test_the_rate_that_too_few_images_are_told_to_allow_is_one_that_they_do_for(
    runs: Path, tiles: Path, command
) -> None:
    arguments = ("evaluate", runs / "a", tiles, "--class", "a", "--false-alarms")
    _, out = command(*arguments, 0.01)
    allowed = out.strip().splitlines()[-1].rpartition("or allow ")[2]
    assert command(*arguments, float(allowed.rstrip("%")) / 100)[0] == 0


def test_all_classes_of_a_set_that_has_none_or_of_runs_that_lack_one_are_refused_before_anything_is_scored(
    runs: Path, tiles: Path, command, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(MSFlow, "load", lambda path: pytest.fail("a model was read"))
    (tmp_path / "runs").mkdir()
    shutil.copytree(runs / "a", tmp_path / "runs/a")
    for folder, images, message in (
        (runs, tiles / "a", f"{tiles / 'a'}: holds no classes"),
        (runs, tmp_path / "nowhere", "nowhere: holds no classes, or is not there"),
        (tmp_path / "runs", tiles, f"{tmp_path / 'runs/b'}: not there; give a checkpoint or the folder of a run"),
    ):
        code, out = command("evaluate", folder, images, "--class", "all", "--out", tmp_path / "out")
        assert code == 1
        assert message in out.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_mean_is_of_all_classes_or_not_given() -> None:
    rows = [Judged(name, how, Evaluation(0.5, 0.5, 0.5)) for name, how in (("a", "x"), ("a", "y"), ("b", "x"))]
    assert [row.checkpoint for row in mean_of(rows)] == ["x"]


def test_a_folder_for_a_model_is_one_line(runs: Path, tiles: Path, command) -> None:
    for verb in ("calibrate", "predict"):
        code, out = command(verb, runs / "a", tiles / "a/test/good")
        assert code == 1
        assert f"{runs / 'a'}: a folder; give the checkpoint in it, e.g. best.safetensors of a run" in out


@pytest.mark.parametrize("verb", ["evaluate", "calibrate"])
def test_images_whose_score_is_not_finite_are_named(verb: str, runs: Path, tiles: Path, command, tmp_path) -> None:
    model = MSFlow.load(runs / "a/last.safetensors")
    with torch.no_grad():
        model.flow.parallel_flows[0].blocks[0].global_offset.fill_(float("nan"))
    model.save(tmp_path / "nan.safetensors")
    arguments = (tiles, "--class", "a") if verb == "evaluate" else (tiles / "a/test/good",)
    code, out = command(verb, tmp_path / "nan.safetensors", *arguments)
    assert code == 1
    assert f"the score is not finite of {tiles / 'a/test/good/48.png'}; " in out.strip().splitlines()[-1]


def test_good_test_images_unlike_those_held_out_are_pointed_out(runs: Path, tiles: Path, command, tmp_path) -> None:
    """Class b's good images, judged by what class a's score."""
    model = tmp_path / "model.safetensors"
    shutil.copy(runs / "a/best.safetensors", model)
    assert "near-copies" not in command("evaluate", model, tiles, "--class", "a")[1]
    code, out = command("evaluate", model, tiles, "--class", "b")
    assert code == 0
    assert "10 of 10 good test images are above the threshold, more than by chance" in out


def test_calibrate_counts_an_image_once(runs: Path, tiles: Path, command, tmp_path: Path) -> None:
    folder = tiles / "a/test/good"
    arguments = (folder, folder, folder / "48.png", "--false-alarms", 0.1, "--out", tmp_path / "m.safetensors")
    code, out = command("calibrate", runs / "a/best.safetensors", *arguments, "--json")
    assert code == 0
    assert json.loads(out)["threshold"]["images"] == 10


def test_calibrate_sets_the_threshold_of_a_model_and_keeps_what_it_says_of_itself(
    runs: Path, tiles: Path, command, tmp_path: Path
) -> None:
    model = tmp_path / "model.safetensors"
    shutil.copy(runs / "a/best.safetensors", model)
    code, out = command("calibrate", model, tiles / "a/train/good", "--false-alarms", 0.05, "--json")
    assert code == 0
    said = json.loads(out)["threshold"]
    calibrated = MSFlow.load(model)
    assert calibrated.calibration.threshold().as_dict() == said
    assert (said["images"], said["false_alarms"]) == (48, 0.05)
    # Of 48 the second largest: one of them is above.
    assert sum(score > said["value"] for score in calibrated.calibration.scores) == 1


def test_calibrate_with_too_few_images_leaves_the_model_as_it_was(runs: Path, tiles: Path, command, tmp_path) -> None:
    model = tmp_path / "model.safetensors"
    shutil.copy(runs / "a/best.safetensors", model)
    before = model.read_bytes()
    code, out = command("calibrate", model, tiles / "a/test/good", "--false-alarms", 0.05)
    assert code == 1
    assert "needs 19 held-out good images, and there are 10" in out
    assert model.read_bytes() == before


def train_args(tiles: Path, out: Path, *more: object) -> tuple[object, ...]:
    return ("train", tiles, "--class", "a", "--out", out, *SMALL, "--meta-epochs", 3, "--sub-epochs", 1, *more)


def interrupted(tiles: Path, out: Path, command, monkeypatch) -> None:
    """A run that ends after its state was kept once."""
    from fastmsflow.training.state_file import StateFile

    def keep_and_fail(self, trainer, module):
        trainer.save_checkpoint(self._path)
        raise InputError("pulled the plug")

    with monkeypatch.context() as patch:
        patch.setattr(StateFile, "on_train_epoch_end", keep_and_fail)
        code, text = command(*train_args(tiles, out))
    assert code == 1
    assert "pulled the plug" in text


def test_a_run_is_never_written_over_and_says_how_to_go_on(tiles: Path, command, monkeypatch, tmp_path: Path) -> None:
    out = tmp_path / "run"
    interrupted(tiles, out, command, monkeypatch)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    code, text = command(*train_args(tiles, out))
    assert code == 1
    assert f"{out}: holds an interrupted run; go on with it by --resume, or choose another folder" in text
    code, text = command(*train_args(tiles, out, "--resume", "--lr", 5e-4, "--clip-norm", 3))
    assert code == 1
    assert "needs the settings that it began with: recipe.lr was 0.001, is 0.0005; recipe.clip_norm was 2.0, is" in text
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert command(*train_args(tiles, out, "--resume"))[0] == 0
    assert not (out / STATE_FILE).exists()
    for more in ((), ("--resume",)):
        code, text = command(*train_args(tiles, out, *more))
        assert code == 1
        assert f"{out}: holds a finished run, of which `fastmsflow evaluate` reports; choose another folder" in text


def test_a_resumed_run_with_other_images_is_refused(tiles: Path, command, monkeypatch, tmp_path: Path) -> None:
    copy = tmp_path / "tiles"
    shutil.copytree(tiles, copy)
    interrupted(copy, tmp_path / "run", command, monkeypatch)
    shutil.copy(copy / "a/train/good/00.png", copy / "a/train/good/01.png")
    code, text = command(*train_args(copy, tmp_path / "run", "--resume"))
    assert code == 1
    assert "images.fingerprint was" in text


def test_a_damaged_state_is_named(tiles: Path, command, monkeypatch, tmp_path: Path) -> None:
    out = tmp_path / "run"
    interrupted(tiles, out, command, monkeypatch)
    (out / STATE_FILE).write_bytes(b"half")
    code, text = command(*train_args(tiles, out, "--resume"))
    assert code == 1
    assert f"{out / STATE_FILE}: damaged" in text.strip().splitlines()[-1]
    assert "remove it to begin the run again" in text


def test_a_resumed_run_with_another_extractor_is_refused(tiles: Path, command, monkeypatch, tmp_path: Path) -> None:
    interrupted(tiles, tmp_path / "run", command, monkeypatch)
    made = MSFlow.__init__

    def other(self, *args, **options) -> None:
        made(self, *args, **options)
        next(self.extractor.parameters()).data.add_(1)

    monkeypatch.setattr(MSFlow, "__init__", other)
    code, text = command(*train_args(tiles, tmp_path / "run", "--resume"))
    assert code == 1
    assert "the extractor's weights are not those that the run began with" in text.strip().splitlines()[-1]


def test_a_run_killed_before_it_removed_its_state_is_finished(runs: Path, tiles: Path, command, tmp_path) -> None:
    shutil.copytree(runs / "a", tmp_path / "run")
    (tmp_path / "run" / STATE_FILE).touch()
    (tmp_path / "run" / SETTINGS_FILE).touch()
    code, text = command(*train_args(tiles, tmp_path / "run", "--resume"))
    assert code == 1
    assert "holds a finished run" in text
    assert not [name for name in (STATE_FILE, SETTINGS_FILE) if (tmp_path / "run" / name).exists()]


@pytest.mark.parametrize("name", ["last.safetensors", "best.safetensors", "best_on_test.safetensors"])
def test_a_model_in_the_folder_is_not_written_over(name: str, tiles: Path, command, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"dear")
    code, _ = command(*train_args(tiles, tmp_path))
    assert code == 1
    assert (tmp_path / name).read_bytes() == b"dear"


def test_two_runs_into_one_folder_are_refused(tiles: Path, command, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    with FileLock(out / LOCK_FILE):
        code, text = command(*train_args(tiles, out))
    assert code == 1
    assert f"{out}: another process is writing there; choose another folder, or wait for it" in text


def test_training_stops_when_held_out_images_no_longer_gain(tiles: Path, command, tmp_path: Path) -> None:
    # At a learning rate of nearly nothing no round is better than the one before by more than rounding.
    code, _ = command(*train_args(tiles, tmp_path / "run", "--lr", 1e-30, "--meta-epochs", 9, "--patience", 2))
    assert code == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert [moment["epoch"] for moment in results["rounds"]] == [1, 2, 3]
    # Of rounds that are alike the results and the files name the same.
    chosen = results["metrics"]["image_auroc"]
    for how, file in {"last": "last", "best on test": "best_on_test", "chosen on held-out": "best"}.items():
        notes = read_checkpoint(tmp_path / f"run/{file}.safetensors")[1]["notes"]
        assert notes["epoch"] == chosen[how]["epoch"], how


def test_nothing_held_out_is_the_published_recipe(tiles: Path, command, tmp_path: Path) -> None:
    code, out = command(*train_args(tiles, tmp_path / "run", "--hold-out", 0))
    assert code == 0
    assert "no threshold: no images were held out" in out
    assert not (tmp_path / "run/best.safetensors").exists()
    assert MSFlow.load(tmp_path / "run/last.safetensors").calibration is None


def test_losses_are_logged_step_by_step(tiles: Path, command, monkeypatch, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    code, _ = command(*train_args(tiles, tmp_path / "run", "--logger", "csv", "--logger", "tensorboard"))
    assert code == 0
    with (tmp_path / "run/logs/csv/version_0/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["nll"]) for row in rows if row["nll"]]
    assert len(losses) == 18  # 43 images in batches of 8, three epochs
    expected = json.loads((tmp_path / "run/results.json").read_text())["nll"]
    assert sum(losses[:6]) / 6 == pytest.approx(expected[0], rel=1e-5)
    assert [float(row["held_out_nll"]) for row in rows if row["held_out_nll"]]
    assert list((tmp_path / "run/logs/tensorboard/version_0").glob("events.out.tfevents.*"))


def test_weights_and_biases_are_logged_to_without_a_network(tiles: Path, command, monkeypatch, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="needs wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert command(*train_args(tiles, tmp_path / "run", "--logger", "wandb"))[0] == 0
    assert list((tmp_path / "run/logs/wandb").glob("offline-run-*/*.wandb"))


def test_a_logger_that_is_not_known_or_not_there_is_one_line(monkeypatch) -> None:
    with pytest.raises(InputError, match="logger 'tensorbord' is not known; choose of csv, tensorboard, wandb"):
        check_loggers(["csv", "tensorbord"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match="the logger wandb is not installed: pip install wandb"):
        check_loggers(["wandb"])


def test_a_disk_that_fills_up_in_training_loses_nothing_and_the_run_goes_on(
    tiles: Path, command, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    assert command(*train_args(tiles, whole))[0] == 0
    model = (whole / "last.safetensors").stat().st_size
    # Room for the models of the first round and its state, not for a state beside it.
    with small_disk(tmp_path / "disk", str(int(7.5 * model))) as disk:
        out = disk / "run"
        code, text = command(*train_args(tiles, out))
        assert code == 1
        last = text.strip().splitlines()[-1]
        assert last.startswith(f"fastmsflow: {out}/")
        assert "the disk is full; free some space or choose another folder" in last
        names = names_in(out)
        assert {"last.safetensors", STATE_FILE} <= names
        assert not any(name.startswith(".") for name in names)
        for path in out.glob("*.safetensors"):
            MSFlow.load(path)
        remount(disk, f"size={20 * model}")
        assert command(*train_args(tiles, out, "--resume"))[0] == 0
        first, again = (json.loads((folder / "results.json").read_text()) for folder in (whole, out))
        assert again["nll"] == first["nll"]


def test_a_read_only_disk_is_found_out_before_the_training(tiles: Path, command, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        remount(disk, "ro")
        code, text = command(*train_args(tiles, disk / "run"))
    assert code == 1
    assert text.strip().splitlines()[-1].startswith(f"fastmsflow: {disk}")
    assert "a read-only disk; choose another folder" in text


def test_a_full_disk_leaves_an_earlier_report_whole(runs: Path, tiles: Path, command, tmp_path: Path) -> None:
    arguments = ("evaluate", runs / "a/last.safetensors", tiles, "--class", "a", "--out")
    with small_disk(tmp_path / "disk", "4m") as disk:
        assert command(*arguments, disk)[0] == 0
        before = {path.name: path.read_bytes() for path in disk.iterdir()}
        remount(disk, f"size={sum(map(len, before.values())) // 4096 * 4096 + 40960}")
        code, text = command(*arguments, disk)
        assert code == 1
        assert "the disk is full" in text.strip().splitlines()[-1]
        after = {path.name: path.read_bytes() for path in disk.iterdir()}
        assert after.keys() == before.keys()
        assert after["report.html"].endswith(b"</html>\n")


def test_names_with_spaces_quotes_newlines_and_bytes_that_are_no_text_go_all_the_way(
    tiles: Path, command, tmp_path: Path
) -> None:
    names = [b"a $b$.png", b"'quoted\" <b>.png", b"two\nlines.png", b"caf\xe9.png"]
    for part in ("train/good", "test/good", "test/spot"):
        (tmp_path / "set" / part).mkdir(parents=True)
        for i, (name, image) in enumerate(zip(names * 6, sorted((tiles / "a" / part).iterdir()), strict=False)):
            shutil.copy(image, os.fsencode(tmp_path / "set" / part) + b"/" + str(i).encode() + name)
    code, _ = command("train", tmp_path / "set", "--out", tmp_path / "run", *SMALL, "--meta-epochs", 1)
    assert code == 0
    assert b"caf\xe9.png" in (tmp_path / "run/scores.csv").read_bytes()
    with (tmp_path / "run/scores.csv").open(newline="", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert all(Path(row["image"]).is_file() for row in rows)
    code, _ = command("evaluate", tmp_path / "run", tmp_path / "set", "--out", tmp_path / "eval")
    assert code == 0


def test_models_that_no_run_left_are_never_written_over(runs: Path, tiles: Path, command, tmp_path: Path) -> None:
    out = tmp_path / "models"
    out.mkdir()
    shutil.copy(runs / "a/last.safetensors", out)
    before = (out / "last.safetensors").read_bytes()
    for more, message in (((), "holds an interrupted run"), (("--resume",), "holds models, but no run to go on with")):
        code, text = command(*train_args(tiles, out, *more))
        assert code == 1
        assert f"{out}: {message}" in text
    assert names_in(out) == {"last.safetensors"}
    assert (out / "last.safetensors").read_bytes() == before


def test_evaluate_leaves_its_report_beside_the_checkpoints(runs: Path, tiles: Path, command, tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    shutil.copy(runs / "a/last.safetensors", model)
    assert command("evaluate", model, tiles, "--class", "a", "--quiet") == (0, "")
    made = {path.name for path in (tmp_path / "evaluation").iterdir()}
    assert made == {"heatmaps.png", "metrics.csv", "metrics.json", "report.html", "scores.csv", "scores.png"}


@pytest.mark.parametrize("bad", [False, True], ids=["good images", "a bad image"])
def test_a_configuration_of_ones_own_in_the_folder_is_left_alone(bad: bool, tiles: Path, command, tmp_path) -> None:
    copy = tmp_path / "tiles"
    shutil.copytree(tiles / "a", copy / "a")
    if bad:
        (copy / "a/train/good/00.png").write_bytes(b"no image")
    mine = tmp_path / "run/config.yaml"
    mine.parent.mkdir()
    mine.write_text("lr: 0.001  # mine\n")
    code, text = command(*train_args(copy, mine.parent, "--config", mine))
    assert code == 1
    assert f"{mine}: would be written over; move it, or choose another folder" in text
    assert names_in(mine.parent) == {"config.yaml"}
    assert mine.read_text() == "lr: 0.001  # mine\n"
