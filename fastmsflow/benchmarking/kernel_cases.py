"""Every launcher at the shapes a model gives it: what is tuned, and what is compiled ahead of time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels import (
    conv3x3,
    conv3x3_coupling,
    conv3x3_layer_norm,
    coupling,
    fusion,
    image_score,
    layer_norm,
    likelihood,
    reflection_pad,
    score_map,
)
from ..kernels.conv3x3_layer_norm import fuses_layer_norm
from ..reference.image_score import pixels_scored
from ..scoring import TOP_K

# The default model at 512x512: channels and grid of each level.
LEVELS = ((256, 64), (512, 32), (1024, 16))
CONDITION = 64
_SCORED = ", likelihood"


@dataclass(frozen=True)
class Case:
    """One launch."""

    tiles: str
    """The kernel's name in the table of tiles."""
    name: str
    launch: partial[Any]
    arithmetic: str
    """float16, bfloat16, float32, or tf32: float32 operands rounded for the product."""
    level: int = 0
    flops: int = 0
    """Of a matrix product; 0 for what only moves data."""


def cases(
    levels: Sequence[tuple[int, int]],
    batch: int,
    image_size: int,
    device: torch.device,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32),
) -> Iterator[Case]:
    """Every launcher, in each of ``dtypes``; those of scores in float32. On the meta device tensors have no data."""
    for dtype in dtypes:
        for level, (channels, size) in enumerate(levels):
            yield from _couplings(level, channels, size, batch, dtype, device)
            yield from _layer_norms(level, channels // 2 + CONDITION, size, batch, dtype, device)
            for arithmetic in ("tf32", "float32") if dtype == torch.float32 else (_name(dtype),):
                yield from _convolutions(level, channels, size, batch, arithmetic, dtype, device)
        yield from _of_all_levels(levels, batch, dtype, device)
        # The extractor's first convolution, then its others.
        for channels, size, border in ((3, image_size, 3), *((c // 2, n, 1) for c, n in levels)):
            x = new(dtype, device, batch, channels, size, size)
            padded = partial(reflection_pad.reflection_pad, x, (border, border, border, border))
            yield Case("reflection_pad", f"{channels} channels", padded, _name(dtype))
    logp = [new(torch.float32, device, batch, size, size).square().neg() for _, size in levels]
    image = new(torch.float32, device, batch, image_size, image_size).square().neg()
    name = f"{image_size}x{image_size}"
    maps = partial(score_map.score_maps, logp, (image_size, image_size))
    scores = partial(image_score.image_scores, image, pixels_scored(image, TOP_K))
    yield Case("score_map", name, maps, "float32")
    yield Case("image_score", name, scores, "float32")


def new(dtype: torch.dtype, device: torch.device, *shape: int) -> Tensor:
    """Normal values; images and weights in channels-last memory."""
    x = torch.empty(shape, device=device) if device.type == "meta" else torch.randn(shape, device=device)
    return x.to(dtype, memory_format=torch.channels_last if len(shape) == 4 else torch.contiguous_format)


def permutation(channels: int, device: torch.device) -> Tensor:
    if device.type == "meta":
        return torch.empty(channels, device=device, dtype=torch.int64)
    return torch.randperm(channels, device=device)


def tensors(nested: object) -> Iterator[Tensor]:
    """Those in a launcher's arguments or results."""
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, (list, tuple)):
        for part in nested:
            yield from tensors(part)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _couplings(
    level: int, channels: int, size: int, batch: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Case]:
    half, raw = (new(dtype, device, batch, c, size, size) for c in (channels // 2, channels))
    log_det, logp, scale, offset = (
        new(torch.float32, device, *shape) for shape in ((batch,), (batch, size, size), (channels,), (channels,))
    )
    gains, perm, name = scale.add(10), permutation(channels, device), f"{channels} channels"
    x, fixed = (half, half, raw, offset), (0.1, 1.9, "tanh", None)
    across = (None, None, None, 1.0, 1.9, "atan", 1e6, False)
    for inverse in (False, True):
        tag = f"{name}, inverse" if inverse else name
        forward = partial(coupling.coupling, *x, gains, offset, perm, *fixed, inverse, "halves", True)
        backward = partial(
            coupling.coupling_backward, [half, half], log_det, *x, gains, perm, *fixed, inverse, "halves"
        )
        yield Case("coupling", tag, forward, _name(dtype), level)
        yield Case("coupling_backward", tag, backward, _name(dtype), level)
    predicting = partial(coupling.coupling, *x, gains, offset, perm, *fixed, False, "halves", False)
    yield Case("coupling", f"{name}, no log-det", predicting, _name(dtype), level)
    permuting = partial(coupling.coupling, half, half, None, None, gains, offset, perm, *fixed, False, "halves", False)
    yield Case("coupling", f"{name}, permutation alone", permuting, _name(dtype), level)
    for result, grad in (("whole", raw), ("likelihood", logp)):
        tag = f"{name}, across levels{_SCORED * (result == 'likelihood')}"
        forward = partial(coupling.coupling, half, half, raw, offset, *across, result, True)
        backward = partial(coupling.coupling_backward, [grad], log_det, half, half, raw, offset, *across[1:], result)
        yield Case("coupling", tag, forward, _name(dtype), level)
        yield Case("coupling_backward", tag, backward, _name(dtype), level)


def _layer_norms(
    level: int, width: int, size: int, batch: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Case]:
    hidden, condition = (new(dtype, device, b, width, size, size) for b in (batch, 1))
    weight, bias, mean = (new(torch.float32, device, n) for n in (width, width, batch * size * size))
    forward = partial(layer_norm.layer_norm_relu, hidden, condition, weight, bias, 1e-5)
    backward = partial(
        layer_norm.layer_norm_relu_backward, hidden, hidden, condition, weight, bias, mean, mean.square()
    )
    yield Case("layer_norm", f"{width} channels", forward, _name(dtype), level)
    yield Case("layer_norm_backward", f"{width} channels", backward, _name(dtype), level)


def _convolutions(
    level: int, channels: int, size: int, batch: int, arithmetic: str, dtype: torch.dtype, device: torch.device
) -> Iterator[Case]:
    width, name = channels // 2 + CONDITION, f"{channels} channels"
    precision = "tf32" if arithmetic == "tf32" else "ieee"
    x, half, hidden = (new(dtype, device, batch, c, size, size) for c in (channels, channels // 2, width))
    conv1, conv2, heads = (
        new(dtype, device, outputs, inputs, 3, 3).div(3 * inputs**0.5)
        for outputs, inputs in ((width, channels // 2), (channels, width), (channels, channels // 2))
    )
    bias, weight = (new(torch.float32, device, n) for n in (channels, width))
    condition = new(dtype, device, 1, width, size, size)

    def case(tiles: str, name: str, launch: partial[Any], inputs: int, outputs: int) -> Case:
        return Case(tiles, name, launch, arithmetic, level, 18 * batch * size * size * inputs * outputs)

    yield case("conv3x3", name, partial(conv3x3.conv3x3, hidden, conv2, bias, precision), width, channels)
    gradient = partial(conv3x3.conv3x3_input_gradient, x, conv2, precision)
    yield case("conv3x3", f"{name}, input gradient", gradient, width, channels)
    gradient = partial(conv3x3.conv3x3_weight_gradient, hidden, x, precision)
    yield case("conv3x3_weight", name, gradient, width, channels)
    for keep in (False, True):
        tag = f"{name}, training" if keep else name
        within = (0.1, 1.9, "tanh", None, precision, "whole", keep, keep)
        fused = partial(conv3x3_coupling.conv3x3_coupling, hidden, conv2, bias, None, half, *within)
        yield case("conv3x3_coupling", tag, fused, width, channels)
        across = (1.0, 1.9, "atan", 1e6, precision, "likelihood", keep, keep)
        fused = partial(conv3x3_coupling.conv3x3_coupling, half, heads, bias, half, half, *across)
        yield case("conv3x3_coupling", f"{tag}, across levels{_SCORED}", fused, channels // 2, channels)
        if fuses_layer_norm(width):
            norm = (condition, weight, weight, 1e-5, precision, keep)
            normed = partial(conv3x3_layer_norm.conv3x3_layer_norm_relu, half, conv1, *norm)
            yield case("conv3x3_layer_norm", tag, normed, channels // 2, width)


def _of_all_levels(
    levels: Sequence[tuple[int, int]], batch: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Case]:
    z, halves = ([new(dtype, device, batch, c // n, size, size) for c, size in levels] for n in (1, 2))
    joint = new(dtype, device, batch, sum(level.shape[1] for level in halves), *z[-1].shape[2:])
    logp = [new(torch.float32, device, batch, size, size) for _, size in levels]
    bias = new(torch.float32, device, joint.shape[1])
    for tiles, name, launch in (
        ("pool", "forward", partial(fusion.pool_and_concat, halves)),
        ("pool", "backward", partial(fusion.pool_and_concat_backward, joint, halves)),
        ("upsample", "forward", partial(fusion.split_and_upsample, joint, bias, halves)),
        ("upsample", "backward", partial(fusion.split_and_upsample_backward, halves, joint, bias)),
        ("likelihood", "forward", partial(likelihood.log_likelihood_maps, z)),
        ("likelihood", "backward", partial(likelihood.log_likelihood_maps_backward, logp, z)),
    ):
        yield Case(tiles, name, launch, _name(dtype))
