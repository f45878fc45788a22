"""A user without a home directory, as a container has for any number: nothing is cached, and all goes on."""

import getpass
import os
from pathlib import Path

import pytest

from fastmsflow import InputError
from fastmsflow.__main__ import _ensure_home
from fastmsflow.benchmarking.tile_search import save_table
from fastmsflow.data.layouts import textures
from fastmsflow.kernels import configs


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        # Set first, so that what a test's call sets is taken back.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_there_is_no_user_s_table_of_tiles(no_home: None) -> None:
    assert configs.user_table() is None
    assert configs.read_user_table() == {}
    with pytest.raises(InputError, match="no home directory for the table; set FASTMSFLOW_TABLE"):
        save_table({})


def test_textures_are_written_for_this_process(no_home: None) -> None:
    images = textures.textures("grass")
    assert images.train[0].image.is_file() and "fastmsflow-textures-" in str(images.train[0].image)


@pytest.mark.parametrize("home", [None, "/nowhere/at/all"])
def test_the_command_line_gives_libraries_a_home_and_a_name(
    home: str | None, no_home: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if home is not None:
        monkeypatch.setenv("HOME", home)
    _ensure_home()
    assert Path.home().is_dir() and os.access(Path.home(), os.W_OK)
    assert getpass.getuser() == "nobody"


def test_a_home_that_is_there_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    _ensure_home()
    assert Path.home() == tmp_path
