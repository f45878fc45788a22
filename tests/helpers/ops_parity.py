"""An operation by the kernels against its twin in float64: outputs, and every gradient."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from hypothesis import settings
from torch import Tensor

from tests.helpers.error_log import assert_within
from tests.helpers.tolerances import FLIPPED, OPERATION, OPERATION_CLOSE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = ("channels_last", "channels_first", "slice", "every_other")


def examples(most: int) -> settings:
    """Sets how many examples Hypothesis draws. On a GPU they are few: each has another shape, for which kernels are
    compiled anew."""
    return settings(max_examples=min(most, 4) if DEVICE != "cpu" else most, deadline=None)


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


def error(ours: Tensor, reference: Tensor, elements: int) -> float:
    """max |ours - reference| / max |reference|.

    A value that sums n of the input's ``elements`` can cancel to nearly 0 and keeps the rounding of its terms, which
    are of order 1: the error counts against sqrt(n) at least.
    """
    floor = max(1.0, elements / reference.numel()) ** 0.5
    return ((ours.double() - reference).abs().max() / reference.abs().max().clamp_min(floor)).item()


def error_in_the_norm(ours: Tensor, reference: Tensor) -> float:
    """|ours - reference| / |reference|, the roots of the sums of squares."""
    reference = reference.to(ours.device).double()
    return ((ours.double() - reference).norm() / reference.norm()).item()


def twin_errors(
    ours: Callable,
    twin: Callable,
    arguments: Sequence[object],
    gradients: bool = True,
    bounds: Mapping[str, float] = OPERATION,
    flips: bool = False,
) -> Iterator[tuple[str, float, float]]:
    """Yields (what, error, bound) of each output of ``ours(*arguments, backend="triton")``, ``twin(*arguments)`` in
    float64 being the reference, and of the gradients by all floating-point arguments, for random gradients of the
    outputs.

    ``bounds`` holds one for each dtype, and one for "tf32", which float32 is where PyTorch's flag allows it.
    ``flips`` says that rounding may carry values across a ReLU's corner: gradients then err in the norm, by FLIPPED.
    """
    dtype = next(a.dtype for a in arguments if _differentiable(a))
    name = str(dtype)[6:]
    if name == "float32" and torch.backends.cudnn.allow_tf32:
        name = "tf32"
    elements = max(a.numel() for a in arguments if isinstance(a, Tensor))
    narrow = [a.detach().requires_grad_(gradients) if _differentiable(a) else a for a in arguments]
    exact = [wide(a.detach()).requires_grad_(gradients) if _differentiable(a) else a for a in arguments]
    results, references = list(flatten(ours(*narrow, backend="triton"))), list(flatten(twin(*exact)))
    assert len(results) == len(references)
    operation = getattr(ours, "__name__", "operation")
    for i, (result, reference) in enumerate(zip(results, references, strict=True)):
        assert result.shape == reference.shape
        yield f"{operation}, {name}: output {i}", error(result, reference, elements), bounds[name]
    if not gradients:
        return
    torch.manual_seed(1)
    upstream = [torch.randn(reference.shape).to(reference) for reference in references]
    torch.autograd.backward(results, [u.to(r.dtype) for u, r in zip(upstream, results, strict=True)])
    torch.autograd.backward(references, [u.to(r.dtype).double() for u, r in zip(upstream, results, strict=True)])
    for i, (a, b) in enumerate(zip(narrow, exact, strict=True)):
        if _differentiable(a):
            what = f"{operation}, {name}: gradient of argument {i}"
            assert a.grad is not None, f"{what} is missing"
            assert a.grad.dtype == a.dtype
            if flips:
                yield what, error_in_the_norm(a.grad, b.grad), FLIPPED[name]
            else:
                yield what, error(a.grad, b.grad, elements), bounds[name]


def assert_twins(ours: Callable, twin: Callable, arguments: Sequence[object], **options: object) -> None:
    """Fails unless all of ``twin_errors(ours, twin, arguments, **options)`` are within their bounds."""
    assert_within(twin_errors(ours, twin, arguments, **options))


def assert_not_finite_alike(ours: Callable, twin: Callable, arguments: Sequence[object]) -> None:
    """Fails unless NaN and inf in ``arguments`` reach what they reach in the twin, and all else equals.

    The twin computes on a CPU: a vendor's convolution may take whole tiles of an image together.
    """
    results = flatten(ours(*arguments, backend="triton"))
    references = flatten(twin(*(a.cpu() if isinstance(a, Tensor) else a for a in arguments)))
    torch.testing.assert_close([r.cpu() for r in results], list(references), equal_nan=True, **OPERATION_CLOSE)


def flatten(result: object) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    else:
        for part in result:
            yield from flatten(part)


def _differentiable(a: object) -> bool:
    return isinstance(a, Tensor) and a.is_floating_point()
