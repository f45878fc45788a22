"""A folder is claimed by one process at a time, however many ask, and whatever becomes of its lock file."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from fastmsflow.files import LOCK_FILE, Busy, claimed_folder, is_claimed, locked
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
