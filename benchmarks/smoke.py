"""Runs every kernel, forward and backward, at full size in half precision, and tells how far it is from float64.

``python -m benchmarks.smoke [--json FILE]`` prints a row a result. An error is |ours - reference| / |reference|, in the
norm. It may be what a stored value's rounding makes of it (tests/helpers/tolerances.py), or half as large again as
plain PyTorch's in the same precision: a value that ReLU sees on its other side moves a gradient by more than rounding,
and in PyTorch others do. Exit status: 1 where an error is larger or an operation fails; all others run all the same.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.parity_gate import error
from benchmarks.suite_settings import DEVICE, SIZES, Size, hasten_interpreter
from fastmsflow.benchmarking import CONDITION, tensors
from fastmsflow.files import write_json
from fastmsflow.kernels import configs
from fastmsflow.kernels.conv3x3_layer_norm import fuses_layer_norm
from fastmsflow.kernels.launch import INTERPRETED
from fastmsflow.ops import conv3x3, conv3x3_coupling, conv3x3_layer_norm, coupling, fusion, layer_norm, likelihood
from fastmsflow.ops.image_score import image_scores
from fastmsflow.ops.reflection_pad import reflection_pad
from fastmsflow.ops.score_map import score_maps
from fastmsflow.reference import conv3x3 as conv3x3_twin
from fastmsflow.reference import conv3x3_coupling as conv3x3_coupling_twin
from fastmsflow.reference import conv3x3_layer_norm as conv3x3_layer_norm_twin
from fastmsflow.reference import coupling as coupling_twin
from fastmsflow.reference import fusion as fusion_twin
from fastmsflow.reference import image_score as image_score_twin
from fastmsflow.reference import layer_norm as layer_norm_twin
from fastmsflow.reference import likelihood as likelihood_twin
from fastmsflow.reference import reflection_pad as reflection_pad_twin
from fastmsflow.reference import score_map as score_map_twin
from fastmsflow.reference.coupling_spec import CouplingSpec, GlobalAffine
from tests.helpers.tolerances import OPERATION

BATCH = 2
DTYPES = (torch.float16, torch.bfloat16)
PYTORCHS = 1.5
# The interpreter truncates to bfloat16 where a GPU rounds, so errors are up to twice as large and of one sign.
TRUNCATED = 4.0
CLAMP = 1.9


@dataclass(frozen=True)
class Operation:
    """One operation at one shape, and the kernels that compute it, named as in the table of tiles."""

    name: str
    forward: str
    backward: tuple[str, ...]
    ours: Callable
    twin: Callable
    arguments: Sequence[object]


@dataclass(frozen=True)
class Finding:
    """Holds how far one result is from float64, or why there is none."""

    kernels: tuple[str, ...]
    arithmetic: str
    what: str
    error: float | None
    """NaN where a place of a poisoned buffer was not written."""
    bound: float | None
    fault: str | None = None

    @property
    def green(self) -> bool:
        return self.error is not None and self.bound is not None and self.error < self.bound


def operations(size: Size, dtype: torch.dtype) -> Iterator[Operation]:
    """Every operation at every level's shape."""
    for channels, height in size.kernel_levels:
        yield from _of_level(channels, height, dtype)
    levels = [_tensor(dtype, BATCH, c, h, h) for c, h in size.kernel_levels]
    halves = [level[:, : level.shape[1] // 2] for level in levels]
    joint = _tensor(dtype, BATCH, sum(level.shape[1] for level in halves), *halves[-1].shape[2:])
    yield Operation(
        "pool across levels", "pool", ("pool",), _listed(fusion.pool_and_concat),
        lambda *maps: fusion_twin.pool_and_concat(maps), halves,
    )  # fmt: skip
    yield Operation(
        "upsample across levels", "upsample", ("upsample",),
        lambda joint, bias, *maps, backend: fusion.split_and_upsample(joint, bias, maps, backend),
        lambda joint, bias, *maps: fusion_twin.split_and_upsample(joint, bias, maps),
        [joint, _vector(joint.shape[1]), *halves],
    )  # fmt: skip
    yield Operation(
        "likelihood", "likelihood", ("likelihood",), _listed(likelihood.log_likelihood_maps),
        lambda *z: likelihood_twin.log_likelihood_maps(z), levels,
    )  # fmt: skip
    yield Operation(
        "padding by reflection", "reflection_pad", (), lambda x, backend: reflection_pad(x, (1, 1, 1, 1), backend),
        lambda x: reflection_pad_twin.reflection_pad(x, (1, 1, 1, 1)), [levels[0]],
    )  # fmt: skip
    logp = [-0.5 * level.float().square().mean(dim=1) for level in levels]
    image_size = (size.image, size.image)
    yield Operation(
        "score maps", "score_map", (), lambda *logp, backend: score_maps(logp, image_size, backend),
        lambda *logp: score_map_twin.score_maps(logp, image_size), logp,
    )  # fmt: skip
    pixels = -torch.rand(BATCH, *image_size, device=DEVICE).mul(8).square()
    yield Operation("image scores", "image_score", (), image_scores, image_score_twin.image_scores, [pixels, 0.03])


def _of_level(channels: int, height: int, dtype: torch.dtype) -> Iterator[Operation]:
    width, half = channels // 2 + CONDITION, channels // 2
    at = f"{channels} channels, {height}x{height}"
    x, raw, hidden = (_tensor(dtype, BATCH, c, height, height) for c in (channels, channels, width))
    x1, x2 = x[:, :half], _tensor(dtype, BATCH, half, height, height)
    scale = coupling_twin.initial_global_scale() + _vector(channels)
    bias, perm = _vector(channels), torch.randperm(channels).to(DEVICE)
    affine = [scale, _vector(channels), perm, perm.argsort()]
    within, concat = CouplingSpec(clamp=CLAMP), CouplingSpec.fusion(CLAMP, bounded=True)
    likelihood_alone = CouplingSpec.fusion(CLAMP, bounded=True, result="likelihood")
    for name, spec, arguments in (
        ("coupling", within, [x1, x2, raw * 8, bias, *affine]),
        ("fusion_coupling_concat", concat, [x1, x2, raw * 3, bias]),
        ("fusion_coupling_concat_likelihood", likelihood_alone, [x1, x2, raw * 3, bias]),
    ):
        ours, twin = _coupling(coupling.coupling, spec), _coupling(coupling_twin.coupling, spec)
        yield Operation(f"{name}, {at}", "coupling", ("coupling_backward",), ours, twin, arguments)
    ours, twin = (
        _coupling_inverse(coupling.coupling_inverse, within),
        _coupling_inverse(coupling_twin.coupling_inverse, within),
    )
    yield Operation(f"coupling_inverse, {at}", "coupling", ("coupling_backward",), ours, twin, [x, raw * 8, *affine])
    norm = [_vector(width), _vector(width), _tensor(dtype, 1, width, height, height)]
    yield Operation(
        f"layer norm, {at}", "layer_norm", ("layer_norm_backward",),
        layer_norm.layer_norm_relu, layer_norm_twin.layer_norm_relu, [hidden, *norm],
    )  # fmt: skip
    first, second, heads = (_weight(dtype, *io) for io in ((half, width), (width, channels), (half, channels)))
    bias = bias.to(dtype)
    gradients = ("conv3x3", "conv3x3_weight")
    yield Operation(
        f"convolution, {at}", "conv3x3", gradients, conv3x3.conv3x3, conv3x3_twin.conv3x3, [hidden, second, bias]
    )
    if fuses_layer_norm(width):
        yield Operation(
            f"convolution and layer norm, {at}", "conv3x3_layer_norm", ("layer_norm_backward", *gradients),
            _normed(conv3x3_layer_norm.conv3x3_layer_norm_relu),
            _normed(conv3x3_layer_norm_twin.conv3x3_layer_norm_relu), [x1, first, *norm],
        )  # fmt: skip
    yield Operation(
        f"convolution and coupling, {at}", "conv3x3_coupling", ("coupling_backward", *gradients),
        _convolution_and_coupling(conv3x3_coupling.conv3x3_coupling, within),
        _convolution_and_coupling(conv3x3_coupling_twin.conv3x3_coupling, within),
        [hidden, second * 8, bias, x1, x2, *affine],
    )  # fmt: skip
    yield Operation(
        f"convolution, coupling and likelihood, {at}", "conv3x3_coupling", ("coupling_backward", *gradients),
        _convolution_and_coupling(conv3x3_coupling.conv3x3_coupling, likelihood_alone),
        _convolution_and_coupling(conv3x3_coupling_twin.conv3x3_coupling, likelihood_alone),
        [x1, heads, bias, x1, x2],
    )  # fmt: skip


def _coupling(function: Callable, spec: CouplingSpec) -> Callable:
    return lambda x1, x2, raw, bias, *affine, **options: function(
        (x1, x2), raw, bias, spec=spec, affine=_global_affine(affine), **options
    )


def _coupling_inverse(function: Callable, spec: CouplingSpec) -> Callable:
    return lambda z, raw, *affine, **options: function(z, raw, spec=spec, affine=_global_affine(affine), **options)


def _convolution_and_coupling(function: Callable, spec: CouplingSpec) -> Callable:
    return lambda hidden, weight, bias, x1, x2, *affine, **options: function(
        hidden, weight, bias, (x1, x2), spec=spec, affine=_global_affine(affine), **options
    )


def _normed(function: Callable) -> Callable:
    return lambda x, weight, norm_weight, norm_bias, condition, **options: function(
        x, weight, (norm_weight, norm_bias), condition, **options
    )


def _global_affine(tensors: Sequence[Tensor]) -> GlobalAffine | None:
    """``tensors``: scale, offset, permutation and its inverse, or nothing."""
    if not tensors:
        return None
    scale, offset, perm, inverse_perm = tensors
    return GlobalAffine(scale=scale, offset=offset, perm=perm, inverse_perm=inverse_perm)


def _listed(ours: Callable) -> Callable:
    return lambda *maps, backend: ours(maps, backend)


def _tensor(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype, memory_format=torch.channels_last)


def _vector(length: int) -> Tensor:
    return torch.randn(length, device=DEVICE)


def _weight(dtype: torch.dtype, inputs: int, outputs: int) -> Tensor:
    return _tensor(torch.float32, outputs, inputs, 3, 3).div((9 * inputs) ** 0.5).to(dtype)


def examined(operation: Operation, dtype: torch.dtype) -> Iterator[Finding]:
    """Yields findings on the operation's outputs, and on its gradients by all floating-point arguments."""
    arithmetic = str(next(tensors(operation.arguments)).dtype)[6:]
    bound = OPERATION[arithmetic] * (TRUNCATED if INTERPRETED and arithmetic == "bfloat16" else 1)
    gradients = bool(operation.backward)
    try:
        given = list(operation.arguments)
        ours = _results(lambda *a: operation.ours(*a, backend="triton"), given, gradients)
        theirs = _results(operation.twin, given, gradients)
        reference = _results(operation.twin, [_wide(a) for a in given], gradients)
    except Exception as fault:
        kernels = (operation.forward, *operation.backward)
        yield Finding(kernels, arithmetic, operation.name, None, None, f"{type(fault).__name__}: {fault}")
        return
    for kind, kernels, mine, other, true in zip(
        ("output", "gradient"), ((operation.forward,), operation.backward), ours, theirs, reference, strict=True
    ):
        for i, (a, b, c) in enumerate(zip(mine, other, true, strict=True)):
            allowed = max(bound, PYTORCHS * error(b, c))
            yield Finding(kernels, arithmetic, f"{operation.name}: {kind} {i}", error(a, c), allowed)


def _results(function: Callable, arguments: Sequence[object], gradients: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients for the same random gradients of the outputs, whoever computes."""
    leaves = [a.detach().requires_grad_(gradients) if _differentiable(a) else a for a in arguments]
    outputs = list(tensors(function(*leaves)))
    if not gradients:
        return outputs, []
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(out.shape, generator=generator).to(out.device, torch.bfloat16) for out in outputs]
    torch.autograd.backward(outputs, [u.to(out.dtype) for u, out in zip(upstream, outputs, strict=True)])
    return [out.detach() for out in outputs], [a.grad for a in leaves if _differentiable(a)]


def _differentiable(a: object) -> bool:
    return isinstance(a, Tensor) and a.is_floating_point()


def _wide(a: object) -> object:
    return a.double() if _differentiable(a) else a


def poison_buffers() -> None:
    """Fills new buffers with NaN from now on, so that what a kernel leaves unwritten shows."""
    empty = torch.empty

    def nan(*args, **kwargs):
        buffer = empty(*args, **kwargs)
        return buffer.fill_(float("nan")) if buffer.is_floating_point() else buffer

    torch.empty = nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="default", help="small: for tests")
    parser.add_argument("--json", type=Path, help="a file for the findings so far, written anew after each operation")
    options = parser.parse_args()
    hasten_interpreter()
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False
    poison_buffers()
    findings: list[Finding] = []
    with ExitStack() as stack:
        for kind in configs.KINDS:
            stack.enter_context(configs.force_convolution(kind, True, DEVICE))
        for dtype in DTYPES:
            for operation in operations(SIZES[options.size], dtype):
                for finding in examined(operation, dtype):
                    findings.append(finding)
                    _print(finding)
                if options.json is not None:
                    write_json(options.json, [asdict(f) | {"green": f.green} for f in findings])
    red = [finding for finding in findings if not finding.green]
    print(f"{len(findings)} results, {len(red)} red")
    sys.exit(1 if red else 0)


def _print(finding: Finding) -> None:
    mark = "green" if finding.green else "RED  "
    figures = finding.fault or f"{finding.error:.1e}, at most {finding.bound:.1e}"
    print(f"{mark} {finding.arithmetic} {finding.what}: {figures}", flush=True)


if __name__ == "__main__":
    main()
