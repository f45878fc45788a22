"""Images that are scored into a folder of Parquet files: files and URLs, or a set of shards."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import accumulate
from typing import BinaryIO

from ..data.file_search import find_images
from ..data.image_batches import ImageBatch, ShardBatches, file_batches
from ..data.shards.shard_set import is_shard_set
from ..data.shards.storage import MANIFEST, PIPE
from ..data.url_images import images_below_url, is_image, is_url, read_url
from ..errors import InputError
from ..files import absolute, shown
from ..schema import MOST_BYTES
from .prediction_folder import PredictionFolder


@dataclass(frozen=True)
class Files:
    """Images that are files or URLs."""

    paths: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def without_rows(self, folder: PredictionFolder) -> "Files":
        """Returns the images that have no row in ``folder``."""
        return Files(folder.remaining(self.paths))

    def batches(self, size: int) -> Iterator[ImageBatch]:
        """Yields the images in batches of ``size``."""
        return file_batches(self.paths, size)


class Shards:
    """Images in a set of shards; ``where``: see fastmsflow.data.shards.storage.ShardStorage."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.set = ShardBatches(where)
        self.done: dict[str, set[str]] = {}
        """The images of each shard that have rows."""

    def __len__(self) -> int:
        return sum(shard.images - len(self.done.get(shard.name, ())) for shard in self.set.manifest.shards)

    def without_rows(self, folder: PredictionFolder) -> "Shards":
        """Returns the images that have no row in ``folder``, those that were lost with a damaged shard included."""
        names = {self.set.name(shard): shard.name for shard in self.set.manifest.shards}
        folder.drop_lost(names)
        result = copy(self)
        result.done = defaultdict(set)
        for path in folder.scored().drop_null().to_pylist():
            # A path is the shard's path and the image's own path, which may contain slashes.
            parents = accumulate(path.split("/")[:-1], "{}/{}".format)
            tar = next((parent for parent in parents if parent in names), None)
            if tar is not None:
                result.done[names[tar]].add(path)
        return result

    def batches(self, size: int) -> Iterator[ImageBatch]:
        """Yields the images in batches of ``size``; shards whose images all have rows are not opened."""
        for shard in self.set.manifest.shards:
            done = self.done.get(shard.name, set())
            if len(done) < shard.images:
                yield from self.set.batches(shard, size, done)


def find_sources(sources: Sequence[str], stdin: BinaryIO, null: bool) -> tuple[Files | Shards, list[str]]:
    """Finds the images of ``sources``: files, folders, patterns, URLs, "-" for names on ``stdin``, or a set of shards.

    ``null``: names on ``stdin`` end with NUL.

    Returns: the images, and a line for each name that led to none.
    Raises: InputError if no image is found, or a set of shards stands beside other sources.
    """
    if any(is_shard_set(source) and not _is_folder_of_images(source) for source in sources):
        if len(sources) > 1:
            raise InputError("a set of shards is scored alone; give each set a command, and an --out, of its own")
        if null:
            raise InputError(f"{shown(sources[0])}: a set of shards; leave out --null")
        is_remote = is_url(sources[0]) or sources[0].startswith(PIPE)
        return Shards(sources[0] if is_remote else absolute(sources[0])), []
    urls = [url for source in sources if is_url(source) for url in images_below_url(source)]
    local = [source for source in sources if not is_url(source)]
    if not local:
        return Files(list(dict.fromkeys(urls))), []
    found = find_images(local, stdin, null, urls=True)
    return Files([*map(absolute, found.files), *dict.fromkeys([*found.urls, *urls])]), found.faults


def _is_folder_of_images(source: str) -> bool:
    """Returns whether a URL leads to images and not to shards, whose manifest is JSON."""
    if source.startswith(PIPE) or not is_url(source) or source.endswith(MANIFEST):
        return False
    try:
        # Some servers have no such file, and others answer with a page that says so.
        if is_image(source):
            return True
        return not read_url(f"{source.rstrip('/')}/{MANIFEST}", MOST_BYTES).lstrip().startswith(b"{")
    except InputError:
        return True
