"""A disk that fills up while a file is written costs one line and no earlier file, whichever library writes it."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastmsflow import InputError, MSFlow
from fastmsflow.compat import save_official
from fastmsflow.files import checked_file, write_json, written_aside
from fastmsflow.integrations.export import export_onnx, export_program
from tests.helpers.disks import small_disk
from tests.helpers.tiny_model import tiny_model
from tests.helpers.traced_once import traced_once

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")

WRITERS: dict[str, tuple[str, Callable[[MSFlow, Path], object]]] = {
    "checkpoint": ("o.safetensors", lambda model, path: model.save(path)),
    "official checkpoint": ("o.pt", lambda model, path: save_official(model.flow, path)),
    "torch.export program": ("o.pt2", export_program),
    "ONNX": ("o.onnx", export_onnx),
}


@pytest.fixture(scope="module")
def model() -> Iterator[MSFlow]:
    with traced_once():
        yield tiny_model().eval()


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_that_does_not_fit_is_told_in_one_line_and_the_earlier_one_stays(
    writer: str, model: MSFlow, tmp_path: Path
) -> None:
    name, write = WRITERS[writer]
    with small_disk(tmp_path / "disk", "200k") as disk:
        (disk / name).write_text("earlier")
        with pytest.raises(
            InputError, match=rf"{name}: cannot be written, the disk is full; free some space"
        ) as caught:
            write(model, disk / name)
        assert len(str(caught.value).splitlines()) == 1
        assert {path.name: path.read_text() for path in disk.iterdir()} == {name: "earlier"}
    write(model, tmp_path / name)
    assert [path.name for path in tmp_path.glob("*o.*")] == [name]


@pytest.mark.parametrize("verb", ["convert", "export"])
def test_a_verb_ends_with_one_line(verb: str, model: MSFlow, command, tmp_path: Path) -> None:
    model.save(tmp_path / "m.safetensors")
    with small_disk(tmp_path / "disk", "200k") as disk:
        target = disk / {"convert": "o.pt", "export": "o.pt2"}[verb]
        code, said = command(verb, tmp_path / "m.safetensors", target)
        assert code == 1
        assert said.endswith(f"{target}: cannot be written, the disk is full; free some space or choose another folder")
        assert len(said.splitlines()) == 1
        assert not list(disk.iterdir())


def test_a_file_that_is_written_aside_twice_over_is_named_by_the_name_that_was_asked_for(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "16k") as disk:
        with pytest.raises(InputError, match=rf"^{disk}/a\.json: cannot be written, the disk is full"), \
                written_aside(disk / "a.json") as aside:  # fmt: skip
            write_json(aside, ["x"] * 10000)
        assert not list(disk.iterdir())


def test_a_writer_that_cannot_take_an_error_is_told_none_and_the_error_comes_in_the_end(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "16k") as disk:
        written = []
        with (
            pytest.raises(InputError, match="the disk is full"),
            written_aside(disk / "a.bin") as aside,
            checked_file(aside) as file,
        ):
            for _ in range(10):
                written.append(file.write(b"x" * 4096))
        assert written == [4096] * 10
        assert not list(disk.iterdir())
    with checked_file(tmp_path / "b.bin") as file:
        file.write(b"whole")
    assert (tmp_path / "b.bin").read_bytes() == b"whole"
