"""Every launcher at the shapes that a model gives it: what is tuned, and what is compiled ahead of time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

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
from ..reference.clamp_forms import find_clamp_form
from ..reference.coupling_spec import OUTPUT_LIMIT, SUBNET_SCALE
from ..reference.image_score import pixels_scored
from ..reference.layer_norm import LAYER_NORM_EPS
from ..scoring import TOP_K

# The default model at 512x512: channels and grid of each level.
LEVELS = ((256, 64), (512, 32), (1024, 16))
CONDITION = 64
CLAMP = 1.9

Settings = dict[str, Any]
# The settings of a coupling within a level, and across the levels, as the launchers take them.
WITHIN: Settings = {
    "raw_scale": SUBNET_SCALE, "clamp": CLAMP, "form": find_clamp_form("tanh").kernel_constant, "limit": None
}  # fmt: skip
ACROSS: Settings = {
    "raw_scale": 1.0, "clamp": CLAMP, "form": find_clamp_form("atan").kernel_constant, "limit": OUTPUT_LIMIT
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class KernelCase:
    """Describes one launch of a kernel."""

    tiles: str
    """The kernel's name in the table of tiles."""
    name: str
    launch: partial[Any]
    arithmetic: str
    """float16, bfloat16, float32, or tf32: float32 operands rounded for the product."""
    level: int = 0
    flops: int = 0
    """Floating-point operations of a matrix product; 0 for what only moves data."""


@dataclass(frozen=True, kw_only=True)
class _Level:
    """Describes the tensors of one level."""

    number: int
    channels: int
    size: int
    batch: int
    dtype: torch.dtype
    device: torch.device

    def image(self, channels: int, batch: int | None = None) -> Tensor:
        """Makes (B, channels, size, size), with this level's batch unless another is given."""
        return new(self.dtype, self.device, self.batch if batch is None else batch, channels, self.size, self.size)

    def vector(self, *shape: int) -> Tensor:
        """Makes a float32 tensor of ``shape``."""
        return new(torch.float32, self.device, *shape)


def kernel_cases(
    levels: Sequence[tuple[int, int]],
    batch: int,
    image_size: int,
    device: torch.device,
    *,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32),
) -> Iterator[KernelCase]:
    """Yields every launcher in each of ``dtypes``, those of scores in float32.

    ``levels``: channels and grid of each. On the meta device tensors have no data.
    """
    for dtype in dtypes:
        for number, (channels, size) in enumerate(levels):
            level = _Level(number=number, channels=channels, size=size, batch=batch, dtype=dtype, device=device)
            yield from _couplings(level)
            yield from _layer_norms(level)
            for arithmetic in ("tf32", "float32") if dtype == torch.float32 else (_name(dtype),):
                yield from _convolutions(level, arithmetic)
        yield from _across_levels(levels, batch, dtype, device)
        # The extractor's first convolution, then its others.
        for channels, size, border in ((3, image_size, 3), *((c // 2, n, 1) for c, n in levels)):
            x = new(dtype, device, batch, channels, size, size)
            padded = partial(reflection_pad.reflection_pad, x, (border, border, border, border))
            yield KernelCase(
                tiles="reflection_pad", name=f"{channels} channels", launch=padded, arithmetic=_name(dtype)
            )
    logp = [new(torch.float32, device, batch, size, size).square().neg() for _, size in levels]
    image = new(torch.float32, device, batch, image_size, image_size).square().neg()
    name = f"{image_size}x{image_size}"
    maps = partial(score_map.score_maps, logp, (image_size, image_size))
    scores = partial(image_score.image_scores, image, pixels_scored(image, TOP_K))
    yield KernelCase(tiles="score_map", name=name, launch=maps, arithmetic="float32")
    yield KernelCase(tiles="image_score", name=name, launch=scores, arithmetic="float32")


def new(dtype: torch.dtype, device: torch.device, *shape: int) -> Tensor:
    """Makes a tensor of normal values; images and weights are in channels-last memory."""
    memory_format = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.randn(shape, device=device).to(dtype, memory_format=memory_format)


def tensors(nested: object) -> Iterator[Tensor]:
    """Yields the tensors in a launcher's arguments or results."""
    yield from (leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _couplings(level: _Level) -> Iterator[KernelCase]:
    channels, half, raw = level.channels, level.image(level.channels // 2), level.image(level.channels)
    log_det, logp = level.vector(level.batch), level.vector(level.batch, level.size, level.size)
    scale, offset = level.vector(channels), level.vector(channels)
    case = partial(KernelCase, arithmetic=_name(level.dtype), level=level.number)
    gain: Settings = {"global_scale": scale.add(10), "index": torch.randperm(channels, device=level.device)}
    affine: Settings = {**gain, "global_offset": offset}
    within: Settings = {**WITHIN, "result": "halves"}
    forward = partial(coupling.coupling, half, half, raw, offset, **affine, **within)
    backward = partial(
        coupling.coupling_backward, [half, half], log_det, half, half, raw=raw, bias=offset, **gain, **within
    )
    name = f"{channels} channels"
    for inverse in (False, True):
        tag = f"{name}, inverse" if inverse else name
        yield case(tiles="coupling", name=tag, launch=partial(forward, inverse=inverse, with_log_det=True))
        yield case(tiles="coupling_backward", name=tag, launch=partial(backward, inverse=inverse))
    predict = partial(forward, inverse=False, with_log_det=False)
    yield case(tiles="coupling", name=f"{name}, no log-det", launch=predict)
    permute = partial(coupling.coupling, half, half, None, None, **affine, **within, inverse=False, with_log_det=False)
    yield case(tiles="coupling", name=f"{name}, permutation alone", launch=permute)
    no_affine: Settings = {"global_scale": None, "index": None}
    across: Settings = {**ACROSS, "inverse": False}
    for result, suffix, grad in (("concat", "", raw), ("likelihood", ", likelihood", logp)):
        tag = f"{name}, across levels{suffix}"
        forward = partial(
            coupling.coupling, half, half, raw, offset, **no_affine, global_offset=None, **across, result=result,
            with_log_det=True,
        )  # fmt: skip
        backward = partial(
            coupling.coupling_backward, [grad], log_det, half, half, raw=raw, bias=offset, **no_affine, **across,
            result=result,
        )  # fmt: skip
        yield case(tiles="coupling", name=tag, launch=forward)
        yield case(tiles="coupling_backward", name=tag, launch=backward)


def _layer_norms(level: _Level) -> Iterator[KernelCase]:
    width = level.channels // 2 + CONDITION
    hidden, condition = level.image(width), level.image(width, 1)
    weight, bias, mean = level.vector(width), level.vector(width), level.vector(level.batch * level.size**2)
    case = partial(KernelCase, name=f"{width} channels", arithmetic=_name(level.dtype), level=level.number)
    forward = partial(layer_norm.layer_norm_relu, hidden, condition, weight, bias, eps=LAYER_NORM_EPS)
    backward = partial(
        layer_norm.layer_norm_relu_backward, hidden, hidden, condition, weight, bias=bias, mean=mean,
        rstd=mean.square(),
    )  # fmt: skip
    yield case(tiles="layer_norm", launch=forward)
    yield case(tiles="layer_norm_backward", launch=backward)


def _convolutions(level: _Level, arithmetic: str) -> Iterator[KernelCase]:
    channels, width, name = level.channels, level.channels // 2 + CONDITION, f"{level.channels} channels"
    precision: Settings = {"precision": "tf32" if arithmetic == "tf32" else "ieee"}
    x, half, hidden = (level.image(c) for c in (channels, channels // 2, width))
    conv1, conv2, heads = (
        new(level.dtype, level.device, outputs, inputs, 3, 3).div(3 * inputs**0.5)
        for outputs, inputs in ((width, channels // 2), (channels, width), (channels, channels // 2))
    )
    bias, weight, condition = level.vector(channels), level.vector(width), level.image(width, 1)

    def case(tiles: str, name: str, launch: partial[Any], products: int) -> KernelCase:
        """Makes a case of this level; ``products``: inputs times outputs of the convolution."""
        flops = 18 * level.batch * level.size**2 * products
        return KernelCase(tiles=tiles, name=name, launch=launch, arithmetic=arithmetic, level=level.number, flops=flops)

    yield case("conv3x3", name, partial(conv3x3.conv3x3, hidden, conv2, bias, **precision), width * channels)
    gradient = partial(conv3x3.conv3x3_input_gradient, x, conv2, **precision)
    yield case("conv3x3", f"{name}, input gradient", gradient, width * channels)
    gradient = partial(conv3x3.conv3x3_weight_gradient, hidden, x, **precision)
    yield case("conv3x3_weight", name, gradient, width * channels)
    for training in (False, True):
        tag = f"{name}, training" if training else name
        settings: Settings = {"with_log_det": training, "with_raw": training, **precision}
        within, across = {**WITHIN, "result": "concat", **settings}, {**ACROSS, "result": "likelihood", **settings}
        fused = partial(conv3x3_coupling.conv3x3_coupling, hidden, conv2, bias, x1=None, x2=half, **within)
        yield case("conv3x3_coupling", tag, fused, width * channels)
        fused = partial(conv3x3_coupling.conv3x3_coupling, half, heads, bias, x1=half, x2=half, **across)
        yield case("conv3x3_coupling", f"{tag}, across levels, likelihood", fused, channels // 2 * channels)
        if fuses_layer_norm(width):
            normed = partial(
                conv3x3_layer_norm.conv3x3_layer_norm_relu, half, conv1, condition, norm=(weight, weight),
                eps=LAYER_NORM_EPS, for_backward=training, **precision,
            )  # fmt: skip
            yield case("conv3x3_layer_norm", tag, normed, channels // 2 * width)


def _across_levels(
    levels: Sequence[tuple[int, int]], batch: int, dtype: torch.dtype, device: torch.device
) -> Iterator[KernelCase]:
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
        yield KernelCase(tiles=tiles, name=name, launch=launch, arithmetic=_name(dtype))
