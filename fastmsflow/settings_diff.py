"""Compares the settings of now with those that something was written with."""

from collections.abc import Mapping
from typing import Any

from .errors import InputError, cut


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any], only_now: bool = False) -> str:
    """Returns "KEY was A, is B" for each setting that differs, joined by "; "; an empty text if none does.

    Nested settings are compared one by one, as "OUTER.INNER", and a tuple equals the list of its items. ``only_now``:
    settings that only ``before`` has are left out.
    """
    try:
        old, new = _flat(before), _flat(now)
    except RecursionError as error:
        raise InputError("the settings of before are nested too deep; they are damaged") from error
    keys = new if only_now else {**old, **new}
    changed = [key for key in keys if old.get(key) != new.get(key)]
    return "; ".join(f"{cut(key)} was {cut(str(old.get(key)))}, is {cut(str(new.get(key)))}" for key in changed)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat
