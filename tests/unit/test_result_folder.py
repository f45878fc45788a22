"""Results in a folder are replaced all at once, whatever happens meanwhile, and nobody else's files are touched."""

import errno
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastmsflow import InputError
from fastmsflow.errors import InputWarning
from fastmsflow.files import Busy
from fastmsflow.owned_files import owned_files, record_files
from fastmsflow.result_folder import claimed_results
from tests.helpers.folder_listing import names_in
from tests.helpers.processes import CONTEXT

# The table is the last of each.
A = {"1_heatmap.png": "A1", "2_heatmap.png": "A2", "old_heatmap.png": "A3", "scores.csv": "A: 1, 2, old"}
B = {"1_heatmap.png": "B1", "2_heatmap.png": "B2", "new_heatmap.png": "B3", "scores.csv": "B: 1, 2, new"}


def replace(out: Path, files: dict[str, str], verb: str = "predict") -> None:
    with claimed_results(out, verb) as results:
        results.begin(list(files))
        for name, content in files.items():
            (results.unfinished / name).write_text(content)
        results.finish()


def content(out: Path) -> dict[str, str]:
    return {
        path.relative_to(out).as_posix(): path.read_text()
        for path in out.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def test_new_results_take_the_place_of_all_earlier_ones_of_the_same_verb(tmp_path: Path) -> None:
    replace(tmp_path, {"metrics.json": "of evaluate"}, "evaluate")
    (tmp_path / "mine.png").write_text("mine")
    replace(tmp_path, A)
    replace(tmp_path, B)
    assert content(tmp_path) == {**B, "mine.png": "mine", "metrics.json": "of evaluate"}
    assert owned_files(tmp_path) == {*B, "metrics.json"}
    assert owned_files(tmp_path, "evaluate") == {"metrics.json"}


def test_results_lie_in_folders_too_and_empty_ones_go(tmp_path: Path) -> None:
    replace(tmp_path, {"brick/scores.csv": "1", "wood/scores.csv": "2", "metrics.json": "3"})
    (tmp_path / "wood/mine.txt").write_text("mine")
    new = {"grass/scores.csv": "4", "metrics.json": "5"}
    replace(tmp_path, new)
    assert content(tmp_path) == {**new, "wood/mine.txt": "mine"}
    assert names_in(tmp_path) == {"grass", "wood", "metrics.json"}


def killed_at(number: int, out: Path, files: dict[str, str] = B, verb: str = "predict") -> None:
    """Replaces A by ``files`` and is killed before the operation of this number that changes the disk."""
    operations = iter(range(1000))

    def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            if next(operations) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **options)

        return run

    for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    replace(out, files, verb)


def is_killed(number: int, out: Path, *what: Any) -> bool:
    """Runs ``killed_at`` in a process of its own; tells whether it was killed before it was done."""
    process = os.fork()
    if not process:
        try:
            killed_at(number, out, *what)
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    assert not status or os.WTERMSIG(status) == signal.SIGKILL
    return bool(status)


def test_a_kill_at_any_moment_leaves_no_table_beside_pictures_of_another_and_the_next_call_finishes(
    tmp_path: Path,
) -> None:
    for number in range(1000):
        out = tmp_path / str(number)
        replace(out, A)
        if not is_killed(number, out):
            break
        left = {name: text for name, text in content(out).items() if "/" not in name}
        assert "scores.csv" not in left or left in (A, B), number
        # The next call finishes before it begins, if the new results were whole.
        with claimed_results(out, "predict"):
            assert {name: text for name, text in content(out).items() if "/" not in name} in (A, B), number
        replace(out, B | {"last_heatmap.png": ""})
        assert content(out) == B | {"last_heatmap.png": ""}, number
        assert names_in(out) == {*B, "last_heatmap.png"}, number
    assert number > 20, "the process was not killed at many moments"


def test_a_verb_that_is_killed_at_any_moment_loses_nothing_of_another_verb_which_comes_next(tmp_path: Path) -> None:
    first, second = {"metrics.json": "1", "report.html": "1"}, {"metrics.json": "2", "report.html": "2"}
    for number in range(1000):
        out = tmp_path / str(number)
        replace(out, A)
        replace(out, first, "evaluate")
        if not is_killed(number, out, second, "evaluate"):
            break
        with pytest.raises(KeyError), claimed_results(out, "predict"):
            raise KeyError
        left = {name: text for name, text in content(out).items() if "/" not in name}
        assert left in ({**A, **first}, {**A, **second}), number
    assert number > 20, "the process was not killed at many moments"


def test_a_record_that_stayed_beside_a_note_is_of_the_next_verb_alone(tmp_path: Path) -> None:
    with pytest.raises(KeyError), claimed_results(tmp_path, "evaluate") as results:
        results.begin(["metrics.json"])
        (results.unfinished / "metrics.json").write_text("1")
        raise KeyError
    (tmp_path / "unfinished/note.txt").write_text("mine")
    with pytest.warns(InputWarning, match="stay as they are"), pytest.raises(KeyError), \
            claimed_results(tmp_path, "predict") as results:  # fmt: skip
        results.begin(list(A))
        (results.unfinished / "1_heatmap.png").write_text("A1")
        (results.unfinished / "metrics.json").write_text("mine")
        raise KeyError
    assert owned_files(tmp_path / "unfinished") == {"1_heatmap.png"}


@pytest.mark.parametrize("number", range(9))
def test_a_move_that_fails_leaves_the_earlier_results_as_they_were(number: int, tmp_path: Path, monkeypatch) -> None:
    replace(tmp_path, A)
    rename, moves = Path.rename, iter(range(1000))

    def move(source: Path, target: Path) -> Path:
        if next(moves) == number:
            raise OSError(errno.ENOSPC, "full")
        return rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(InputError, match="the disk is full"):
        patch.setattr(Path, "rename", move)
        replace(tmp_path, B)
    assert {name: text for name, text in content(tmp_path).items() if "/" not in name} == A
    assert {path.name: path.read_text() for path in (tmp_path / "unfinished").glob("[!.]*")} == B
    replace(tmp_path, B)
    assert content(tmp_path) == B
    assert names_in(tmp_path) == set(B)


def test_ctrl_c_while_files_are_moved_waits_until_all_are(tmp_path: Path, monkeypatch) -> None:
    replace(tmp_path, A)
    rename = Path.rename

    def move(source: Path, target: Path) -> Path:
        os.kill(os.getpid(), signal.SIGINT)
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", move)
    replace(tmp_path, B)
    assert content(tmp_path) == B


def test_a_failure_before_the_end_leaves_earlier_results_and_what_was_written(tmp_path: Path) -> None:
    replace(tmp_path, A)
    with pytest.raises(KeyError), claimed_results(tmp_path, "predict") as results:
        results.begin(list(B))
        (results.unfinished / "1_heatmap.png").write_text("B1")
        raise KeyError
    assert content(tmp_path) == {**A, "unfinished/1_heatmap.png": "B1"}
    with pytest.raises(KeyError), claimed_results(tmp_path, "predict") as results:
        results.begin(list(B))
        raise KeyError
    assert content(tmp_path) == A
    assert names_in(tmp_path) == set(A)


# Files of somebody else


@pytest.mark.parametrize("name", ["scores.csv", "1_heatmap.png"])
def test_a_file_of_somebody_else_is_not_replaced(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=rf"{name}: is in the way, and `predict` has not written it"):
        replace(tmp_path, A)
    assert content(tmp_path) == {name: "mine"}


def test_a_result_that_somebody_changed_is_not_replaced(tmp_path: Path) -> None:
    replace(tmp_path, A)
    (tmp_path / "scores.csv").write_text("sorted and annotated by hand")
    with pytest.raises(InputError, match=r"scores\.csv: is in the way, and .* or it was changed since; move it"):
        replace(tmp_path, B)
    assert content(tmp_path) == {**A, "scores.csv": "sorted and annotated by hand"}


def test_a_file_of_another_verb_is_not_replaced(tmp_path: Path) -> None:
    replace(tmp_path, {"scores.csv": "of a run"}, "train")
    with pytest.raises(InputError, match=r"scores\.csv: is in the way, and `predict` has not written it"):
        replace(tmp_path, A)
    assert content(tmp_path) == {"scores.csv": "of a run"}


@pytest.mark.parametrize("link", ["unfinished", "unfinished/.earlier", "unfinished/1_heatmap.png", "1_heatmap.png"])
def test_nothing_behind_a_link_is_changed(link: str, tmp_path: Path) -> None:
    out, home = tmp_path / "out", tmp_path / "home"
    home.mkdir()
    for name in (".bashrc", "scores.csv", "1_heatmap.png", ".fastmsflow.json", ".whole", ".moved", ".partial"):
        (home / name).write_text("mine")
    if link.startswith("unfinished/"):
        with pytest.raises(KeyError), claimed_results(out, "predict") as results:
            results.begin(list(A))
            (results.unfinished / "2_heatmap.png").write_text("A2")
            raise KeyError
    else:
        out.mkdir()
    (out / link).symlink_to(home if link != "1_heatmap.png" else home / link)
    with pytest.raises(InputError, match=r"is in the way"):
        replace(out, A)
    assert {path.read_text() for path in home.iterdir()} == {"mine"}
    assert len(list(home.iterdir())) == 7


@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_stands_in_the_place_of_a_class_s_folder_is_named_before_the_work_begins(
    kind: str, tmp_path: Path
) -> None:
    out, home = tmp_path / "out", tmp_path / "home"
    out.mkdir()
    home.mkdir()
    (out / "brick").symlink_to(home) if kind == "link" else (out / "brick").write_text("mine")
    with pytest.raises(InputError, match=r"brick: is in the way"), claimed_results(out, "evaluate") as results:
        results.begin(["brick/scores.csv", "metrics.json"])
    assert not list(home.iterdir())
    assert names_in(out) == {"brick"}


def test_a_folder_of_somebody_else_that_is_called_unfinished_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished/a_heatmap.png").write_text("mine")
    with pytest.raises(InputError, match="unfinished: is in the way, and `predict` has not written it"):
        replace(tmp_path, A)
    assert content(tmp_path) == {"unfinished/a_heatmap.png": "mine"}


def test_a_note_among_unfinished_results_stays_and_is_told(tmp_path: Path) -> None:
    with pytest.raises(KeyError), claimed_results(tmp_path, "predict") as results:
        results.begin(list(A))
        (results.unfinished / "1_heatmap.png").write_text("A1")
        raise KeyError
    (tmp_path / "unfinished/note.txt").write_text("mine")
    with pytest.warns(InputWarning, match="unfinished: 1 files or folders that this command has not written stay"):
        replace(tmp_path, A)
    assert content(tmp_path) == {**A, "unfinished/note.txt": "mine"}


def hold(out: Path, holding: "multiprocessing.Queue[bool]", done: "multiprocessing.Queue[bool]") -> None:
    with claimed_results(out, "predict"):
        holding.put(True)
        done.get()


def test_two_processes_do_not_write_into_one_folder(tmp_path: Path) -> None:
    holding: multiprocessing.Queue[bool] = CONTEXT.Queue()
    done: multiprocessing.Queue[bool] = CONTEXT.Queue()
    process = CONTEXT.Process(target=hold, args=(tmp_path, holding, done))
    process.start()
    holding.get(timeout=30)
    with pytest.raises(Busy, match=r"another process is writing there; .*it has locked .*/\.lock"):
        replace(tmp_path, A, "evaluate")
    done.put(True)
    process.join()
    replace(tmp_path, A)
    assert content(tmp_path) == A


@pytest.mark.parametrize("step", [".whole", ".moved"])
def test_a_stranger_s_half_done_results_write_and_remove_nothing_behind_a_link(step: str, tmp_path: Path) -> None:
    out, home = tmp_path / "out", tmp_path / "home"
    (out / "unfinished/brick").mkdir(parents=True)
    (home / ".mine.json.aside/deep").mkdir(parents=True)
    for path in (home / ".mine.json.aside/.lock", home / ".mine.json.aside/mine.json"):
        path.write_text("mine")
    (out / "unfinished/brick/config.json").write_text("evil")
    (out / "unfinished" / step).touch()
    record_files(out / "unfinished", "evaluate", {"brick/config.json": 4, "wood/a.json": 4, "wood/deep/a.json": 4})
    (out / "brick").symlink_to(home)
    (out / "unfinished/wood").symlink_to(home / ".mine.json.aside")
    before = sorted(home.rglob("*"))
    with pytest.raises(InputError, match="brick: is in the way"):
        replace(out, A)
    assert sorted(home.rglob("*")) == before
    (out / "unfinished/.moved").unlink()
    (out / "unfinished/wood").unlink()
    (out / "unfinished/wood").symlink_to(home)
    replace(out, A)
    assert sorted(home.rglob("*")) == before
