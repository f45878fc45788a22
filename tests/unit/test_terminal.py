"""Text of others reaches the terminal in printable characters, by whatever way, and JSON keeps names as they are."""

import csv
import json
import os
import pty
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, cast

import pytest
from PIL import Image
from rich.table import Table
from rich.text import Text

from fastmsflow.__main__ import main
from fastmsflow.cli.output import print_error, print_line
from fastmsflow.errors import InputError, in_one_line
from fastmsflow.files import write_table
from fastmsflow.progress import progress_bar
from fastmsflow.terminal import Console, printable_streams
from fastmsflow.visualization.markdown_table import write_markdown_table
from tests.helpers.tiny_model import tiny_model

# One of each kind: colors, title, cursor, clearing, carriage return, backspace, the 8-bit introducer, a bell, writing
# direction, separators of lines, what joins and what is invisible, and bytes that are not UTF-8.
HOSTILE = (
    "\x1b[31m", "\x1b]0;title\a", "\x1b[2A\x1b[2K", "\x1bc", "good\rbad", "bad\b\b\b", "\x9b31m", "\a", "\u202egnp",
    "\u2066x\u2069", "a\u2028b", "a\x85b", "a\u200bb", "\udcff", "\x7f", "a\nb", "\x1b]8;;http://x\x1b\\x", "a\tb",
)  # fmt: skip
VERBS = ("train", "evaluate", "calibrate", "predict", "convert", "verify", "export", "shard", "benchmark", "demo")


def is_plain(text: str) -> bool:
    return all(c.isprintable() for c in text.replace("\r\n", "\n").replace("\n", ""))


class Terminal:
    """A standard stream that is a terminal."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


@contextmanager
def on_a_terminal() -> Iterator[Terminal]:
    """Yields what stands for both standard streams in the block."""
    stream = cast(Any, Terminal())
    with redirect_stdout(stream), redirect_stderr(stream), pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", "200")
        patch.delenv("NO_COLOR", raising=False)
        yield stream


@pytest.mark.parametrize("name", HOSTILE)
def test_lines_errors_tables_and_texts_are_plain(name: str) -> None:
    with on_a_terminal() as terminal:
        console = Console()
        print_line(f"{name} x", where=console)
        table = Table(show_header=False, box=None)
        table.add_row(f"in a cell {name}", Text(name))
        console.print(table)
        print_error("skipped", name)
    assert "in a cell" in terminal.text
    assert "skipped" in terminal.text
    assert is_plain(terminal.text)


@pytest.mark.parametrize("name", HOSTILE)
def test_the_label_of_a_progress_bar_is_plain_and_no_markup(name: str) -> None:
    with on_a_terminal() as terminal, progress_bar(f"{name}[/x] :x:", 2, console=Console()) as bar:
        bar.stage(f"{name}[/x] :x:", 2, 1)
    assert name not in terminal.text
    assert "[/x] :x:" in terminal.text


def test_a_progress_bar_keeps_its_colors_and_prints_of_others_are_plain() -> None:
    with on_a_terminal() as terminal, printable_streams(), progress_bar("scoring", 2, console=Console()) as bar:
        print("foreign \x1bc\x1b]0;title\a")
        bar(2)
    assert "\\x1b[" not in terminal.text
    assert "\x1b[" in terminal.text
    assert "\x1bc" not in terminal.text
    assert "\x1b]" not in terminal.text
    assert "foreign" in terminal.text


@pytest.mark.parametrize("name", HOSTILE)
def test_warnings_tracebacks_and_plain_prints_are_plain(name: str) -> None:
    with on_a_terminal() as terminal, printable_streams():
        sys.stderr.write(warnings.formatwarning(name, UserWarning, "x.py", 1))
        print(f"x {name}")
        sys.stderr.writelines([f"x {name}\n"])
    assert is_plain(terminal.text.replace("\t", ""))
    assert terminal.text.count("x ") >= 2


@pytest.mark.parametrize("name", HOSTILE)
def test_an_unexpected_error_ends_the_program_with_a_plain_traceback(name: str, monkeypatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError(name)

    monkeypatch.setattr("fastmsflow.cli.app", fail)
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    with pytest.raises(ZeroDivisionError) as caught:
        main()
    with on_a_terminal() as terminal:
        sys.excepthook(caught.type, caught.value, caught.tb)
    assert "ZeroDivisionError" in terminal.text
    assert is_plain(terminal.text.replace("\t", ""))


def test_styles_and_progress_bars_of_libraries_are_left() -> None:
    with on_a_terminal() as terminal, printable_streams():
        Console().print("[red]x[/red]")
        sys.stderr.write("\r 50%")
    assert terminal.text == "\x1b[31mx\x1b[0m\n\r 50%"


def test_the_streams_are_as_before_after_the_command_line(capsys, monkeypatch) -> None:
    before = sys.stdout, sys.stderr
    monkeypatch.setattr(sys, "argv", ["fastmsflow", "predict", "\x1b[31m", "x"])
    with pytest.raises(SystemExit) as end:
        main()
    assert (sys.stdout, sys.stderr) == before
    assert str(end.value.code).startswith(r"fastmsflow: \x1b[31m: no such file")


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", [name for name in HOSTILE if name != "\udcff"])
def test_a_verb_names_hostile_files_options_and_keys_on_plain_lines(
    verb: str, name: str, command, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({name: 1}))
    for words in ([name, name, "--out", f"{name}/out"], [f"--{name}", name], ["x", "x", "--config", config]):
        code, out = command(verb, *words)
        assert code != 0
        assert is_plain(out)


def test_an_error_whose_name_has_several_lines_is_one_line() -> None:
    assert in_one_line(InputError("a\nb\u2028c: no such file")) == r"a\nb\u2028c: no such file"


@pytest.fixture(scope="module")
def hostile_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "\x1b[31m\u202e"
    folder.mkdir()
    for i, name in enumerate(HOSTILE):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(folder / f"{name.replace('/', '')}.png")
    (folder / "\x1b[32m\u202ebad.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "\x1b[33mm.safetensors"
    tiny_model().save(path)
    return path


def test_predict_is_plain_in_a_pipe_and_its_json_has_the_names(
    hostile_folder: Path, checkpoint: Path, command, tmp_path: Path
) -> None:
    out = tmp_path / "\x1b[34m\u202eout"
    code, text = command("predict", checkpoint, hostile_folder, "--out", out, "--no-heat-maps")
    assert code == 1
    assert is_plain(text)
    code, text = command("predict", checkpoint, hostile_folder, "--out", out, "--no-heat-maps", "--json")
    start, end = text.index("{"), text.rindex("}") + 1
    assert json.loads(text[start:end])["scores"] == str(out / "scores.csv")


@pytest.mark.slow
def test_predict_is_plain_on_a_terminal(hostile_folder: Path, checkpoint: Path, python: Path, tmp_path: Path) -> None:
    main_end, program_end = pty.openpty()
    words = [python, "-m", "fastmsflow", "predict", checkpoint, hostile_folder, "--out", tmp_path, "--no-heat-maps"]
    environment = {**os.environ, "TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "200"}
    program = subprocess.Popen(words, stdout=program_end, stderr=program_end, env=environment)
    os.close(program_end)
    written = b""
    while True:
        try:
            chunk = os.read(main_end, 65536)
        except OSError:  # the program has ended
            break
        written += chunk
    assert program.wait() == 1
    text = written.decode()
    assert "bad.png" in text
    assert is_plain(text)


def test_a_table_in_markdown_keeps_names_in_their_cells(tmp_path: Path) -> None:
    write_markdown_table(
        tmp_path / "t.md", ("class",), [("a|b",), ("a\\|b",), ("a\nb",), ("<b>",)], title="t", notes=""
    )
    rows = (tmp_path / "t.md").read_text().splitlines()[4:]
    assert rows == [r"| a\|b |", r"| a\\\|b |", r"| a\\nb |", r"| \<b> |"]


def test_a_table_in_csv_reads_back_as_it_was(tmp_path: Path) -> None:
    import pandas as pd

    names = [*(name for name in HOSTILE if name.isascii()), "=1+1", "+1", "-1", "@x", "\t=1", "\r=1", '"', "a,b", "007"]
    write_table(tmp_path / "t.csv", ("image", "score", "threshold"), [(name, -1.5, None) for name in names])
    read = pd.read_csv(tmp_path / "t.csv", dtype={"image": str})
    assert read["image"].tolist() == names
    assert read["score"].tolist() == [-1.5] * len(names)
    assert read["threshold"].isna().all()


def test_the_table_of_predict_reads_back_as_it_was(tmp_path: Path) -> None:
    from fastmsflow.inference.sorted_table import SortedTable

    names = [*HOSTILE, "=1+1", "+1", "-1", "@x", "\t=1", "\r=1"]
    with closing(SortedTable(tmp_path / "rows.csv", ("image", "score"))) as rows:
        for i, name in enumerate(names):
            rows.add({"image": name, "score": -i}, rank=-i)
        rows.finish(tmp_path / "scores.csv")
    with (tmp_path / "scores.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert list(csv.reader(file)) == [["image", "score"], *([name, str(-i)] for i, name in enumerate(names))]
