"""Changes every value of a file to values of other types, as a stranger might."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest

from fastmsflow import InputError

NUMBERS: tuple[Any, ...] = (-1, 0.5, 10**30, float("nan"), float("inf"))
WRONG: tuple[Any, ...] = (None, True, *NUMBERS, "x", "\ud800", "x" * 10**6, [], [None], [[[1]]], {}, {"a": 1})


def mutations(content: Any) -> Iterator[tuple[str, bool, Any]]:
    """Yields (what was changed, if its type is another one, a changed copy).

    Every key and item is replaced by each of WRONG.
    """
    for path in paths(content):
        for value in WRONG:
            changed = copy.deepcopy(content)
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            before, inner[path[-1]] = inner[path[-1]], value
            is_other = type(value) is not type(before) and not (type(before) is float and type(value) is int)
            yield f"{'.'.join(map(str, path))} = {value!r}"[:100], is_other, changed


def paths(content: Any) -> Iterator[tuple[Any, ...]]:
    """Yields the keys of every value, from the outside to the inside; of a list, the first item's."""
    if isinstance(content, (dict, list)):
        for key in content if isinstance(content, dict) else range(len(content[:1])):
            yield (key,)
            yield from ((key, *rest) for rest in paths(content[key]))


def line_of(call: Any) -> str | None:
    """Returns the message of the InputError that ``call`` raises, which is one short line; None if it raises none."""
    try:
        call()
    except InputError as error:
        line = str(error)
        assert "\n" not in line and len(line) < 5000, line[:500]
        assert "weights_only" not in line and "trusted source" not in line, line
        return line
    return None


def refused(call: Any) -> str:
    """Returns the message of ``line_of``, which there must be."""
    line = line_of(call)
    if line is None:
        pytest.fail("this was taken")
    return line
