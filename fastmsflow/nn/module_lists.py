"""Types the members of module lists."""

from collections.abc import Sequence
from typing import TypeVar, cast

from torch import nn

M = TypeVar("M", bound=nn.Module)


def all_of(kind: type[M], modules: nn.ModuleList) -> Sequence[M]:
    """Returns ``modules``, which are all of ``kind``: nn.ModuleList only says that its members are modules."""
    return cast("Sequence[M]", modules)
