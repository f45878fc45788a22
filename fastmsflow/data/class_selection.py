"""Choice of one or every class of an image set, as ``--class`` gives it."""

from typing import NoReturn

from ..errors import InputError
from .layouts import classes_of
from .shards.shard_set import is_shard_set


def is_every_class(source: str, category: str | None) -> bool:
    """Returns whether the class "all" means every class; elpv has a class of that name."""
    return category == "all" and source != "elpv"


def every_class_of(source: str) -> list[str]:
    """Returns the classes of ``source``. Raises: InputError if there are none."""
    if is_shard_set(source):
        refuse_class_of_shards(source)
    classes = classes_of(source)
    if not classes:
        raise InputError(f"{source}: holds no classes, or is not there; of a set that is one class leave out --class")
    return classes


def refuse_class_of_shards(source: str) -> NoReturn:
    """Raises InputError, since a set of shards has no classes."""
    raise InputError(f"{source}: shards have no classes; leave --class out")
