"""Shuffles shards and images, in an order that depends on a key alone."""

from collections.abc import Iterable, Iterator, Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")


def shuffled_by(items: Sequence[T], key: str) -> list[T]:
    """Returns ``items`` shuffled by ``key``."""
    # Later versions of Python promise the same numbers of Random.random() alone.
    draw = Random(key).random
    return sorted(items, key=lambda _: draw())


def shuffle_buffer(items: Iterable[T], size: int, key: str) -> Iterator[T]:
    """Yields ``items`` out of a buffer of ``size``, from which a random one makes room for each that comes."""
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
