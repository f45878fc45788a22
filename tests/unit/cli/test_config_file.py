"""Configuration files of strangers: they run nothing, fetch nothing, and fill no memory."""

import os
import re
from pathlib import Path

import pytest

from tests.helpers.web_servers import send, web_server


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "config.yaml"


def one_line(printed: str) -> str:
    lines = [line for line in printed.splitlines() if "loading" not in line]
    assert len(lines) == 1 and len(lines[0]) < 1500, printed[:3000]
    return lines[0]


PIPE = "'pipe:touch ran; cat {}'"
PLACES = {
    "source": ("train", "--out", "o"),
    "out": ("train", "g"),
    "start-from": ("train", "g", "--out", "o"),
    "extractor-weights": ("train", "g", "--out", "o"),
    "feature-cache": ("train", "g", "--out", "o"),
    "images": ("predict", "m.safetensors", "--out", "o", "--format", "parquet"),
    "cluster": ("predict", "m.safetensors", "g", "--out", "o", "--format", "parquet"),
    "checkpoint": ("verify",),
    "target": ("convert", "m.pt"),
}


@pytest.mark.parametrize("place", [PIPE, "' PIPE:touch ran'", "http://127.0.0.1:9/x", "file:///x", "'a::s3://b/c'"])
@pytest.mark.parametrize("key", PLACES)
def test_a_file_names_no_command_and_no_url(key: str, place: str, config: Path, command) -> None:
    verb, *rest = PLACES[key]
    config.write_text(f"{key}: {f'[{place}]' if key == 'images' else place}\n")
    code, printed = command(verb, *rest, "--config", config)
    assert code == 1
    assert "may name no commands and no URLs; give it on the command line" in one_line(printed)
    assert not Path("ran").exists() and not Path("o").exists()


def test_every_argument_of_every_verb_is_of_this_kind() -> None:
    """Places are refused by their form, so a new option needs no line anywhere."""
    from typer.main import get_command

    from fastmsflow.cli import app
    from fastmsflow.cli.config_file import ConfigurableCommand

    verbs = get_command(app).commands  # type: ignore[attr-defined]
    assert verbs and all(isinstance(verb, ConfigurableCommand) for verb in verbs.values())


def test_a_runs_own_file_serves_if_the_command_line_names_the_command_again(config: Path, command) -> None:
    """A run that was begun with a command or a URL is gone on with by giving that once more."""
    config.write_text(f"source: {PIPE}\nextractor: none_such\n")
    asked: list[str] = []

    def answer(request) -> None:
        asked.append(request.path)
        send(request, b"no", status=404)

    with web_server(answer) as url:
        code, printed = command("train", url, "--out", "o", "--config", config)
    assert code == 1 and asked and not Path("ran").exists()
    assert f"{url}/manifest.json: no such file" in printed


REFUSED = {
    "aliases": ("a: &a [x]\nb: [*a, *a]", "line 1: anchors and aliases are not taken"),
    "many aliases": ("a: &a [x, x]\n" + "\n".join(f"{c}: &{c} [*a, *a]" for c in "bcdefgh"), "anchors and aliases"),
    "a merge": ("<<: {source: x}", "values within values are not taken"),
    "a tag": ("source: !!python/object/apply:os.system ['touch ran']", "tags are not taken"),
    "a binary": ("source: !!binary aGVsbG8=", "tags are not taken"),
    "twice": ("image-size: 64\nimage-size: 32", "'image-size' is there twice; leave one out"),
    "two spellings": ("image-size: 64\nimage_size: 32", "'image_size' is another spelling"),
    "octal": ("image-size: 064", "YAML reads 064 as another number"),
    "a name of digits": ("class: 007", "YAML reads 007 as another number.*put it in quotes"),
    "sixties": ("image-size: 1:30", "YAML reads 1:30 as another number"),
    "sixties of a float": ("lr: 1:30.5", "YAML reads 1:30.5 as another number"),
    "hexadecimal": ("image-size: 0x40", "YAML reads 0x40 as another number"),
    "underscores": ("image-size: 6_4", "YAML reads 6_4 as another number"),
    "in a list": ("freeze: [level0, 010]", "YAML reads 010 as another number"),
    "a date": ("class: 2024-01-01", "YAML reads 2024-01-01 as another number, or as a date"),
    "no": ("class: no", "class is False: YAML reads this as true or false; put it in quotes"),
    "true": ("batch-size: true", "batch-size is True; it must be a whole number"),
    "text for a flag": ("standardise: maybe", "standardise is maybe: give true or false"),
    "a number for a flag": ("standardise: 1", "standardise is 1: give true or false"),
    "a list for a number": ("batch-size: [1, 2]", "give one value, not a list"),
    "a text for a list": ("freeze: level0", "freeze is level0: give a list"),
    "a text for a number": ("batch-size: big", "batch-size is big: .*integer"),
    "a size of a list of three": ("image-size: [64, 64, 64]", "image-size 64x64x64: give N or HxW"),
    "a size without a width": ("image-size: 64x", "image-size 64x: give N or HxW"),
    "a size of halves": ("image-size: 64.5", "image-size 64.5: give N or HxW"),
    "true for a size": ("image-size: true", "image-size True: give N or HxW"),
    "a size out of its range": ("image-size: [64, 16]", "image-size is 16; it must be a whole number, 32 to 65536"),
    "two layers": ("layers: [2, 5]", "layers 2,5: give three whole numbers"),
    "true for a layer": ("layers: [1, 2, true]", "layers 1,2,True: give three whole numbers"),
    "a mapping": ("source: {a: 1}", "values within values are not taken"),
    "a list of lists": ("freeze: [[level0]]", "values within values are not taken"),
    "nesting": ("source: " + "[" * 100_000, "values within values are not taken"),
    "nested mappings": ("{a: " * 100_000, "values within values are not taken"),
    "a mapping for a key": ("? {a: 1}\n: 2", "values within values"),
    "a list for a key": ("? [a]\n: 2", "no option's name"),
    "digits": ("image-size: " + "9" * 5000, "too large for any option|longer than"),
    "a huge number": ("image-size: " + "9" * 400, "too large for any option"),
    "a long text": (f"source: {'x' * 500_000}", "is longer than 4096 characters"),
    "a long key": (f"{'k' * 500_000}: 1", "not YAML|has no option"),
    "NUL": (r'source: "a\0b"', "control characters"),
    "an escape sequence": (r'source: "\e[31mred"', r"\\x1b\[31mred .*control characters"),
    "another encoding": ("source: x".encode("utf-16"), "not YAML .'utf-8' codec"),
    "Latin-1": (b"source: \xe4", "not YAML .'utf-8' codec"),
    "two documents": ("source: a\n---\nsource: b", "not YAML"),
    "a list of options": ("- a", "holds a list; give one 'option: value' a line"),
    "a word": ("a", "holds no options"),
    "megabytes": (" " * (2**20 + 1), "larger than 1 MiB"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_file_of_options_is_one_line(kind: str, config: Path, command) -> None:
    content, message = REFUSED[kind]
    config.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, printed = command("train", "g", "--out", "o", "--config", config)
    assert code == 1
    line = one_line(printed)
    assert line.startswith(f"fastmsflow: {config}: ")
    assert re.search(message, line), line
    assert not Path("o").exists() and not Path("ran").exists()


def test_a_file_without_end_is_refused(config: Path, command) -> None:
    code, printed = command("train", "g", "--out", "o", "--config", "/dev/zero")
    assert (code, one_line(printed)) == (1, "fastmsflow: /dev/zero: a pipe or a device, not a file; save it as a file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs os.mkfifo")
def test_a_pipe_that_nothing_writes_into_is_not_waited_for(config: Path, command) -> None:
    os.mkfifo(config)
    code, printed = command("train", "g", "--out", "o", "--config", config)
    assert (code, one_line(printed)) == (1, f"fastmsflow: {config}: a pipe or a device, not a file; save it as a file")


@pytest.mark.parametrize("text", ["'007'", '"1:30"', "'no'"])
def test_what_stands_in_quotes_is_text(text: str, config: Path, command, tmp_path: Path) -> None:
    (tmp_path / "g").mkdir()
    config.write_text(f"class: {text}\nlr: 1e-3\nhold-out: 0.25\nstandardise: true\nfreeze: [level0]\n")
    code, printed = command("train", "g", "--out", "o", "--config", config)
    assert code == 1 and f"no class {text[1:-1]!r}" in printed
