"""Images that lie behind a URL, read through fsspec: a web server, an object store. Needs the ``shards`` extra."""

import asyncio
from typing import Any

from PIL import Image

from ..errors import InputError, UnavailableError
from ..files import shown
from .images import SUFFIXES, decode_image, read_bytes, read_image
from .locations import Location

TIMEOUT = 60.0
"""Seconds that one image may take to arrive."""
LARGEST = 2**29
"""Bytes of the largest file that is read."""
# fsspec takes several protocols chained by this; a name from a stranger's table must not open archives or caches.
CHAIN = "::"


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
    Errors: InputError where nothing is there, nothing answers, access is refused, or the file is larger; also where a
    package is missing that reads this kind of URL.
    """
    try:
        system, path = _filesystem(url)
        protocol = system.protocol if isinstance(system.protocol, str) else system.protocol[0]
        if protocol == "file":
            return read_bytes(path)
        if not system.async_impl:
            content = system.cat_file(path, end=LARGEST + 1)
        else:
            from fsspec.asyn import sync

            # Not fsspec's own timeout, which leaves the request running.
            read = _from_server if protocol in ("http", "https") else _from_store
            content = sync(system.loop, _in_time, read, system, path)
    except (InputError, UnavailableError):
        raise
    except asyncio.TimeoutError as error:
        raise _unanswered(url) from error
    except Exception as error:  # every kind of storage has its own
        raise InputError(f"{shown(url)}: {Location.why(error)}") from error
    if len(content) > LARGEST:
        raise InputError(f"{shown(url)}: larger than {LARGEST // 2**20} MiB; leave it out")
    return content


def is_there(url: str) -> bool:
    """Returns whether a file is behind ``url``. Errors: InputError where nothing answers within TIMEOUT seconds,
    UnavailableError where a package is missing."""
    system, path = _filesystem(url)
    if not system.async_impl:
        return bool(system.exists(path))
    from fsspec.asyn import sync

    try:
        return bool(sync(system.loop, _in_time, _is_there, system, path))
    except asyncio.TimeoutError as error:
        raise _unanswered(url) from error


def images_below_url(url: str) -> list[str]:
    """Returns the URLs of all files below ``url`` that have an image's suffix, sorted; ``url`` itself if it has one.

    Errors: InputError where there are none or they cannot be listed, UnavailableError where a package is missing.
    """
    if _is_image(url):
        return [url]
    try:
        system, path = _filesystem(url)
        found = [name for name in system.find(path) if _is_image(name)]
    except (InputError, UnavailableError):
        raise
    except Exception as error:  # every kind of storage has its own
        raise InputError(f"{shown(url)}: {Location.why(error)}") from error
    if not found:
        raise InputError(f"{shown(url)}: holds no images ({', '.join(sorted(SUFFIXES))})")
    return sorted(system.unstrip_protocol(name) for name in found)


def _is_image(name: str) -> bool:
    return any(name.lower().endswith(suffix) for suffix in SUFFIXES)


def _filesystem(url: str) -> tuple[Any, str]:
    if CHAIN in url:
        raise InputError(f"{shown(url)}: {CHAIN} chains protocols, which is not taken here; give a plain URL")
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(url)
    except ImportError as error:
        raise UnavailableError(f"{shown(url)}: {error}") from error
    except ValueError as error:
        raise InputError(f"{shown(url)}: {error}") from error


def _unanswered(url: str) -> InputError:
    return InputError(f"{shown(url)}: no answer within {TIMEOUT:g} s; look whether the server can be reached")


async def _is_there(system: Any, path: str) -> bool:
    return await system._exists(path)


async def _in_time(read: Any, system: Any, path: str) -> Any:
    return await asyncio.wait_for(read(system, path), TIMEOUT)


async def _from_store(system: Any, path: str) -> bytes:
    return await system._cat_file(path, end=LARGEST + 1)


async def _from_server(system: Any, url: str) -> bytes:
    """A server need not honour a range, so the reading itself stops."""
    session = await system.set_session()
    content = bytearray()
    async with session.get(url) as response:
        response.raise_for_status()
        async for chunk in response.content.iter_chunked(2**20):
            content += chunk
            if len(content) > LARGEST:
                break
    return bytes(content)
