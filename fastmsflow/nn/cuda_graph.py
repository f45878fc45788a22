"""A function of tensors, recorded in a CUDA graph per shape and replayed: one launch in place of hundreds."""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..ops.conv3x3 import rounds_to_tf32
from .weight_cache import in_use

Outputs = tuple[Tensor, ...]
# Graphs held at a time; each holds its own memory. The least recently used one goes.
MOST_GRAPHS = 4
_changes = attrgetter("_version")


@dataclass
class _Recorded:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: Outputs
    kept: list[object]
    """Values kept of weights that the graph reads, with the weights."""

    def __post_init__(self) -> None:
        self._weights = [w for _, weights in cast(list[tuple[object, Sequence[Tensor]]], self.kept) for w in weights]
        self._changes = list(map(_changes, self._weights))

    def holds(self) -> bool:
        """Tells whether all that was kept of weights still is what they lead to."""
        return list(map(_changes, self._weights)) == self._changes


class CudaGraphCache:
    """Calls ``function`` as it is wherever a graph cannot serve: off the GPU, in a compiled function, in a capture.

    A shape's first call is not recorded: most come once, and kernels compile in it. Its second is, with the
    convolutions that cuDNN times to be the fastest, which may be others in another process and so move last digits,
    unless ``torch.backends.cudnn.deterministic``; where it fails, it says so once and calls on. ``function`` must do
    the same work for all tensors of a shape, and what it reads besides must stay where it is: a replay reads it as it
    then is. Where what was kept of weights (nn.kept) no longer holds, the shape is met anew. One thread at a time.
    """

    def __init__(self) -> None:
        self._recorded: OrderedDict[Hashable, _Recorded] = OrderedDict()
        self._met: set[Hashable] = set()
        self._unfit: set[Hashable] = set()

    def __call__(
        self, function: Callable[..., Outputs], inputs: Sequence[Tensor], state: Callable[[], Hashable] = lambda: None
    ) -> Outputs:
        """Returns ``function(*inputs)``. ``state`` tells what else a graph depends on: where it returns another value,
        another graph is recorded. It is called only where a graph may serve."""
        if not inputs or not _serves(inputs[0]):
            return function(*inputs)
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        arithmetic = (autocast, rounds_to_tf32(), torch.backends.cudnn.deterministic)
        key = (arithmetic, state(), *((x.shape, x.stride(), x.dtype, x.device) for x in inputs))
        if key in self._recorded and not self._recorded[key].holds():
            del self._recorded[key]
            self._met.discard(key)
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
        recorded = self._recorded[key]
        for static, x in zip(recorded.inputs, inputs, strict=True):
            static.copy_(x)
        recorded.graph.replay()
        # The next replay writes over them.
        return tuple(output.clone() for output in recorded.outputs)

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
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(inputs[0].device), _recording():
            given = [torch.empty_like(x).copy_(x) for x in inputs]
            # cuDNN times its algorithms here: while a graph is captured it cannot.
            function(*given)
            graph = torch.cuda.CUDAGraph()
            with in_use() as read, torch.cuda.graph(graph, capture_error_mode="thread_local"):
                outputs = function(*given)
        self._recorded[key] = _Recorded(graph, given, outputs, read)


@contextmanager
def _recording() -> Iterator[None]:
    """Has cuDNN take its fastest convolutions, and autocast round weights in the graph: what it has rounded before is
    gone when the caller leaves autocast."""
    benchmark, cached = torch.backends.cudnn.benchmark, torch.is_autocast_cache_enabled()
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.deterministic
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
        torch.set_autocast_cache_enabled(cached)


class WeightAddresses:
    """Counts the places that a module's weights have been in.

    The count grows when a weight, a buffer or a submodule was moved or replaced since it was last asked for. It does
    not when a weight was changed in place: a graph reads it where it is.
    """

    def __init__(self) -> None:
        self._count = 0
        self._seen: _Snapshot | None = None

    def of(self, module: nn.Module) -> int:
        """Returns the number of the places that ``module``, the same one at every call, has its weights in."""
        if self._seen is None or not self._seen.holds():
            self._count += 1
            self._seen = _Snapshot(module)
        return self._count

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A copied or saved model begins anew."""
        return type(self), ()


class _Snapshot:
    """Keeps which tensors and submodules a module had, and where the tensors lay.

    It is compared in every call that may be replayed. To ask a tensor costs Python 0.1 us, and the default model has
    449 of them: so each is asked for its address alone, and containers find by themselves whether they are the same.
    """

    def __init__(self, module: nn.Module) -> None:
        self._registries = [r for m in module.modules() for r in (m._modules, m._parameters, m._buffers) if r]
        self._entries = [dict(registry) for registry in self._registries]
        # Only training reads how many batches a norm has seen, and nothing is replayed in training.
        self._tensors = [
            entry
            for entries in self._entries
            for name, entry in entries.items()
            if isinstance(entry, Tensor) and name != "num_batches_tracked"
        ]
        self._addresses = self._lie()

    def holds(self) -> bool:
        with _TensorsDiffer():
            if self._registries != self._entries:
                return False
        return self._lie() == self._addresses

    def _lie(self) -> list[int]:
        return list(map(Tensor.data_ptr, self._tensors))


class _TensorsDiffer(TorchFunctionMode):
    """Makes a tensor unequal to every other, so that containers are equal only where they hold the same tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> bool:
        return False


def _serves(x: Tensor) -> bool:
    return (
        x.is_cuda
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and not torch.is_grad_enabled()
        and not torch.cuda.is_current_stream_capturing()
    )
