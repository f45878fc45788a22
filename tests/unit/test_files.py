"""Files written aside, and what is said when they cannot be."""

import errno
import os
import tempfile
from pathlib import Path

import pytest
from safetensors import SafetensorError

from fastmsflow import InputError
from fastmsflow.files import shown, written_aside


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep/result.txt"
    with written_aside(path) as aside:
        aside.write_text("first")
        assert not path.exists()
        assert aside.suffix == ".txt"
    with pytest.raises(KeyError), written_aside(path) as aside:
        aside.write_text("half")
        raise KeyError
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "x"), r"result\.txt: cannot be written, the disk is full; free some space or choose"),
        (OSError(errno.EDQUOT, "x"), r"result\.txt: cannot be written, the disk quota is used up; free some space"),
        (OSError(errno.EFBIG, "x"), r"result\.txt: too large for the disk or for `ulimit -f`; raise the limit or"),
        (OSError(errno.EROFS, "x"), r": a read-only disk; choose another folder"),
        (OSError(errno.EXDEV, "x"), r"result\.txt: lies on another disk than its folder; choose another folder"),
        (OSError(errno.EACCES, "x"), r"result\.txt: no permission to replace this file; change its owner or mode"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), r"result\.txt: .* the disk is full"),
    ],
    ids=["full", "quota", "too large", "read-only", "other disk", "permission", "full, from Rust"],
)
def test_what_a_disk_has_against_a_file_is_one_line_with_the_remedy(
    error: Exception, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "result.txt"
    path.write_text("earlier")
    with pytest.raises(InputError, match=message) as caught, written_aside(path) as aside:
        aside.write_text("half")
        raise error
    assert len(str(caught.value).splitlines()) == 1
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"result.txt": "earlier"}


def test_errors_that_are_not_the_disk_s_go_through(tmp_path: Path) -> None:
    for error in (OSError(errno.EIO, "x"), SafetensorError("no such tensor"), InputError("mine"), ValueError("x")):
        with pytest.raises(type(error)) as caught, written_aside(tmp_path / "result.txt"):
            raise error
        assert caught.value is error


def test_names_that_cannot_be_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder/full").mkdir(parents=True)
    for path, message in (
        (tmp_path / "file/result.txt", "file: is or lies below a file, not a folder; choose another folder"),
        (tmp_path / "file/deep/result.txt", "is or lies below a file, not a folder"),
        (tmp_path / "folder", "folder: a folder of this name is in the way; remove it or choose another name"),
        (tmp_path / ("n" * 300), "the name is too long; choose a shorter one"),
    ):
        with pytest.raises(InputError, match=message), written_aside(path) as aside:
            aside.write_text("new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 125 + "n.txt")
    with written_aside(path) as aside:
        aside.write_text("x")
    assert path.read_text() == "x"


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="no users here")
def test_a_folder_without_permission_is_named() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root writes everywhere
        try:
            message = rf"^{folder}: no permission to write into this folder; change its mode or choose another folder"
            with pytest.raises(InputError, match=message), written_aside(folder / "result.txt"):
                pass
        finally:
            os.seteuid(user)
            folder.chmod(0o700)


def test_names_are_shown_on_one_line() -> None:
    assert shown("dir/a é.png") == "dir/a é.png"
    assert shown(os.fsdecode(b"a\nb\x1b[31m\xff.png")) == "a\\nb\\x1b[31m\\xff.png"
    assert shown("no name of a file \ud800\n") == "no name of a file \\ud800\\n"
