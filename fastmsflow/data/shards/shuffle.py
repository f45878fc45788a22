"""The order in which shards and images are read: the same wherever and whenever it is asked for."""

from collections.abc import Iterable, Iterator, Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")


def shuffled_by(items: Sequence[T], key: str | None) -> list[T]:
    """Shuffled by ``key``; None: as they are."""
    if key is None:
        return list(items)
    # Of Random only random() is promised to stay the same in later versions of Python.
    draw = Random(key).random
    return sorted(items, key=lambda _: draw())


def rank_share(items: Sequence[T], rank: int, world_size: int) -> Sequence[T]:
    """Those of ``rank``: every ``world_size``-th."""
    return items[rank::world_size]


def shuffle_buffer(items: Iterable[T], size: int, key: str) -> Iterator[T]:
    """``items`` by way of a buffer of ``size``, from which a random one makes room for each that comes."""
    draw = Random(key).random
    buffer: list[T] = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
            continue
        place = int(draw() * size)
        out, buffer[place] = buffer[place], item
        yield out
    yield from sorted(buffer, key=lambda _: draw())
