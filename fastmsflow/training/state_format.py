"""The form of a run's state file, which is checked before anything is restored from it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

from torch import Tensor

from ..errors import InputError, cut
from ..schema import Within, conform
from ..state_dicts import load_pickled

STATE = "fastmsflow"
"""The key of this library's own part of the file."""
REMEDY = "remove it to begin the run again"

Count = Annotated[int, Within(0)]


class _Round(TypedDict):
    """An EpochResult."""

    epoch: Count
    evaluation: dict[str, float | None] | None
    held_out_nll: float | None


class _Own(TypedDict):
    """The state of an MSFlowLightningModule."""

    epoch_losses: list[float]
    losses: dict[str, Any]
    moments: list[_Round]
    random: Tensor
    random_cuda: list[Tensor]


class _Optimizer(TypedDict):
    """The state of an Adam."""

    state: dict[int, dict[str, Any]]
    param_groups: Annotated[list[dict[str, Any]], Within(1)]


class _Schedule(TypedDict):
    """The state of a LambdaLR."""

    base_lrs: list[float]
    last_epoch: Count


_State = TypedDict(
    "_State",
    {
        "epoch": Count,
        "global_step": Count,
        "pytorch-lightning_version": str,
        "state_dict": dict[str, Tensor],
        "loops": dict[str, dict[str, Any]],
        "callbacks": dict[str, dict[str, Any]],
        "optimizer_states": Annotated[list[_Optimizer], Within(1, 1)],
        "lr_schedulers": Annotated[list[_Schedule], Within(1, 1)],
        "fastmsflow": _Own,
    },
)


def check_state(path: Path, mapped: bool = False) -> dict[str, Any]:
    """Returns the content of a run's state file; nothing in the file is run. ``mapped``: its tensors stay on the disk.

    Raises: InputError with the key of the fault if the file is damaged or of another form.
    """
    what = f"{path}: not a run's state"
    try:
        content = load_pickled(path, mapped)
    except InputError:
        raise
    # A damaged file can raise nearly anything. PyTorch's message is left out: it advises to trust the file.
    except Exception as error:
        raise InputError(
            f"{path}: damaged, or holds code, which is not run ({type(error).__name__}); {REMEDY}"
        ) from error
    return dict(conform(content, _State, what, REMEDY))


def refuse_other_shapes(of: str, optimizer: Mapping[str, Any], parameters: Sequence[Tensor]) -> None:
    """Checks that the state of an ``optimizer`` has the shapes of its ``parameters``, which torch does not look at.

    ``of``: the state's file, for the message. Raises: InputError if it has not.
    """
    for number, state in optimizer["state"].items():
        for name, value in state.items():
            shape = parameters[number].shape if 0 <= number < len(parameters) else None
            if shape is None or (isinstance(value, Tensor) and value.ndim and value.shape != shape):
                given, own = (None if s is None else tuple(s) for s in (getattr(value, "shape", None), shape))
                where = f"optimizer_states[0].state.{number}.{cut(str(name))}"
                raise InputError(f"{of}: not a run's state ({where} is {given}, not {own}); {REMEDY}")
