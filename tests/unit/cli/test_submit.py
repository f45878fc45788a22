"""Tests what ``fastmsflow submit`` prints, and its exit codes."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from fastmsflow.__main__ import main

TWO = ("can", "rice")


def submit(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fastmsflow", "submit", "runs", "set", "--out", "out", *args])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_the_archive_and_each_objects_threshold_are_named(
    submission_here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(monkeypatch) == 0
    text, warned = capsys.readouterr()
    assert "can: 6 images, runs/can/best.safetensors, threshold of a pixel" in text
    assert "checked and packed: out/submission.tar.gz" in text
    assert "the server would not take it, since the set is not the whole published one" in text
    assert "not the whole published set" in warned


def test_json_has_the_archive_and_the_marked_shares(
    submission_here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(monkeypatch, "--json", "--false-pixels", "0.05") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["archive"] == "out/submission.tar.gz"
    assert [of["name"] for of in result["objects"]] == list(TWO)
    assert set(result["objects"][0]["marked"]) == {"test_private", "test_private_mixed"}


def test_objects_without_a_model_and_images_without_a_map_are_named_and_nothing_is_packed(
    submission_here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree("runs/rice")
    broken = submission_here / "set/can/test_private/001_regular.png"
    broken.write_bytes(broken.read_bytes()[:-100])
    assert submit(monkeypatch) == 1
    text, warned = capsys.readouterr()
    assert "not packed: set/can/test_private/001_regular.png: " in warned
    assert "not packed: no model of rice; train them, and the same command goes on" in warned
    assert "Traceback" not in text + warned
    assert not Path("out/submission.tar.gz").exists()
    assert "earlier call" not in warned
    Path("out/submission.tar.gz").write_text("")
    assert submit(monkeypatch) == 1
    assert "out/submission.tar.gz: is of an earlier call, whose maps may differ" in capsys.readouterr().err


def test_an_interruption_is_one_line_and_the_same_command_goes_on(
    submission_here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastmsflow.submission.folder import SubmissionFolder

    write, left = SubmissionFolder.write, iter(range(4))

    def interrupted(*args: object) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(SubmissionFolder, "write", interrupted)
        assert submit(patched) == 130
    assert "interrupted; the maps so far stay, and the same command goes on" in capsys.readouterr().err
    stamps = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.tiff")}
    assert len(stamps) == 4
    assert submit(monkeypatch) == 0
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_a_bad_rate_is_one_line(submission_here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fastmsflow", "submit", "runs", "set", "--out", "out", "--false-pixels", "0.5"])
    with pytest.raises(SystemExit, match=r"^fastmsflow: --false-pixels is 0.5; it must be from 0.00001 to 0.1$"):
        main()
    assert not Path("out").exists()
