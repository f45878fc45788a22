"""A sequence of names that are made when they are asked for: there may be millions."""

from collections.abc import Callable, Sequence
from typing import overload


class LazySequence(Sequence[str]):
    """``count`` names, each of which ``name`` makes from its number when it is asked for."""

    def __init__(self, count: int, name: Callable[[int], str]) -> None:
        self._numbers = range(count)
        self._name = name

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, number: int) -> str: ...

    @overload
    def __getitem__(self, number: slice) -> list[str]: ...

    def __getitem__(self, number: int | slice) -> str | list[str]:
        if isinstance(number, slice):
            return [self._name(i) for i in self._numbers[number]]
        return self._name(self._numbers[number])
