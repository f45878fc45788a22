"""A folder is claimed by one process at a time, however many ask, and whatever becomes of its lock file."""

import errno
import fcntl
import multiprocessing
import os
import socket
import tempfile
import time
from pathlib import Path

import pytest

from fastmsflow import InputError, files
from fastmsflow.files import LOCK_FILE, Busy, claimed_folder, is_claimed, locked, write_json, written_aside
from tests.helpers.processes import CONTEXT

# Each process goes on for so long and until it had so many claims, which takes long on a busy machine.
PROCESSES, SECONDS, CLAIMS, MOST_SECONDS = 4, 2.0, 75, 60


def claim_in_a_loop(folder: Path, inside: Path, counts: "multiprocessing.Queue[tuple[int, int]]") -> None:
    """Tells how often ``folder`` was claimed, and how often another process was in it then."""
    claims = overlaps = 0
    start = time.monotonic()
    while (passed := time.monotonic() - start) < SECONDS or (claims < CLAIMS and passed < MOST_SECONDS):
        try:
            with claimed_folder(folder):
                claims += 1
                try:
                    os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    overlaps += 1
                else:
                    time.sleep(0)
                    inside.unlink(missing_ok=True)
        except Busy:
            pass
        time.sleep(0.0005)  # so that the others have their turns
    counts.put((claims, overlaps))


@pytest.mark.parametrize("stays", [True, False], ids=["a folder that stays", "a folder that goes again each time"])
def test_processes_that_claim_one_folder_in_a_loop_are_never_in_it_together(stays: bool, tmp_path: Path) -> None:
    folder = tmp_path / "claimed"
    if stays:
        folder.mkdir()
    counts: multiprocessing.Queue[tuple[int, int]] = CONTEXT.Queue()
    processes = [
        CONTEXT.Process(target=claim_in_a_loop, args=(folder, tmp_path / "inside", counts)) for _ in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    of_each = [counts.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert all(process.exitcode == 0 for process in processes)
    assert sum(overlaps for _, overlaps in of_each) == 0
    assert min(claims for claims, _ in of_each) >= CLAIMS


def hold(path: Path, holding: "multiprocessing.Queue[bool]", done: "multiprocessing.Queue[bool]") -> None:
    with locked(path) as is_ours:
        holding.put(is_ours)
        done.get()


def test_the_lock_file_stays_so_that_who_has_opened_it_locks_the_one_that_others_see(tmp_path: Path) -> None:
    (tmp_path / "result.txt").touch()
    with claimed_folder(tmp_path):
        before = (tmp_path / LOCK_FILE).stat()
    with claimed_folder(tmp_path):
        assert os.path.samestat((tmp_path / LOCK_FILE).stat(), before)
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK_FILE, "result.txt"]
    assert not is_claimed(tmp_path)


def test_a_folder_that_was_made_for_a_claim_and_stayed_empty_goes_again(tmp_path: Path) -> None:
    with claimed_folder(tmp_path / "new"):
        assert is_claimed(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with claimed_folder(tmp_path / "new"):
        (tmp_path / "new/result.txt").touch()
    assert (tmp_path / "new/result.txt").exists()
    (tmp_path / "mine").mkdir()
    with claimed_folder(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()


def test_a_lock_of_another_process_is_seen_and_is_free_when_that_ends(tmp_path: Path) -> None:
    path = tmp_path / LOCK_FILE
    holding: multiprocessing.Queue[bool] = CONTEXT.Queue()
    done: multiprocessing.Queue[bool] = CONTEXT.Queue()
    process = CONTEXT.Process(target=hold, args=(path, holding, done))
    process.start()
    assert holding.get(timeout=30)
    with locked(path) as is_ours:
        assert not is_ours
    assert is_claimed(tmp_path)
    with pytest.raises(Busy, match="another process is writing there"), claimed_folder(tmp_path):
        pass
    done.put(True)
    process.join()
    assert not is_claimed(tmp_path)
    with locked(path) as is_ours:
        assert is_ours


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def _disk_without_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: int, operation: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("_disk_without_locks")
def test_on_a_disk_without_locks_a_file_stands_for_one(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    for _ in range(2):
        with claimed_folder(folder):
            with written_aside(folder / "result.txt") as aside:
                aside.write_text("1")
            assert is_claimed(folder)
            message = f"another process is writing there; .*if none is, remove {folder / '.lock-held'}"
            with pytest.raises(Busy, match=message), claimed_folder(folder):
                pass
        assert not is_claimed(folder)
    assert sorted(path.name for path in folder.iterdir()) == [LOCK_FILE, "result.txt"]


@pytest.mark.usefixtures("_disk_without_locks")
def test_on_a_disk_without_locks_a_process_killed_on_another_machine_leaves_a_file_that_the_message_names(
    tmp_path: Path,
) -> None:
    held = tmp_path / ".lock-held"
    with claimed_folder(tmp_path):
        content = held.read_bytes()
    held.write_bytes(content.replace(socket.gethostname().encode(), b"another-machine"))
    with pytest.raises(Busy, match=r"if none is, remove .*/\.lock-held"), claimed_folder(tmp_path):
        pass
    held.unlink()
    with claimed_folder(tmp_path):
        pass


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="no users here")
def test_a_lock_file_of_another_user_is_named_with_the_remedy() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        (folder / LOCK_FILE).touch(0o600)
        user = os.geteuid()
        if user:
            (folder / LOCK_FILE).chmod(0)
        else:
            os.seteuid(65534)  # root locks everything
        try:
            message = rf"^{folder / LOCK_FILE}: a lock file of another user; remove it if no process is at work there"
            with pytest.raises(InputError, match=message), claimed_folder(folder):
                pass
        finally:
            os.seteuid(user)


def die_while_writing(path: Path, names: tuple[str, ...]) -> None:
    with written_aside(path) as aside:
        for name in names:
            (aside.parent / name).parent.mkdir(exist_ok=True)
            (aside.parent / name).write_text("half")
        os._exit(9)


def run_to_its_death(path: Path, *names: str) -> None:
    process = CONTEXT.Process(target=die_while_writing, args=(path, names))
    process.start()
    process.join()
    assert process.exitcode == 9


def test_the_next_claim_removes_what_a_killed_process_was_writing_and_nothing_else(tmp_path: Path) -> None:
    foreign = (".tmpAb12Cd", ".notes.aside-2024", ".scores.aside-abcdefgh.csv", ".draft.aside/mine.txt", "x.aside/mine")
    for name in foreign:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/.lock").write_text("mine")
    (tmp_path / ".link.aside").symlink_to("elsewhere")
    run_to_its_death(tmp_path / "result.txt", "result.txt")
    assert (tmp_path / ".result.txt.aside/result.txt").read_text() == "half"
    with claimed_folder(tmp_path):
        pass
    assert not (tmp_path / ".result.txt.aside").exists()
    assert {(tmp_path / name).read_text() for name in (*foreign, "elsewhere/.lock")} == {"mine"}


def test_the_next_writer_of_a_file_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    run_to_its_death(tmp_path / "model.onnx", "model.onnx", ".tmpAb12Cd", "deep/weights.bin")
    assert (tmp_path / ".model.onnx.aside/deep/weights.bin").exists()
    with written_aside(tmp_path / "model.onnx") as aside:
        assert {path.name for path in aside.parent.iterdir()} == {LOCK_FILE}
        aside.write_text("whole")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"model.onnx": "whole"}


@pytest.mark.parametrize("kind", ["folder", "link", "file"])
def test_what_somebody_put_in_the_way_of_a_temporary_folder_is_named_and_stays(kind: str, tmp_path: Path) -> None:
    in_the_way, elsewhere = tmp_path / ".a.txt.aside", tmp_path / "elsewhere"
    for folder in (elsewhere, *([in_the_way] if kind == "folder" else [])):
        folder.mkdir()
        (folder / "a.txt").write_text("mine")
    if kind == "link":
        in_the_way.symlink_to(elsewhere)
    elif kind == "file":
        in_the_way.write_text("mine")
    with pytest.raises(InputError, match=r"\.a\.txt\.aside: is in the way of writing a\.txt; move it elsewhere"):
        write_json(tmp_path / "a.txt", "new")
    assert {path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == {"mine"}


def write_slowly(path: Path, writing: "multiprocessing.Queue[bool]", done: "multiprocessing.Queue[bool]") -> None:
    with written_aside(path) as aside:
        writing.put(True)
        aside.write_text("first")
        done.get()


def test_two_processes_do_not_write_one_file_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "WAIT_SECONDS", 0.2)
    writing: multiprocessing.Queue[bool] = CONTEXT.Queue()
    done: multiprocessing.Queue[bool] = CONTEXT.Queue()
    process = CONTEXT.Process(target=write_slowly, args=(tmp_path / "a.txt", writing, done))
    process.start()
    writing.get(timeout=30)
    with pytest.raises(Busy, match=r"a\.txt: another process is writing this file; wait for it, or choose another"):
        write_json(tmp_path / "a.txt", "second")
    done.put(True)
    process.join()
    assert (tmp_path / "a.txt").read_text() == "first"
    write_json(tmp_path / "a.txt", "second")
    assert (tmp_path / "a.txt").read_text() == '"second"\n'


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="has no /proc")
def test_a_place_where_no_folder_can_be_made_is_not_called_busy() -> None:
    with (
        pytest.raises(InputError, match="no file or folder can be made there") as caught,
        claimed_folder(Path("/proc/x")),
    ):
        pass
    assert not isinstance(caught.value, Busy)


def test_a_folder_that_others_remove_and_make_again_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, refusals = Path.mkdir, [FileExistsError(17, "File exists")]

    def made_by_another(self: Path, *arguments: object, **options: object) -> None:
        make(self, parents=True, exist_ok=True)
        if refusals:
            raise refusals.pop()

    monkeypatch.setattr(Path, "mkdir", made_by_another)
    with locked(tmp_path / "folder" / "lock") as is_ours:
        assert is_ours
    assert not refusals
