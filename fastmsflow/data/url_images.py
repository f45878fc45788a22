"""Images that lie behind a URL, read through fsspec: a web server, an object store. Needs the ``shards`` extra."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from html.parser import HTMLParser
from importlib.util import find_spec
from typing import Any

from PIL import Image

from ..errors import InputError, UnavailableError
from ..files import shown
from .image_io import SUFFIXES, decode_image, read_bytes, read_image
from .shards.storage import NO_FILE, ShardStorage

TIMEOUT = 60.0
"""Seconds that one image may take to arrive."""
LARGEST = 2**29
"""Bytes of the largest file that is read."""
# fsspec takes several protocols chained by this; a name from a stranger's table must not open archives or caches.
CHAIN = "::"
MOST_LINKS = 1_000_000
"""Files and folders that a web server's pages may name."""
LARGEST_PAGE = 2**26
"""Bytes of the largest of these pages."""
LIST = "give a list of the images' URLs instead"
WEB = ("http", "https")
GONE = (404, 410)
REFUSED = (401, 403)


def is_url(name: str) -> bool:
    """Returns whether ``name`` is a URL and not a file's path."""
    return "://" in name


def open_image(name: str) -> Image.Image:
    """Reads the file or the URL ``name`` as ``read_image`` reads a file. Errors: as ``read_image``'s and
    ``read_url``'s."""
    return decode_image(read_url(name), name) if is_url(name) else read_image(name)


def read_url(url: str) -> bytes:
    """Returns the bytes behind ``url``, at most LARGEST of them.

    A web server and an object store have TIMEOUT seconds; other protocols take the time that fsspec gives them.
    Errors: InputError where nothing is there, nothing answers, access is refused, or the file is larger;
    UnavailableError where a package is missing that reads this kind of URL.
    """
    with _faults_told(url):
        system, path = _filesystem(url)
        if _protocol(system) == "file":
            return read_bytes(path)
        if not system.async_impl:
            content = system.cat_file(path, end=LARGEST + 1)
        else:
            # Not fsspec's own timeout, which leaves the request running.
            content = _in_time(_from_server if _protocol(system) in WEB else _from_store, system, path)
    if len(content) > LARGEST:
        raise InputError(f"{shown(url)}: larger than {LARGEST / 2**20:g} MiB; leave it out")
    return content


def is_there(url: str) -> bool:
    """Returns whether a file is behind ``url``.

    Errors: InputError where nothing answers within TIMEOUT seconds or access is refused, UnavailableError where a
    package is missing.
    """
    with _faults_told(url):
        system, path = _filesystem(url)
        if not system.async_impl:
            return bool(system.exists(path))
        return bool(_in_time(_answers if _protocol(system) in WEB else _exists, system, path))


def images_below_url(url: str) -> list[str]:
    """Returns the URLs of all files below ``url`` that have an image's suffix, sorted; ``url`` itself if it has one.

    A web server's pages are followed where they link to what is below. Errors: InputError where there are none or they
    cannot be listed, UnavailableError where a package is missing.
    """
    if is_image(url):
        return [url]
    with _faults_told(url):
        system, path = _filesystem(url)
        if _protocol(system) in WEB:
            names = _linked_below(system, path)
        else:
            if system.async_impl:
                # A store that does not answer shows here; a long listing may take its time.
                _in_time(_exists, system, path)
            names = system.find(path)
    found = sorted(system.unstrip_protocol(name) for name in names if is_image(name))
    if not found:
        raise InputError(f"{shown(url)}: holds no images ({', '.join(sorted(SUFFIXES))})")
    return found


def is_image(name: str) -> bool:
    """Returns whether a URL has an image's suffix."""
    # Behind the question mark stands what a signed URL is signed with.
    return any(part.lower().endswith(tuple(SUFFIXES)) for part in (name, name.partition("?")[0]))


def _filesystem(url: str) -> tuple[Any, str]:
    if CHAIN in url:
        raise InputError(f"{shown(url)}: {CHAIN} chains protocols, which is not taken here; give a plain URL")
    if find_spec("fsspec") is None:
        raise UnavailableError(f"{shown(url)}: URLs need fsspec: pip install 'fastmsflow[shards]'")
    from fsspec.core import url_to_fs

    return url_to_fs(url)


def _protocol(system: Any) -> str:
    return system.protocol if isinstance(system.protocol, str) else system.protocol[0]


@contextmanager
def _faults_told(url: str) -> Iterator[None]:
    try:
        yield
    except (InputError, UnavailableError):
        raise
    except ImportError as error:
        raise UnavailableError(f"{shown(url)}: {error}") from error
    except asyncio.TimeoutError as error:
        raise InputError(
            f"{shown(url)}: no answer within {TIMEOUT:g} s; look whether the server can be reached"
        ) from error
    except Exception as error:  # every kind of storage has its own
        raise InputError(f"{shown(url)}: {_why(error)}") from error


def _why(error: Exception) -> str:
    # aiohttp's errors have it where a server answered.
    status = getattr(error, "status", None)
    if not isinstance(status, int):
        return ShardStorage.why(error)
    if status in GONE:
        return NO_FILE
    if not status:
        return "the server redirects without end; look at the URL in a browser"
    remedy = "give a signed URL, or let everybody read it" if status in REFUSED else "try it in a browser, or later"
    return f"the server answers with status {status}; {remedy}"


def _in_time(ask: Any, system: Any, path: str) -> Any:
    from fsspec.asyn import sync

    async def limited() -> Any:
        return await asyncio.wait_for(ask(system, path), TIMEOUT)

    return sync(system.loop, limited)


async def _exists(system: Any, path: str) -> bool:
    return await system._exists(path)


async def _from_store(system: Any, path: str) -> bytes:
    return await system._cat_file(path, end=LARGEST + 1)


async def _answers(system: Any, url: str) -> bool:
    """fsspec's own takes a server that fails, or is not there, for one that has no such file."""
    session = await system.set_session()
    async with session.get(url) as response:
        if response.status not in GONE:
            response.raise_for_status()
        return response.status not in GONE


async def _from_server(system: Any, url: str, most: int = LARGEST) -> bytes:
    """Returns more than ``most`` bytes where there are more; a server need not honor a range, so the reading stops."""
    session = await system.set_session()
    content = bytearray()
    async with session.get(url) as response:
        response.raise_for_status()
        async for chunk in response.content.iter_chunked(2**20):
            content += chunk
            if len(content) > most:
                break
    return bytes(content)


def _linked_below(system: Any, url: str) -> list[str]:
    """Returns the files that pages link to, from ``url`` on. fsspec's own reads pages of any length, passes over
    servers' faults, and follows ``./`` and ``../`` for ever."""
    from yarl import URL

    root = _base(str(URL(url)))
    found, waiting, seen = list[str](), [url], {root}
    while waiting:
        if len(seen) > MOST_LINKS:
            raise InputError(f"{shown(url)}: more than {MOST_LINKS} links; {LIST}")
        page = waiting.pop()
        with _faults_told(page):
            links = _links(system, page, is_first=page == url)
        for link in links:
            name = _joined(page, link)
            if name in seen or not name.startswith(root):
                continue
            seen.add(name)
            (waiting if name.endswith("/") else found).append(name)
    return found


def _links(system: Any, page: str, is_first: bool) -> list[str]:
    from aiohttp import ClientResponseError

    try:
        content = _in_time(partial(_from_server, most=LARGEST_PAGE), system, page)
    except ClientResponseError as error:
        if is_first or error.status not in GONE:
            raise
        # A link that leads nowhere.
        return []
    if len(content) > LARGEST_PAGE:
        raise InputError(f"{shown(page)}: a page larger than {LARGEST_PAGE / 2**20:g} MiB; {LIST}")
    return _Page(content).links


class _Page(HTMLParser):
    """Collects the links of a page of HTML."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.links: list[str] = []
        self.feed(content.decode(errors="replace"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.links += [value for name, value in attrs if name == "href" and value]


def _joined(page: str, link: str) -> str:
    """Returns the URL that ``link`` on ``page`` leads to; an empty text for what is no URL."""
    from yarl import URL

    try:
        return str(URL(_base(page)).join(URL(link)).with_fragment(None))
    except ValueError:
        return ""


def _base(page: str) -> str:
    """Returns the folder of a page: many servers show a folder under its name without a slash too."""
    folder, _, name = page.rpartition("/")
    return f"{folder}/" if name.endswith((".html", ".htm")) else f"{page.rstrip('/')}/"
