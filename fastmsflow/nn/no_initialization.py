"""Builds modules whose weights are about to be read, without filling them at random first."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import init
from torch.overrides import TorchFunctionMode

RANDOM = frozenset(
    (
        *(Tensor.normal_, Tensor.uniform_, init.normal_, init.uniform_),
        *(init.kaiming_normal_, init.kaiming_uniform_, init.xavier_normal_, init.xavier_uniform_),
    )
)


class NoInitialization(TorchFunctionMode):
    """Leaves a tensor as it is where an initialization would fill it with random numbers, in a with block.

    A model of WideResNet-50-2 takes three to five times as long to load otherwise.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in RANDOM:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
