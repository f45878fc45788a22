"""A function of tensors, recorded in a CUDA graph per shape and replayed: one launch in place of hundreds."""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..ops.conv3x3 import rounds_to_tf32
from .kept import in_use

Outputs = tuple[Tensor, ...]
# Graphs held at a time; each holds its own memory. The least recently used one goes.
MOST_GRAPHS = 4


class Replay:
    """Calls ``function`` as it is wherever a graph cannot serve: off the GPU, in a compiled function, in a capture.

    A shape's first call is not recorded: most come once, and kernels compile in it. Its second is, with the
    convolutions that cuDNN times to be the fastest, which may be others in another process and so move last digits,
    unless ``torch.backends.cudnn.deterministic``; where it fails, it says so once and calls on. ``function`` must do
    the same work for all tensors of a shape, and what it reads besides must stay where it is. One thread at a time.
    """

    def __init__(self) -> None:
        self._recorded: OrderedDict[Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor], Outputs, list[object]]] = (
            OrderedDict()
        )
        self._met: set[Hashable] = set()
        self._unfit: set[Hashable] = set()

    def __call__(self, function: Callable[..., Outputs], inputs: Sequence[Tensor], state: Hashable = None) -> Outputs:
        """``function(*inputs)``. ``state``: what else the outputs depend on; where it differs, another graph is
        recorded."""
        if not inputs or not _serves(inputs[0]):
            return function(*inputs)
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        arithmetic = (autocast, rounds_to_tf32(), torch.backends.cudnn.deterministic)
        key = (arithmetic, state, *((x.shape, x.stride(), x.dtype, x.device) for x in inputs))
        if key not in self._met or key in self._unfit:
            self._met.add(key)
            return function(*inputs)
        if key not in self._recorded:
            try:
                self._record(key, function, inputs)
            except RuntimeError as error:
                self._unfit.add(key)
                warnings.warn(f"this model cannot be recorded in a CUDA graph ({error}); it runs without", stacklevel=3)
                return function(*inputs)
        self._recorded.move_to_end(key)
        graph, given, outputs, _ = self._recorded[key]
        for static, x in zip(given, inputs, strict=True):
            static.copy_(x)
        graph.replay()
        # The next replay writes over them.
        return tuple(output.clone() for output in outputs)

    def clear(self) -> None:
        self._recorded.clear()
        self._met.clear()
        self._unfit.clear()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A copied or saved model begins anew."""
        return type(self), ()

    def _record(self, key: Hashable, function: Callable[..., Outputs], inputs: Sequence[Tensor]) -> None:
        if len(self._recorded) == MOST_GRAPHS:
            oldest, _ = self._recorded.popitem(last=False)
            self._met.discard(oldest)
        # Tensors of inference mode could not be written to outside it.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(inputs[0].device), _fastest_convolutions():
            given = [torch.empty_like(x).copy_(x) for x in inputs]
            # cuDNN times its algorithms here: while a graph is captured it cannot.
            function(*given)
            graph = torch.cuda.CUDAGraph()
            with in_use() as read, torch.cuda.graph(graph, capture_error_mode="thread_local"):
                outputs = function(*given)
        self._recorded[key] = (graph, given, outputs, read)


@contextmanager
def _fastest_convolutions() -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.deterministic
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class Places:
    """Tells where each weight of a module lies, and how often it has been changed.

    In every call that may be replayed, so not by ``parameters()``, which takes five times as long.
    """

    def __init__(self) -> None:
        self._found: tuple[tuple[nn.Module | None, ...], list[nn.Module]] | None = None

    def of(self, module: nn.Module, tops: tuple[nn.Module | None, ...]) -> tuple[tuple[int, int], ...]:
        """Address and version of each weight and buffer of ``module``, which is searched anew where one of ``tops``,
        the parts of it that are replaced whole, is another than at the last call."""
        if self._found is None or any(a is not b for a, b in zip(self._found[0], tops, strict=True)):
            self._found = (tops, [m for m in module.modules() if m._parameters or m._buffers])
        return tuple(
            (w.data_ptr(), 0 if w.is_inference() else w._version)
            for layer in self._found[1]
            for group in (layer._parameters, layer._buffers)
            for w in group.values()
            if w is not None
        )


def _serves(x: Tensor) -> bool:
    return (
        x.is_cuda
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and not torch.is_grad_enabled()
        and not torch.cuda.is_current_stream_capturing()
    )
