"""The two files of an OpenVINO model appear together or not at all; no .xml is ever beside another one's weights."""

import os
import sys
from pathlib import Path

import pytest

from fastmsflow import InputError, UnavailableError
from fastmsflow.inference.openvino_files import ir_written_aside
from tests.helpers.disks import small_disk


def write(path: Path, text: str) -> None:
    with ir_written_aside(path) as aside:
        aside.write_text(text)
        aside.with_suffix(".bin").write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def test_a_pair_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    for text in ("old", "new"):
        write(tmp_path / "m.xml", text)
        assert contents(tmp_path) == {"m.xml": text, "m.bin": text}
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("moves", [0, 1, 2])
def test_a_killed_process_leaves_a_whole_pair_or_no_xml(moves: int, tmp_path: Path) -> None:
    write(tmp_path / "m.xml", "old")
    child = os.fork()
    if child == 0:
        move, count = Path.replace, iter(range(9))

        def killed(path: Path, target: Path) -> Path:
            return move(path, target) if next(count) < moves else os._exit(9)

        Path.replace = killed
        write(tmp_path / "m.xml", "new")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    expected = [{"m.xml": "old", "m.bin": "old"}, {"m.bin": "old"}, {"m.bin": "new"}][moves]
    assert contents(tmp_path) == expected
    if moves == 0:
        write(tmp_path / "m.xml", "newer")
        assert contents(tmp_path) == {"m.xml": "newer", "m.bin": "newer"}


def test_weights_that_cannot_be_moved_leave_the_earlier_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "m.xml", "old")
    move = Path.replace

    def refused(path: Path, target: Path) -> Path:
        if path.suffix == ".bin":
            raise PermissionError(13, "Permission denied", str(target))
        return move(path, target)

    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(InputError, match=r"m\.xml: no permission to replace this file"):
        write(tmp_path / "m.xml", "new")
    assert contents(tmp_path) == {"m.xml": "old", "m.bin": "old"}
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["m.xml", "m.bin"])
def test_a_folder_in_the_way_is_told_and_stays(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=rf"{name}: a folder of this name is in the way; remove it or choose another"):
        write(tmp_path / "m.xml", "new")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_weights_of_something_else_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_text("of something else")
    with pytest.raises(InputError, match=r"m\.bin: is in the way, and there is no m\.xml beside it; move it elsewhere"):
        write(tmp_path / "m.xml", "new")
    assert contents(tmp_path) == {"m.bin": "of something else"}


def test_a_refusal_of_the_block_leaves_the_earlier_pair(tmp_path: Path) -> None:
    write(tmp_path / "m.xml", "old")
    with pytest.raises(UnavailableError, match=r"^not as good$"), ir_written_aside(tmp_path / "m.xml") as aside:
        aside.write_text("new")
        aside.with_suffix(".bin").write_text("new")
        raise UnavailableError("not as good")
    assert contents(tmp_path) == {"m.xml": "old", "m.bin": "old"}


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_writer_in_cpp_that_does_not_say_why_it_fails_is_found_out(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        with (
            pytest.raises(InputError, match=r"m\.xml: cannot be written, the disk is full; free some space or choose"),
            ir_written_aside(disk / "m.xml"),
        ):
            raise RuntimeError("basic_ios::clear: iostream error")
        assert list(disk.iterdir()) == []
    with pytest.raises(RuntimeError, match=r"^of something else$"), ir_written_aside(tmp_path / "m.xml"):
        raise RuntimeError("of something else")
