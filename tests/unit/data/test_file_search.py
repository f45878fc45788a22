"""Files, folders, patterns and names on standard input lead to images."""

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastmsflow import InputError
from fastmsflow.data.file_search import find_images, list_images
from tests.helpers.paths import ROOT

FRAMES = 1000
"""Python's own limit of calls within calls."""


def found(*names: object, stdin: bytes = b"", null: bool = False) -> tuple[list[str], list[str]]:
    sources = find_images([str(name) for name in names], io.BytesIO(stdin), null)
    return [str(file) for file in sources.files], sources.faults


@pytest.fixture
def tree(tmp_path: Path, monkeypatch) -> Path:
    for name in ("1.png", "2.jpg", "day/3.png", "day/deep/4.png", "part[1].png", "part1.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_files_folders_and_patterns_are_found_each_once(tree: Path) -> None:
    assert found("1.png", ".") == (["1.png", "2.jpg", "day/3.png", "day/deep/4.png", "part1.png", "part[1].png"], [])
    assert found("*.png", "2.jpg")[0] == ["1.png", "part1.png", "part[1].png", "2.jpg"]
    assert found("**/*.png")[0] == ["1.png", "day/3.png", "day/deep/4.png", "part1.png", "part[1].png"]
    assert found(f"{tree}/d*")[0] == [f"{tree}/day/3.png", f"{tree}/day/deep/4.png"]
    assert found("part[1].png")[0] == ["part[1].png"]  # a file of that name comes before the pattern
    assert found("notes.txt")[0] == ["notes.txt"]  # what is named is tried


def test_names_on_standard_input_are_taken_as_they_are(tree: Path) -> None:
    assert found("-", stdin=b"1.png\r\n\nday\n*.png\n") == (["1.png", "day/3.png", "day/deep/4.png", "*.png"], [])
    assert found("-", stdin=b"1.png\0a\nb.png\0", null=True)[0] == ["1.png", "a\nb.png"]
    assert found("1.png", "-", stdin=b"") == (["1.png"], ["standard input: holds no names; list one a line"])
    with pytest.raises(InputError, match="--null is for names on standard input"):
        found("1.png", null=True)


def test_names_that_lead_to_nothing_are_faults(tree: Path) -> None:
    (tree / "empty").mkdir()
    files, faults = found("1.png", "*.bmp", "empty")
    assert files == ["1.png"]
    assert faults[0] == "*.bmp: no file matches this pattern"
    assert faults[1].startswith("empty: holds no images (")
    with pytest.raises(InputError, match="no file matches this pattern"):
        found("*.bmp")


def test_a_link_that_leads_nowhere_costs_no_other_image(tree: Path) -> None:
    (tree / "day/circle").symlink_to("circle")
    (tree / "day/gone").symlink_to("nothing")
    (tree / "day/circle.png").symlink_to("circle.png")
    names = ["day/3.png", "day/circle.png", "day/deep/4.png"]
    assert found("day") == (names, [])
    assert list_images("day") == [Path(name) for name in names]


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root may follow any link")
def test_a_link_to_a_folder_that_may_not_be_read_is_a_fault(tree: Path) -> None:
    (tree / "secret/inner").mkdir(parents=True)
    (tree / "day/inner").symlink_to(tree / "secret/inner")
    (tree / "secret").chmod(0)
    code = "import io; from fastmsflow.data.file_search import find_images;"
    code += "found = find_images(['day'], io.BytesIO(b'')); print(list(map(str, found.files)), found.faults)"
    command = [sys.executable, "-c", code]
    if os.geteuid() == 0:
        command = ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all", *command]
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
    finally:
        (tree / "secret").chmod(0o755)
    fault = "day/inner: this folder cannot be read (Permission denied); change its mode or leave it out"
    assert run.stdout == f"{['day/3.png', 'day/deep/4.png']} {[fault]}\n"


def test_images_are_found_below_more_folders_than_python_has_frames(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(FRAMES + 100):
        Path("d").mkdir()
        os.chdir("d")
    Path("1.png").touch()
    monkeypatch.chdir(tmp_path)
    # Some packages raise it, and a path may not be as long as that.
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(FRAMES)
    try:
        assert [path.name for path in list_images(tmp_path)] == ["1.png"]
    finally:
        sys.setrecursionlimit(limit)
    # Python's own removal calls itself, too.
    subprocess.run(["rm", "-r", "d"], check=True)
