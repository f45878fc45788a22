"""Opens a shard set's files, which lie in a folder or behind a URL, or which a command prints."""

import os
import shlex
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, cast

from ...errors import InputError, UnavailableError
from ...files import shown

PIPE = "pipe:"
MANIFEST = "manifest.json"
NO_FILE = "no such file"
GONE = (404, 410)
REFUSED = (401, 403)
CHUNK = 2**20
# A line for each finished shard of a set that is not finished yet.
JOURNAL = "unfinished.jsonl"


def check_installed() -> None:
    """Raises: UnavailableError if the package that reads and writes shards is missing."""
    try:
        import webdataset  # noqa: F401
    except ImportError as error:
        raise UnavailableError("shards need webdataset: pip install 'fastmsflow[shards]'") from error


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

    def open(self, file: str, **options: Any) -> AbstractContextManager[BinaryIO]:
        """Opens a file of the set for a with block; ``options``: more of fsspec's.

        Raises: errors of the storage's own types, also on entering the block; UnavailableError if a package is missing.
        """
        full = self._full(file)
        if self._pipe:
            from webdataset.gopen import gopen

            return cast(AbstractContextManager[BinaryIO], gopen(full))
        if "://" not in full:
            return Path(full).open("rb")
        try:
            import fsspec

            return cast(AbstractContextManager[BinaryIO], fsspec.open(full, "rb", **self.options, **options))
        except ImportError as error:
            raise UnavailableError(f"{shown(full)}: {error}") from error

    def read(self, file: str, most: int) -> bytes:
        """Returns the content of a small file, or more than ``most`` bytes of a larger one.

        Raises: the errors of ``open``.
        """
        # With blocks, fsspec would take all that a web server answers to a request for one.
        options = {"block_size": 0} if self.root.startswith(("http://", "https://")) else {}
        content = bytearray()
        with self.open(file, **options) as opened:
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
