"""The index of large folders: it saves listing them, and never changes what is listed."""

import os
import shutil
import time
from pathlib import Path

import pytest

from fastmsflow.data import file_search, index, list_images


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(file_search, "INDEXED_FROM", 10)
    return tmp_path / "cache/fastmsflow/folders"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """4 folders of 5 images, one in another, all of them older than a clock's tick."""
    root = tmp_path / "tree"
    for folder in ("a", "b", "b/c", "d d"):
        (root / folder).mkdir(parents=True)
        for i in range(5):
            (root / folder / f"{i}.png").touch()
        (root / folder / "notes.txt").touch()
    settle(root)
    return root


def settle(root: Path) -> None:
    for folder in (root, *(path for path in root.rglob("*") if path.is_dir())):
        os.utime(folder, ns=(0, folder.stat().st_mtime_ns - index.TICK - 10**9))


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that are listed."""
    names: list[str] = []
    scan = index._scan

    def noting(path: str, status: os.stat_result):
        names.append(Path(path).name)
        return scan(path, status)

    monkeypatch.setattr(index, "_scan", noting)
    return names


def plainly(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*.png") if not path.name.startswith("."))


def test_an_unchanged_tree_is_not_listed_again(tree: Path, scanned: list[str]) -> None:
    first = list_images(tree)
    scanned.clear()
    assert list_images(tree) == first == plainly(tree)
    assert scanned == []


def test_a_small_folder_leaves_no_index(tree: Path, cache: Path) -> None:
    list_images(tree / "a")
    assert not cache.exists()


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "new folder", "folder removed", "folder moved"])
def test_a_change_is_seen_and_only_that_folder_listed(change: str, tree: Path, scanned: list[str]) -> None:
    list_images(tree)
    scanned.clear()
    if change == "added":
        (tree / "b/c/new.png").touch()
    elif change == "removed":
        (tree / "b/c/3.png").unlink()
    elif change == "renamed":
        (tree / "b/c/3.png").rename(tree / "b/c/x.png")
    elif change == "new folder":
        (tree / "b/c/e").mkdir()
        (tree / "b/c/e/1.png").touch()
    elif change == "folder removed":
        shutil.rmtree(tree / "b/c")
    else:
        (tree / "b/c").rename(tree / "b/f")
    expected = {"new folder": {"c", "e"}, "folder removed": {"b"}, "folder moved": {"b", "f"}}.get(change, {"c"})
    assert list_images(tree) == plainly(tree)
    assert set(scanned) == expected


def test_a_folder_that_changed_a_moment_ago_is_not_trusted(tree: Path) -> None:
    """Its clock may not have ticked between listing it and the next file."""
    now = time.time_ns()
    os.utime(tree / "a", ns=(now, now))
    list_images(tree)
    (tree / "a/new.png").touch()
    os.utime(tree / "a", ns=(now, now))
    assert tree / "a/new.png" in list_images(tree)


def test_a_link_that_leads_elsewhere_now_is_seen(tree: Path, tmp_path: Path) -> None:
    (tree / "a/link").symlink_to(tmp_path / "later")
    settle(tree)
    before = list_images(tree)
    (tmp_path / "later").mkdir()
    (tmp_path / "later/1.png").touch()
    assert set(list_images(tree)) - set(before) == {tree / "a/link/1.png"}


def test_two_links_to_a_folder_give_it_once_with_and_without_an_index(tree: Path, monkeypatch) -> None:
    (tree / "z").symlink_to(tree / "b/c")
    (tree / "0").symlink_to(tree / "b/c")
    settle(tree)
    indexed = [list_images(tree) for _ in range(2)]
    monkeypatch.setattr(file_search.FolderIndex, "of", lambda *args, **options: None)
    assert indexed == [list_images(tree)] * 2
    assert len(indexed[0]) == 20


def test_names_of_every_kind_come_back_as_they_were(tree: Path) -> None:
    for name in ("new\nline.png", os.fsdecode(b"\xff.png"), "é.png", "a;'b.png", ".hidden.png"):
        (tree / "a" / name).touch()
    settle(tree)
    assert list_images(tree) == list_images(tree) == plainly(tree)


@pytest.mark.parametrize(
    "content", [b"", b"no database", b"SQLite format 3\0" + bytes(4000)], ids=["0", "text", "half"]
)
def test_a_damaged_index_costs_its_use_only(content: bytes, tree: Path, cache: Path, scanned: list[str]) -> None:
    list_images(tree)
    (file,) = cache.iterdir()
    file.write_bytes(content)
    assert list_images(tree) == plainly(tree)
    scanned.clear()
    assert list_images(tree) == plainly(tree)
    assert scanned == [], "it was not made anew"


def test_a_cache_that_cannot_be_written_costs_its_use_only(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tree / "a/notes.txt"))
    assert list_images(tree) == plainly(tree)


def test_an_index_that_another_process_holds_costs_its_use_only(tree: Path, cache: Path) -> None:
    list_images(tree)
    (file,) = cache.iterdir()
    other = index.sqlite3.connect(file)
    other.execute("BEGIN EXCLUSIVE")
    (tree / "a/new.png").touch()
    assert list_images(tree) == plainly(tree)
    other.close()
