"""Reads JSON that a stranger may have written, and checks it against a type before anything is made of it."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

from .errors import InputError, cut

T = TypeVar("T")

MOST_BYTES = 2**26
"""The size in bytes of the largest file of JSON that is read."""
# Beyond this, torch and numpy take no whole number.
LARGEST = 2**63 - 1
NAMES = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}


@dataclass(frozen=True)
class Within:
    """Bounds a number, or the length of a list, in ``Annotated``; both ends are allowed."""

    low: float
    high: float = math.inf

    def __str__(self) -> str:
        return f"of {self.low:g} or more" if self.high == math.inf else f"of {self.low:g} to {self.high:g}"


def read_json_file(path: Path, kind: type[T], what: str, remedy: str) -> T:
    """Returns the JSON in the file ``path``; the other arguments and errors are those of ``read_json``.

    Raises: FileNotFoundError if it is not there; InputError if it cannot be read or is larger than MOST_BYTES.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{what} (not a file); {remedy}")
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(f"{what} ({error.strerror}); {remedy}") from error
    if len(content) > MOST_BYTES:
        raise InputError(f"{what} (larger than {MOST_BYTES / 2**20:g} MiB); {remedy}")
    return read_json(content, kind, what, remedy)


def read_json(content: str | bytes, kind: type[T], what: str, remedy: str) -> T:
    """Returns the JSON of a file as ``kind``, see ``conform``.

    ``what``: begins the message of a fault, e.g. "FILE: no manifest"; ``remedy``: ends it.
    Raises: InputError with the key of the fault.
    """
    try:
        value = json.loads(content, object_pairs_hook=_without_doubles)
    # Deep nesting, digits without end and bytes that are no text are no ValueErrors of one kind.
    except (ValueError, RecursionError, MemoryError) as error:
        why = cut(" ".join(str(error).split()))
        raise InputError(f"{what} (not JSON: {why}); {remedy}") from error
    return conform(value, kind, what, remedy)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises: ValueError if a key is there twice: another reader may take the other value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        double = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{cut(ascii(double), 60)} is there twice")
    return found


def conform(value: Any, kind: type[T], what: str, remedy: str) -> T:
    """Returns ``value``, as the json module made it, if it is of ``kind``; other keys than a TypedDict's are kept.

    ``kind``: a TypedDict or dataclass, dict[...], list[...], tuple[..., ...], a union with None, a Literal, str, bool,
    int, float, another class or Any, also in ``Annotated`` with a ``Within``. Numbers are finite and at most LARGEST;
    whole ones are floats where these belong, lists are tuples. A dataclass has no other keys.
    ``what``, ``remedy``: see ``read_json``.
    Raises: InputError with the key of the fault.
    """
    try:
        return _conform(value, kind, "")
    except _Fault as fault:
        raise InputError(f"{what} ({fault}); {remedy}") from fault


class _Fault(Exception):
    """Reports a value that is not of its kind, or missing; the text names its key."""


def _fault(key: str, value: Any, expected: str) -> _Fault:
    return _Fault(f"{key or 'it'} is {shown_value(value)}, not {expected}")


def shown_value(value: Any) -> str:
    """Returns a value of JSON for a message, on one line."""
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return cut(ascii(value), 60) if isinstance(value, (str, int, float, NoneType)) else f"a {type(value).__name__}"


def _conform(value: Any, kind: Any, key: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        return _bounded(value, arguments, key)
    if origin in (Union, UnionType):
        return _one_of(value, arguments, key)
    if origin is Literal:
        if not any(type(value) is type(choice) and value == choice for choice in arguments):
            raise _fault(key, value, f"one of {', '.join(map(str, arguments))}")
        return value
    if is_typeddict(kind) or is_dataclass(kind):
        return _by_name(value, kind, key)
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            raise _fault(key, value, "an object")
        return {_scalar(k, arguments[0], key): _conform(v, arguments[1], _joined(key, k)) for k, v in value.items()}
    if origin in (list, tuple):
        if not isinstance(value, list):
            raise _fault(key, value, "a list")
        return origin(_conform(item, arguments[0], f"{key}[{i}]") for i, item in enumerate(value))
    return _scalar(value, kind, key)


def _bounded(value: Any, arguments: tuple[Any, ...], key: str) -> Any:
    kind, *bounds = arguments
    result = _conform(value, kind, key)
    size = len(result) if isinstance(result, (list, str)) else result
    for bound in bounds:
        if isinstance(bound, Within) and not bound.low <= size <= bound.high:
            noun = "a list" if isinstance(result, list) else NAMES[type(result)]
            raise _fault(key, value, f"{noun} {bound}")
    return result


def _one_of(value: Any, kinds: tuple[Any, ...], key: str) -> Any:
    if value is None and NoneType in kinds:
        return None
    (kind,) = (kind for kind in kinds if kind is not NoneType)
    return _conform(value, kind, key)


def _by_name(value: Any, kind: Any, key: str) -> Any:
    if not isinstance(value, dict):
        raise _fault(key, value, "an object")
    hints = get_type_hints(kind, include_extras=True)
    required = kind.__required_keys__ if is_typeddict(kind) else frozenset(f.name for f in fields(kind) if _needed(f))
    result = dict(value)
    for name, of_name in hints.items():
        if name in value:
            result[name] = _conform(value[name], of_name, _joined(key, name))
        elif name in required:
            raise _Fault(f"{_joined(key, name)} is missing")
    if is_typeddict(kind):
        return result
    if unknown := next((name for name in result if name not in hints), None):
        raise _Fault(f"{_joined(key, unknown)} is not known")
    return kind(**result)


def _needed(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _scalar(value: Any, kind: Any, key: str) -> Any:
    if kind is float and type(value) is int and abs(value) <= LARGEST:
        return float(value)
    # True is an int in Python.
    if type(value) is not kind:
        raise _fault(key, value, NAMES.get(kind, kind.__name__))
    if (kind is int and abs(value) > LARGEST) or (kind is float and not math.isfinite(value)):
        raise _fault(key, value, f"{NAMES[kind]} within bounds")
    return value


def _joined(key: str, name: Any) -> str:
    text = name if isinstance(name, str) and name.isprintable() else ascii(name)
    return f"{key}.{cut(text, 60)}".lstrip(".")
