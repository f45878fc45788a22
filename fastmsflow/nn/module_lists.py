"""Lists of modules."""

from collections.abc import Sequence
from typing import TypeVar, cast

from torch import nn

M = TypeVar("M", bound=nn.Module)


def all_of(kind: type[M], modules: nn.ModuleList) -> Sequence[M]:
    """``modules``, which are all of ``kind``: of its members nn.ModuleList only says that they are modules."""
    return cast("Sequence[M]", modules)
