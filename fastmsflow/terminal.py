"""The terminal, which text of others reaches as text: a file's name, a server's answer, an error of a library.

Left as it is, such text could move the cursor, recolor or overwrite lines, and turn the direction of writing.
"""

import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import IO, Any, TextIO, cast

import rich.console
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from .errors import printable


class Console(rich.console.Console):
    """A console that escapes what is not printable, as ``\\x1b``, but for newlines; its own styles stay."""

    def __init__(self, *, stderr: bool = False, quiet: bool = False) -> None:
        # A name such as ":x:.png" stays what it is.
        super().__init__(stderr=stderr, quiet=quiet, emoji=False)

    @property
    def file(self) -> IO[str]:
        """The stream that is written to, past those that escape."""
        # While a progress bar is shown, rich's own lies around ours.
        stream: IO[str] = super().file
        return getattr(stream, "rich_proxied_file", stream)

    @file.setter
    def file(self, stream: IO[str]) -> None:
        self._file = stream

    def render_str(self, text: str, **options: Any) -> Text:
        """Makes text of a string, before it is laid out."""
        return super().render_str(printable(text, "\n"), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yields what is written, also of texts that did not come as strings."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text, "\n"))


class _PrintableStream:
    """A stream that escapes what is not printable; rich's consoles write past it."""

    def __init__(self, stream: TextIO) -> None:
        # The name is rich's.
        self.rich_proxied_file = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)

    def write(self, text: str) -> int:
        # Progress bars of libraries begin with it.
        start = "\r" * text.startswith("\r")
        self.rich_proxied_file.write(start + printable(text[len(start) :], "\n\t"))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)


@contextmanager
def printable_streams() -> Iterator[None]:
    """Escapes in the block what anything but a console writes on standard output and error: warnings, logs, tracebacks.

    This is the whole process's, so it is for programs, not for a library's functions.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, stream and _PrintableStream(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def print_traceback(_: type[BaseException], error: BaseException, frames: TracebackType | None) -> None:
    """Prints an error as ``sys.excepthook`` does, in printable characters."""
    with printable_streams():
        traceback.print_exception(error.with_traceback(frames))
