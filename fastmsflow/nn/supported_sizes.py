"""Image sizes that a backbone takes, found without computing anything."""

import copy
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import nn

from ..errors import InputError
from ..number_range import SIDE
from .trained_model import is_trained

STEP = 32
REACH = 256


def fault_at(net: nn.Module, size: tuple[int, int]) -> str | None:
    """Returns why ``net`` takes no images of ``size`` (H, W), or None if it does."""
    # A copy whose weights take no memory, and which computes nothing.
    memo: dict[int, object] = {
        id(weight): nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
        for weight in net.parameters()
    }
    memo |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in net.buffers()}
    without_weights = copy.deepcopy(net, memo).eval()
    try:
        with torch.no_grad():
            without_weights(torch.empty(1, 3, *size, device="meta"))
    except NotImplementedError:
        # An operation that knows no tensor without memory; the first image shows what it is.
        return None
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None


def describe_split_patches(net: nn.Module, size: tuple[int, int]) -> str | None:
    """Returns the patch of a transformer, those sides of ``size`` (H, W) that it does not divide, and the nearest ones
    that it does: timm would leave the border out. None if it divides both, or ``net`` has no such patches."""
    embedding = _patch_embedding(net)
    patch = getattr(embedding, "patch_size", None)
    if is_trained() or not isinstance(patch, tuple) or getattr(embedding, "dynamic_img_pad", False):
        return None
    faults = [
        f"{side} is no multiple: give {_multiples_around(side, of)}"
        for side, of in dict.fromkeys(zip(size, patch, strict=True))
        if side % of
    ]
    return f"{' and '.join(map(str, dict.fromkeys(patch)))}; {'; '.join(faults)}" if faults else None


def _patch_embedding(net: nn.Module) -> object:
    return getattr(getattr(net, "model", None), "patch_embed", None)


def _multiples_around(side: int, patch: int) -> str:
    below, above = side // patch * patch, -(-side // patch) * patch
    return f"{below} or {above}" if below in SIDE else str(above)


def refuse_beyond_tables(name: str, net: nn.Module, size: tuple[int, int]) -> None:
    """Raises: InputError if an image of an odd ``size`` (H, W) leads out of a table, which ``fault_at`` cannot see."""
    # Transformers that are built for one grid look nothing up beyond it, and a large image would take them seconds.
    if not any(side % STEP for side in size) or hasattr(_patch_embedding(net), "grid_size"):
        return
    try:
        net(torch.zeros(1, 3, *size))
    except IndexError as error:
        raise InputError(
            f"{name} takes no images of {size[0]}x{size[1]} ({error}); give sides that are multiples of {STEP}"
        ) from error


def sizes_near(size: tuple[int, int], own: int, build: Callable[[tuple[int, int]], nn.Module]) -> list[int]:
    """Returns sides of square images that work: the next ones below and above ``size``, and ``own``, the model's.

    ``build``: makes the model for images of a size.
    """

    def works(side: int) -> bool:
        with suppress(InputError):
            return fault_at(build((side, side)), (side, side)) is None
        return False

    side = max(size)
    below = range(side // STEP * STEP, max(0, side - REACH), -STEP)
    above = range((side // STEP + 1) * STEP, side + REACH + 1, STEP)
    found = [next(filter(works, sides), None) for sides in (below, above, (own,))]
    return sorted({side for side in found if side is not None})
