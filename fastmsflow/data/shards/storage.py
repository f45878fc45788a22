"""Opens a shard set's files, which lie in a folder or behind a URL, or which a command prints."""

import io
import os
import shlex
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, cast

from ...errors import InputError, UnavailableError
from ...files import shown
from .timed_reading import TimedReading

PIPE = "pipe:"
MANIFEST = "manifest.json"
NO_FILE = "no such file"
GONE = (404, 410)
REFUSED = (401, 403)
CHUNK = 2**20
# fsspec asks a server for so much at once, which is little enough to arrive in time.
BLOCK = 2**23
# A line for each finished shard of a set that is not finished yet.
JOURNAL = "unfinished.jsonl"


def check_installed() -> None:
    """Raises: UnavailableError if the package that reads and writes shards is missing."""
    try:
        import webdataset  # noqa: F401
    except ImportError as error:
        raise UnavailableError("shards need webdataset: pip install 'fastmsflow[shards]'") from error


def open_url(
    url: str, options: Mapping[str, Any] | None = None, block_size: int = BLOCK
) -> AbstractContextManager[BinaryIO]:
    """Opens the file behind ``url`` for a with block.

    ``options``: what fsspec's file system takes; ``block_size``: the bytes that are asked for at once, 0 for all in one
    stream.

    Raises: UnavailableError if a package is missing; in the block, errors of the storage's own types, and TimeoutError,
    see TimedReading.
    """
    try:
        from fsspec.core import url_to_fs

        system, path = url_to_fs(url, **(options or {}))
    except ImportError as error:
        raise UnavailableError(f"{shown(url)}: {error}") from error
    return io.BufferedReader(TimedReading(lambda: system.open(path, "rb", block_size=block_size)))


class ShardStorage:
    """The place of a shard set.

    ``where``: a folder, a URL that fsspec reads (http://, s3://, gs://, ...), either with or without
    ``/manifest.json``, or ``pipe:COMMAND`` with ``{}`` for a file's name: ``pipe:aws s3 cp s3://bucket/set/{} -``.
    ``options``: what fsspec's file system takes, such as ``{"anon": True}``. Raises: InputError for a pipe without
    ``{}``.
    """

    def __init__(self, where: str | Path, options: dict[str, Any] | None = None) -> None:
        self.root = os.fspath(where)
        self.options = options or {}
        self._pipe = self.root.startswith(PIPE)
        if self._pipe and "{}" not in self.root:
            raise InputError(
                f"{self.root}: needs a {{}} where a file's name goes: 'pipe:curl -sf https://host/set/{{}}'"
            )
        if not self._pipe:
            root = self.root.removesuffix(f"/{MANIFEST}").rstrip("/")
            self.root = "." if root == MANIFEST else root or "/"

    def name(self, file: str) -> str:
        """Returns the file's name for errors."""
        return shown(self._full(file))

    def open(self, file: str, block_size: int = BLOCK) -> AbstractContextManager[BinaryIO]:
        """Opens a file of the set for a with block; ``block_size``: see ``open_url``.

        Raises: errors of the storage's own types, also in the block, TimeoutError among them, see TimedReading;
        InputError if it is no file but a pipe or a device; UnavailableError if a package is missing.
        """
        full = self._full(file)
        if not self._pipe and "://" not in full:
            if Path(full).exists() and not Path(full).is_file():
                # Opening a pipe that nothing writes into would wait for ever.
                raise InputError(f"{shown(full)}: a pipe, a device or a folder, not a file; copy the file itself there")
            return Path(full).open("rb")
        if self._pipe:
            from webdataset.gopen import gopen

            return io.BufferedReader(TimedReading(lambda: cast(AbstractContextManager[BinaryIO], gopen(full))))
        return open_url(full, self.options, block_size)

    def read(self, file: str, most: int) -> bytes:
        """Returns the content of a small file, or more than ``most`` bytes of a larger one.

        Raises: the errors of ``open``.
        """
        # With blocks, fsspec would take all that a web server answers to a request for one.
        block_size = 0 if self.root.startswith(("http://", "https://")) else BLOCK
        content = bytearray()
        with self.open(file, block_size) as opened:
            while len(content) <= most and (chunk := opened.read(CHUNK)):
                content += chunk
        return bytes(content)

    @staticmethod
    def why(error: Exception) -> str:
        """Returns in one line what kept ``open`` or reading from it: every kind of storage has its own errors."""
        # fsspec raises FileNotFoundError also if a server fails or none answers; its cause tells which. aiohttp's
        # errors have a status if a server answered.
        status = next((s for e in (error, error.__cause__) if isinstance(s := getattr(e, "status", None), int)), None)
        if status in GONE:
            return NO_FILE
        if status == 0:
            return "the server redirects without end; look at the URL in a browser"
        if status is not None:
            remedy = "try it in a browser, or later"
            if status in REFUSED:
                remedy = "give a signed URL, or let everybody read it"
            return f"the server answers with status {status}; {remedy}"
        if isinstance(error, FileNotFoundError) and not isinstance(error.__cause__, OSError):
            return NO_FILE
        cause = error.__cause__ or error
        text = str(cause.args[0] if cause.args and isinstance(cause.args[0], str) else cause)
        return f"cannot be read ({' '.join(text.split())[:200] or type(cause).__name__})"

    def _full(self, file: str) -> str:
        # A manifest's name must be one word of the command.
        return self.root.replace("{}", shlex.quote(file)) if self._pipe else f"{self.root}/{file}"
