"""Reads images behind URLs through fsspec: on a web server or in an object store. Needs the ``shards`` extra."""

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from html.parser import HTMLParser
from importlib.util import find_spec
from typing import Any

from PIL import Image

from ..errors import InputError, UnavailableError
from ..files import shown
from .image_formats import NO_IMAGES, SUFFIXES, UNREAD_SUFFIXES, suffix_of
from .image_io import decode_image, read_bytes, read_image
from .own_output import own_output_by_names
from .passed_over import PassedOver
from .shards.storage import GONE, ShardStorage

TIMEOUT = 60.0
"""The seconds in which an image must arrive."""
MAX_BYTES = 2**29
"""The size in bytes of the largest file that is read."""
# fsspec takes several protocols chained by this; a name from a stranger's table must not open archives or caches.
CHAIN = "::"
MAX_LINKS = 1_000_000
"""The most files and folders that a web server's pages may name."""
MAX_PAGE_BYTES = 2**26
"""The size in bytes of the largest of these pages."""
GIVE_A_LIST = "give a list of the images' URLs instead"
WEB = ("http", "https")


def is_url(name: str) -> bool:
    """Returns whether ``name`` is a URL and not a file's path."""
    return "://" in name


def open_image(name: str) -> Image.Image:
    """Reads the image in the file or behind the URL ``name``.

    Raises: InputError if there is no image or it cannot be read; UnavailableError if a package is missing that reads
    this kind of URL.
    """
    return decode_image(read_url(name), name) if is_url(name) else read_image(name)


def read_url(url: str, max_bytes: int | None = None) -> bytes:
    """Returns the bytes behind ``url``, at most ``max_bytes`` of them; None: MAX_BYTES.

    A web server and an object store have TIMEOUT seconds; other protocols take the time that fsspec gives them. Raises:
    InputError if nothing is there, nothing answers, access is refused, or the file is larger; UnavailableError if a
    package is missing that reads this kind of URL.
    """
    max_bytes = MAX_BYTES if max_bytes is None else max_bytes
    with _faults_named(url):
        system, path, protocol = _filesystem(url)
        if protocol == "file":
            return read_bytes(path)
        if not system.async_impl:
            content = system.cat_file(path, end=max_bytes + 1)
        elif protocol in WEB:
            content = _in_time(system, _from_server(system, path, max_bytes))
        else:
            content = _in_time(system, system._cat_file(path, end=max_bytes + 1))
    if len(content) > max_bytes:
        raise InputError(f"{shown(url)}: larger than {max_bytes / 2**20:g} MiB; leave it out")
    return content


def is_there(url: str) -> bool:
    """Returns whether a file is behind ``url``.

    Raises: InputError if nothing answers within TIMEOUT seconds or access is refused, and UnavailableError if a package
    is missing.
    """
    with _faults_named(url):
        system, path, protocol = _filesystem(url)
        if not system.async_impl:
            return bool(system.exists(path))
        return bool(_in_time(system, _answers(system, path) if protocol in WEB else system._exists(path)))


def images_below_url(url: str) -> list[str]:
    """Returns the URLs of all files below ``url`` that have an image's suffix, sorted; ``url`` itself if it has one.

    A web server's pages are followed to links that lie below ``url``. Pictures that this product wrote are left out. An
    InputWarning tells of these and of images that are not read, by their names alone. Raises: InputError if there are
    none or they cannot be listed, and UnavailableError if a package is missing.
    """
    if is_image(url):
        return [url]
    with _faults_named(url):
        system, path, protocol = _filesystem(url)
        if protocol in WEB:
            names = _linked_below(system, path)
        else:
            if system.async_impl:
                # A store that does not answer shows here; a long listing may take its time.
                _in_time(system, system._exists(path))
            names = system.find(path)
    passed_over, own = PassedOver(), own_output_by_names(names)
    found: list[str] = []
    for name in sorted(names):
        if name in own:
            passed_over.add_own(name)
        elif is_image(name):
            found.append(system.unstrip_protocol(name))
        elif suffix_of(name.partition("?")[0]) in UNREAD_SUFFIXES:
            passed_over.add(name.partition("?")[0])
    if not found:
        no_images = f"{shown(url)}: {NO_IMAGES}"
        raise InputError("; ".join([no_images, *passed_over.lines()]))
    passed_over.warn()
    return sorted(found)


def is_image(name: str) -> bool:
    """Returns whether a URL has an image's suffix."""
    # A signed URL has its signature behind the question mark.
    return any(part.lower().endswith(tuple(SUFFIXES)) for part in (name, name.partition("?")[0]))


def _filesystem(url: str) -> tuple[Any, str, str]:
    """Returns the file system of ``url``, the path in it, and the protocol."""
    if CHAIN in url:
        raise InputError(f"{shown(url)}: {CHAIN} chains protocols, which is not taken here; give a plain URL")
    if find_spec("fsspec") is None:
        raise UnavailableError(f"{shown(url)}: URLs need fsspec: pip install 'fastmsflow[shards]'")
    from fsspec.core import url_to_fs

    system, path = url_to_fs(url)
    return system, path, system.protocol if isinstance(system.protocol, str) else system.protocol[0]


@contextmanager
def _faults_named(url: str) -> Iterator[None]:
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
        raise InputError(f"{shown(url)}: {ShardStorage.why(error)}") from error


def _in_time(system: Any, answer: Coroutine[Any, Any, Any]) -> Any:
    """Waits TIMEOUT seconds for ``answer``; fsspec's own timeout would leave the request running."""
    from fsspec.asyn import sync

    return sync(system.loop, asyncio.wait_for, answer, TIMEOUT)


async def _answers(system: Any, url: str) -> bool:
    """Returns whether the server has the file. fsspec's own answer is no if a server fails or is not there."""
    session = await system.set_session()
    async with session.get(url) as response:
        if response.status not in GONE:
            response.raise_for_status()
        return response.status not in GONE


async def _from_server(system: Any, url: str, max_bytes: int) -> bytes:
    """Returns more than ``max_bytes`` bytes if there are more; a server need not honor a range, so the reading
    stops."""
    session = await system.set_session()
    content = bytearray()
    async with session.get(url) as response:
        response.raise_for_status()
        async for chunk in response.content.iter_chunked(2**20):
            content += chunk
            if len(content) > max_bytes:
                break
    return bytes(content)


def _linked_below(system: Any, url: str) -> list[str]:
    """Returns the files that pages link to, from ``url`` on.

    fsspec's own search reads pages of any length, passes over servers' faults, and follows ``./`` and ``../`` for ever.
    """
    root = _base(url)
    found, waiting, seen = list[str](), [url], {root}
    while waiting:
        if len(seen) > MAX_LINKS:
            raise InputError(f"{shown(url)}: more than {MAX_LINKS} links; {GIVE_A_LIST}")
        page = waiting.pop()
        for name in _links(system, page, is_first=page == url):
            if name in seen or not name.startswith(root):
                continue
            seen.add(name)
            (waiting if name.endswith("/") else found).append(name)
    return found


def _links(system: Any, page: str, is_first: bool) -> list[str]:
    """Returns the URLs that a page links to."""
    from aiohttp import ClientResponseError

    with _faults_named(page):
        try:
            content = _in_time(system, _from_server(system, page, MAX_PAGE_BYTES))
        except ClientResponseError as error:
            if is_first or error.status not in GONE:
                raise
            # A link that leads nowhere.
            return []
        if len(content) > MAX_PAGE_BYTES:
            raise InputError(f"{shown(page)}: a page larger than {MAX_PAGE_BYTES / 2**20:g} MiB; {GIVE_A_LIST}")
        parser = _LinkParser(_base(page))
        parser.feed(content.decode(errors="replace"))
    return parser.links


class _LinkParser(HTMLParser):
    """Collects the URLs that a page of HTML in the folder ``base`` links to."""

    def __init__(self, base: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self._base = base

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        from yarl import URL

        for name, value in attrs:
            if tag == "a" and name == "href" and value:
                with suppress(ValueError):  # no URL
                    self.links.append(str(URL(self._base).join(URL(value)).with_fragment(None)))


def _base(page: str) -> str:
    """Returns the folder of a page, with a slash: many servers show a folder under its name without one too."""
    from yarl import URL

    page = str(URL(page))
    folder, _, name = page.rpartition("/")
    return f"{folder}/" if name.endswith((".html", ".htm")) else f"{page.rstrip('/')}/"
