"""An operation by the kernels against its twin in float64: outputs, and every gradient."""

from collections.abc import Callable, Iterator, Sequence

import torch
from tolerances import OPERATION
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = ("channels_last", "channels_first", "slice", "every_other")


def tensor(shape: Sequence[int], dtype: torch.dtype, layout: str = "channels_last", scale: float = 1.0) -> Tensor:
    """Random values; ``slice``: some channels of a wider tensor; ``every_other``: every second row of a taller one."""
    b, c, h, w = shape
    if layout == "slice":
        wide = tensor((b, c + 6, h, w), dtype, scale=scale)
        return wide[:, 3 : c + 3]
    if layout == "every_other":
        return tensor((b, c, 2 * h, w), dtype, scale=scale)[:, :, ::2]
    x = (torch.randn(shape) * scale).to(DEVICE, dtype)
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


def wide(x: object) -> object:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def error(ours: Tensor, truth: Tensor, elements: int) -> float:
    """max |ours - truth| / max |truth|.

    A value that sums n of the input's ``elements`` can cancel to nearly 0 and keeps the rounding of its terms, which
    are of order 1: the error counts against sqrt(n) at least.
    """
    floor = max(1.0, elements / truth.numel()) ** 0.5
    return ((ours.double() - truth).abs().max() / truth.abs().max().clamp_min(floor)).item()


def assert_twins(ours: Callable, twin: Callable, arguments: Sequence[object], gradients: bool = True) -> None:
    """``ours(*arguments, backend="triton")`` equals ``twin(*arguments)`` in float64 within OPERATION's tolerance, and
    so do the gradients by all floating-point arguments, for random gradients of the outputs."""
    dtype = next(a.dtype for a in arguments if isinstance(a, Tensor) and a.is_floating_point())
    tolerance = OPERATION[str(dtype)[6:]]
    elements = max(a.numel() for a in arguments if isinstance(a, Tensor))
    narrow = [a.detach().requires_grad_(gradients) if _differentiable(a) else a for a in arguments]
    exact = [wide(a.detach()).requires_grad_(gradients) if _differentiable(a) else a for a in arguments]
    results, truths = list(flatten(ours(*narrow, backend="triton"))), list(flatten(twin(*exact)))
    assert len(results) == len(truths)
    for result, truth in zip(results, truths, strict=True):
        assert result.shape == truth.shape
        assert error(result, truth, elements) < tolerance
    if not gradients:
        return
    torch.manual_seed(1)
    upstream = [torch.randn_like(truth) for truth in truths]
    torch.autograd.backward(results, [u.to(r.dtype) for u, r in zip(upstream, results, strict=True)])
    torch.autograd.backward(truths, [u.to(r.dtype).double() for u, r in zip(upstream, results, strict=True)])
    for i, (a, b) in enumerate(zip(narrow, exact, strict=True)):
        if _differentiable(a):
            assert a.grad is not None, f"argument {i} has no gradient"
            assert a.grad.dtype == a.dtype
            assert error(a.grad, b.grad, elements) < tolerance, f"gradient of argument {i}"


def flatten(result: object) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    else:
        for part in result:
            yield from flatten(part)


def _differentiable(a: object) -> bool:
    return isinstance(a, Tensor) and a.is_floating_point()
