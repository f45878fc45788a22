"""Replaces the results of a verb in a folder by new ones, all at once.

New results are written into ``unfinished`` in that folder. Once they are whole they take the place of the earlier ones:

1. a file ``.whole`` in ``unfinished`` says so;
2. the earlier files are moved to ``unfinished/.earlier``, the one that readers begin with first; the file is renamed
   ``.moved``;
3. the new files are moved to their places, the one that readers begin with last, and recorded.

So no reader finds the first file of one kind beside others of the other kind. If a move fails, all are undone; if the
process is killed, the next one that claims the folder goes on with the step that was begun.
"""

import os
import shutil
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from .errors import InputError, InputWarning
from .files import claimed_folder, remove_leftovers, shown, write_faults
from .owned_files import RECORD_FILE, owned_files, record_files, recorded_files, recorded_verbs

__all__ = ["UNFINISHED", "ResultFolder", "claimed_results"]

UNFINISHED = "unfinished"
# Under this name the record in ``unfinished`` lists earlier results that stay.
KEPT = "kept"
WHOLE, MOVED, EARLIER, PARTIAL = ".whole", ".moved", ".earlier", ".partial"


class ResultFolder:
    """The results of ``verb`` in the folder ``out``, which ``claimed_results`` has claimed.

    Raises: InputError, from all methods, if the disk refuses, see fastmsflow.files.write_faults.
    """

    def __init__(self, out: Path, verb: str) -> None:
        self.out = out
        self.unfinished = out / UNFINISHED
        """The folder for new results."""
        self._verb = verb
        self._names: Sequence[str] = ()

    def others(self) -> list[str]:
        """Returns the names in ``out`` of what this verb has not written, or somebody has changed since."""
        owned = owned_files(self.out, self._verb)
        return [name for name in os.listdir(self.out) if name not in owned]  # noqa: PTH208

    def begin(self, names: Sequence[str], kept: Iterable[str] = ()) -> None:
        """Makes ``unfinished`` empty for files of these names, and removes what an earlier call left there.

        ``names``: relative to ``unfinished``, with slashes; last comes the file with which readers begin. ``kept``:
        earlier results that stay beside the new ones.
        Raises: InputError if something that this verb has not written has one of the names, or a link or a file is in
        the place of a folder of theirs.
        """
        self._refuse_links(names)
        owned = owned_files(self.out, self._verb)
        for name in names:
            if name not in owned and os.path.lexists(self.out / name):
                self._refuse(self.out / name)
        self._clear_unfinished()
        with write_faults(self.unfinished):
            self.unfinished.mkdir(exist_ok=True)
            left = os.listdir(self.unfinished)  # noqa: PTH208
            # Names in folders are known here by their first folder.
            in_the_way = {PurePosixPath(name).parts[0] for name in names}.intersection(left)
            if in_the_way:
                self._refuse(self.unfinished / min(in_the_way))
        left = [name for name in left if name != RECORD_FILE]
        if left:
            line = f"{len(left)} files or folders that this command has not written stay as they are"
            warnings.warn(f"{shown(self.unfinished)}: {line}", InputWarning, stacklevel=2)
        record_files(self.unfinished, self._verb, dict.fromkeys(names))
        record_files(self.unfinished, KEPT, dict.fromkeys(kept))
        # The record may have stayed beside somebody else's files: from here on it is of this verb alone.
        for verb in recorded_verbs(self.unfinished) - {self._verb, KEPT}:
            record_files(self.unfinished, verb, {})
        with write_faults(self.unfinished):
            for folder in _folders_of(self.unfinished, names):
                folder.mkdir(parents=True, exist_ok=True)
        self._names = names

    @contextmanager
    def partial(self, name: str) -> Iterator[Path]:
        """Yields a path to write; the file gets its ``name`` in ``unfinished`` if the block ends well."""
        path = self.unfinished / PARTIAL
        with write_faults(self.unfinished / name):
            try:
                yield path
                path.replace(self.unfinished / name)
            finally:
                path.unlink(missing_ok=True)

    def finish(self) -> None:
        """Puts the files of ``unfinished`` in the place of the earlier ones; an interruption by Ctrl-C waits."""
        with _interruptions_ignored(), write_faults(self.out):
            sizes = {name: _size(self.unfinished / name) for name in self._names}
            record_files(self.unfinished, self._verb, {name: size for name, size in sizes.items() if size is not None})
            (self.unfinished / WHOLE).touch()
            moves: list[tuple[Path, Path]] = []
            try:
                self._move_earlier(moves)
                self._move_new(moves)
            except BaseException:
                for source, target in reversed(moves):
                    target.rename(source)
                (self.unfinished / WHOLE).unlink()
                raise
            self._clear_unfinished()

    def recover(self) -> None:
        """Goes on with what a killed process, of any verb, had begun to put in the place of earlier results."""
        if _is_folder(self.unfinished):
            for verb in recorded_verbs(self.unfinished) - {KEPT}:
                begun = ResultFolder(self.out, verb)
                with write_faults(self.out):
                    if _size(self.unfinished / WHOLE) is not None:
                        begun._move_earlier([])
                    if _size(self.unfinished / MOVED) is not None:
                        begun._move_new([])
                        begun._clear_unfinished()

    def close(self) -> None:
        """Removes ``unfinished`` if no result is in it."""
        if _is_folder(self.unfinished) and not owned_files(self.unfinished):
            # The first error is the one to report.
            with suppress(OSError, InputError):
                self._clear_unfinished()

    def _refuse(self, path: Path) -> None:
        raise InputError(
            f"{shown(path)}: is in the way, and `{self._verb}` has not written it, or it was changed since; move it"
            " elsewhere, or choose another folder"
        )

    def _refuse_links(self, names: Iterable[str]) -> None:
        """Raises: InputError if a link or a file is in the place of a folder of ``names`` in ``out``."""
        for folder in sorted(_folders_of(self.out, names) - {self.out}):
            if os.path.lexists(folder) and not _is_folder(folder):
                self._refuse(folder)

    def _clear_unfinished(self) -> None:
        if not os.path.lexists(self.unfinished):
            return
        if not _is_folder(self.unfinished):
            self._refuse(self.unfinished)
        remove_leftovers(self.unfinished)
        if _size(self.unfinished / RECORD_FILE) is None:
            if os.listdir(self.unfinished):  # noqa: PTH208
                self._refuse(self.unfinished)
            return
        with write_faults(self.unfinished):
            names = recorded_files(self.unfinished)
            # Nothing behind a link is removed.
            folders = {folder for folder in _folders_of(self.unfinished, names) if _is_below(folder, self.unfinished)}
            for folder in folders:
                remove_leftovers(folder)
            for name in [*owned_files(self.unfinished), PARTIAL, WHOLE, MOVED]:
                (self.unfinished / name).unlink(missing_ok=True)
            if _is_folder(self.unfinished / EARLIER):
                shutil.rmtree(self.unfinished / EARLIER)
            _remove_empty(folders)
            # Beside somebody else's files the record says that the folder is this product's.
            if os.listdir(self.unfinished) == [RECORD_FILE]:  # noqa: PTH208
                (self.unfinished / RECORD_FILE).unlink()
                self.unfinished.rmdir()

    def _move_earlier(self, moves: list[tuple[Path, Path]]) -> None:
        """Moves the earlier results away and appends each move to ``moves``."""
        moved = owned_files(self.out, self._verb) - recorded_files(self.unfinished, KEPT).keys()
        names = [name for name in reversed(recorded_files(self.out, self._verb)) if name in moved]
        if os.path.lexists(self.unfinished / EARLIER) and not _is_folder(self.unfinished / EARLIER):
            self._refuse(self.unfinished / EARLIER)
        for folder in _folders_of(self.unfinished / EARLIER, names):
            if os.path.lexists(folder) and not _is_below(folder, self.unfinished):
                self._refuse(folder)
            folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            _move(self.out / name, self.unfinished / EARLIER / name, moves)
        _move(self.unfinished / WHOLE, self.unfinished / MOVED, moves)
        _remove_empty(_folders_of(self.out, names) - {self.out})

    def _move_new(self, moves: list[tuple[Path, Path]]) -> None:
        """Moves the new results to their places, appends each move to ``moves``, and records them."""
        files = recorded_files(self.unfinished, self._verb)
        self._refuse_links(files)
        for folder in _folders_of(self.out, files):
            folder.mkdir(parents=True, exist_ok=True)
        # A process that was killed may have moved some.
        waiting = owned_files(self.unfinished, self._verb)
        for name in files:
            if name in waiting:
                if os.path.lexists(self.out / name):
                    self._refuse(self.out / name)
                _move(self.unfinished / name, self.out / name, moves)
        kept, earlier = recorded_files(self.unfinished, KEPT), recorded_files(self.out, self._verb)
        record_files(self.out, self._verb, files | {name: earlier[name] for name in kept if name in earlier})


@contextmanager
def claimed_results(out: Path, verb: str) -> Iterator[ResultFolder]:
    """Claims the folder ``out`` for new results of ``verb`` in a with block.

    Raises: fastmsflow.files.Busy if another process is writing there; InputError if the disk refuses.
    """
    with claimed_folder(out):
        results = ResultFolder(out, verb)
        results.recover()
        try:
            yield results
        finally:
            results.close()


@contextmanager
def _interruptions_ignored() -> Iterator[None]:
    """Ignores Ctrl-C in the block, which takes a moment and ends the work anyway."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _move(source: Path, target: Path, moves: list[tuple[Path, Path]]) -> None:
    source.rename(target)
    moves.append((source, target))


def _folders_of(base: Path, names: Iterable[str]) -> set[Path]:
    """Returns ``base`` and the folders below it on the way to ``names``."""
    parents = {PurePosixPath(folder) for folder in {os.path.dirname(name) for name in names}}  # noqa: PTH120
    return {base, *(base / folder for parent in parents for folder in (parent, *parent.parents))}


def _is_below(folder: Path, base: Path) -> bool:
    """Tells whether ``folder`` is there and is reached from ``base`` through no link."""
    return folder.is_dir() and folder.resolve() == base.resolve() / folder.relative_to(base)


def _remove_empty(folders: Iterable[Path]) -> None:
    """Removes those of ``folders`` that are empty, the innermost first."""
    for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
        with suppress(OSError):
            folder.rmdir()


def _is_folder(path: Path) -> bool:
    """Tells whether a folder, not a link to one, is there."""
    return path.is_dir() and not path.is_symlink()


def _size(path: Path) -> int | None:
    """Returns the size of a file, None if no file is there or a link is."""
    return path.stat().st_size if path.is_file() and not path.is_symlink() else None
