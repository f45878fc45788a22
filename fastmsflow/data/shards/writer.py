"""Writes image files into tar shards in WebDataset's layout, with a manifest. The files' bytes are copied as they
are."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, TypedDict, cast

from ...errors import InputError, cut
from ...files import absolute, claimed_folder, shown, write_faults, written_aside
from ...number_range import COUNT
from ...schema import conform, read_json
from ..fingerprint import HashedFile, short_digest
from ..image_io import check_image, decode_image, read_bytes
from .manifest import FORMAT, SHARD_NAME, Manifest, Shard, ShardDescription
from .storage import JOURNAL, MANIFEST, check_installed

# A tar has a hundred bytes for a member's name; some are for the number and the suffix.
MAX_KEY_LENGTH = 60


def write_shards(
    files: Sequence[str | Path],
    out: str | Path,
    images_per_shard: int = 1000,
    *,
    decode: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Manifest:
    """Writes ``files`` in their order into ``out``: 000000.tar, 000001.tar, ... and, last of all, manifest.json.

    Each image is two members of a tar: its bytes as they are, and a .json of its ``name`` (the path below the folder
    that all files share) and its number in the set, ``index``. The same files give the same bytes. A file that cannot
    be read is left out and stands in the manifest's ``skipped``. A shard is there whole or not at all; if writing was
    interrupted, the next call with the same files continues behind the last whole shard.

    ``decode``: every image is decoded to see whether it can be; otherwise its header is looked at. ``progress`` is
    called with the number of files done so far.

    Raises: InputError if ``files`` is empty or names a file twice, none of it is an image, ``out`` holds other shards,
    another process writes there, or the disk cannot be written; UnavailableError without ``webdataset``.
    """
    COUNT.check("images_per_shard", images_per_shard)
    if not files:
        raise InputError("no images to write into shards")
    paths = [absolute(file) for file in files]
    if len(set(paths)) < len(paths):
        twice = Counter(paths).most_common(1)[0][0]
        raise InputError(f"{shown(twice)}: listed twice; list every image once")
    out = Path(out)
    check_installed()
    with claimed_folder(out):
        if (out / MANIFEST).exists():
            raise InputError(f"{shown(out)}: holds shards already; choose another folder, or remove them")
        return _Writer(paths, out, images_per_shard, decode).run(progress)


class _JournalLine(TypedDict):
    """A line of JOURNAL but the first."""

    shard: ShardDescription | None
    skipped: list[str]


class _Writer:
    def __init__(self, paths: list[str], out: Path, images_per_shard: int, decode: bool) -> None:
        self.paths = paths
        self.out = out
        self.per_shard = images_per_shard
        self._check = decode_image if decode else check_image
        # With one file, the folder that it is in.
        self.base = os.path.commonpath([os.path.dirname(path) for path in paths])  # noqa: PTH120
        self.fingerprint = short_digest(os.fsencode(self._name(path)) + b"\0" for path in paths)
        self.shards: list[Shard] = []
        self.skipped: list[str] = []

    def run(self, progress: Callable[[int], None]) -> Manifest:
        """Writes the shards that are not finished yet, and the manifest."""
        number = self._resume()
        progress(min(number * self.per_shard, len(self.paths)))
        with write_faults(self.out / JOURNAL), (self.out / JOURNAL).open("a") as journal:
            for start in range(number * self.per_shard, len(self.paths), self.per_shard):
                skipped: list[str] = []
                shard = self._write(start, skipped, progress)
                self.shards += [shard] if shard else []
                self.skipped += skipped
                line = {"shard": shard and asdict(shard), "skipped": skipped}
                journal.write(json.dumps(line) + "\n")
                journal.flush()
        if not self.shards:
            (self.out / JOURNAL).unlink()
            raise InputError(f"none of {len(self.paths)} files can be read as an image; the first: {self.skipped[0]}")
        manifest = Manifest(tuple(self.shards), self.fingerprint, self.per_shard, tuple(self.skipped))
        manifest.write(self.out)
        (self.out / JOURNAL).unlink()
        return manifest

    def _write(self, start: int, skipped: list[str], progress: Callable[[int], None]) -> Shard | None:
        """Writes the shard of the files from ``start`` on. Returns None if none of them can be read."""
        from webdataset.writer import TarWriter

        name = self._shard_name(start)
        first = self.shards[-1].first + self.shards[-1].images if self.shards else 0
        index = first
        with written_aside(self.out / name) as aside, aside.open("wb") as file:
            hashed = HashedFile(file)
            with TarWriter(cast(BinaryIO, hashed), user="", group="", encoder=False, mtime=0) as tar:
                for number, path in enumerate(self.paths[start : start + self.per_shard], start + 1):
                    try:
                        content = read_bytes(path)
                        self._check(content, path)
                    except InputError as error:
                        skipped.append(str(error))
                    else:
                        tar.write(self._sample(path, index, content))
                        index += 1
                    progress(number)
        if index == first:
            (self.out / name).unlink()
            return None
        return Shard(name, first, index - first, hashed.bytes, hashed.sha256)

    def _sample(self, path: str, index: int, content: bytes) -> dict[str, str | bytes]:
        name = self._name(path)
        stem, suffix = os.path.splitext(name)  # noqa: PTH122
        # WebDataset takes what is before the first dot for the key; the number makes it unique.
        key = f"{index:010}_{re.sub('[^A-Za-z0-9-]+', '_', stem)[-MAX_KEY_LENGTH:]}"
        kind = suffix[1:].lower()
        kind = kind if re.fullmatch("[a-z0-9]{1,8}", kind) and kind != "json" else "image"
        # JSON escapes bytes of a name that are not UTF-8.
        return {"__key__": key, kind: content, "json": json.dumps({"name": name, "index": index}).encode()}

    def _shard_name(self, start: int) -> str:
        return f"{start // self.per_shard:06}.tar"

    def _name(self, path: str) -> str:
        return os.path.relpath(path, self.base)

    def _resume(self) -> int:
        """Reads the journal of an interrupted call. Returns the number of groups of files that are finished."""
        journal = self.out / JOURNAL
        head = {"format": FORMAT, "fingerprint": self.fingerprint, "images_per_shard": self.per_shard}
        # The last line may have been cut off in the middle: then it has no newline.
        what, remedy = f"{shown(journal)}: damaged", "remove it and the shards to write them anew"
        written = journal.read_bytes().splitlines(keepends=True) if journal.is_file() else []
        for start in range(0, len(self.paths), self.per_shard) if not written else ():
            if os.path.lexists(path := self.out / self._shard_name(start)):
                raise InputError(f"{shown(path)}: would be written over; move it, or choose another folder")
        lines = [read_json(line, dict[str, Any], what, remedy) for line in written if line.endswith(b"\n")] or [head]
        if lines[0] != head:
            per_shard = cut(str(lines[0].get("images_per_shard")))
            raise InputError(
                f"{shown(self.out)}: holds unfinished shards of other images, or of {per_shard}"
                " a shard; go on with those, or choose another folder"
            )
        finished = 0
        for line in lines[1:]:
            found = conform(line, _JournalLine, what, remedy)["shard"]
            if found is not None:
                shard = Shard(**found)
                if not SHARD_NAME.fullmatch(shard.name):
                    raise InputError(f"{what} ({shown(cut(shard.name))} is no name of a shard); {remedy}")
                path = self.out / shard.name
                # After a power cut a shard may be shorter than what was written.
                if not path.is_file() or path.stat().st_size != shard.bytes:
                    break
                self.shards.append(shard)
            self.skipped += line["skipped"]
            finished += 1
        with written_aside(journal) as aside:
            aside.write_text("".join(json.dumps(line) + "\n" for line in lines[: finished + 1]))
        return finished
