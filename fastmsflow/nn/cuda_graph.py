"""Records a function of tensors in a CUDA graph per shape and replays it: one launch in place of hundreds."""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..ops.conv3x3 import rounds_to_tf32
from .weight_cache import CachedValue, EmptyInCopies, record_used_values

Outputs = tuple[Tensor, ...]
# Graphs held at a time; each holds its own memory. The least recently used one goes.
MAX_GRAPHS = 4
# Two models at once would leave one's choice of convolutions to the process.
_ONE_BY_ONE = threading.Lock()


_version_of = attrgetter("_version")


@dataclass
class _RecordedGraph:
    """Holds a CUDA graph, the tensors that it reads and writes, and the cached values that it reads."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: Outputs
    cached_values: list[CachedValue]

    def __post_init__(self) -> None:
        self._weights = [weight for cached in self.cached_values for weight in cached.weights]
        self._versions = list(map(_version_of, self._weights))

    def is_valid(self) -> bool:
        """Tells whether the weights behind the cached values are unchanged."""
        return list(map(_version_of, self._weights)) == self._versions


class CudaGraphCache(EmptyInCopies):
    """Records calls of a function in CUDA graphs, one a shape, and replays them.

    The function is called as it is if a graph cannot serve: off the GPU, in a compiled function, in a capture.

    A shape's first call is not recorded: most come once, and kernels compile in it. Its second is, with the
    convolutions that cuDNN times to be the fastest, which may be others in another process and so move last digits,
    unless ``torch.backends.cudnn.deterministic``. If recording fails, one warning says so and the function is called.

    The function must do the same work for all tensors of a shape, and other tensors that it reads must stay where they
    are: a replay reads them as they then are. If a cached value (fastmsflow.nn.weight_cache) that a graph reads is out
    of date, the shape counts as new. Use it from one thread at a time.
    """

    def __init__(self) -> None:
        self._recorded: OrderedDict[Hashable, _RecordedGraph] = OrderedDict()
        self._seen: set[Hashable] = set()
        self._unfit: set[Hashable] = set()

    def __call__(
        self, function: Callable[..., Outputs], inputs: Sequence[Tensor], state: Callable[[], Hashable] = lambda: None
    ) -> Outputs:
        """Returns ``function(*inputs)``, by a graph if one serves.

        ``state`` returns what else a graph depends on: for another value another graph is recorded. It is called only
        if a graph may serve.
        """
        if not inputs or not _serves(inputs[0]):
            return function(*inputs)
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        arithmetic = (autocast, rounds_to_tf32(), torch.backends.cudnn.deterministic)
        key = (arithmetic, state(), *((x.shape, x.stride(), x.dtype, x.device) for x in inputs))
        if key in self._recorded and not self._recorded[key].is_valid():
            del self._recorded[key]
            self._seen.discard(key)
        if key not in self._seen or key in self._unfit:
            self._seen.add(key)
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
        """Drops all graphs."""
        self._recorded.clear()
        self._seen.clear()
        self._unfit.clear()

    def _record(self, key: Hashable, function: Callable[..., Outputs], inputs: Sequence[Tensor]) -> None:
        if len(self._recorded) == MAX_GRAPHS:
            oldest, _ = self._recorded.popitem(last=False)
            self._seen.discard(oldest)
        # Tensors of inference mode could not be written to outside it.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(inputs[0].device), _recording():
            static = [torch.empty_like(x).copy_(x) for x in inputs]
            # cuDNN times its algorithms here: while a graph is captured it cannot.
            function(*static)
            graph = torch.cuda.CUDAGraph()
            with record_used_values() as used, torch.cuda.graph(graph, capture_error_mode="thread_local"):
                outputs = function(*static)
        self._recorded[key] = _RecordedGraph(graph, static, outputs, used)


@contextmanager
def _recording() -> Iterator[None]:
    """Has cuDNN take its fastest convolutions, and autocast round weights inside the graph."""
    # Weights that autocast has rounded before are gone when the caller leaves autocast.
    with _ONE_BY_ONE:
        benchmark, cached = torch.backends.cudnn.benchmark, torch.is_autocast_cache_enabled()
        torch.backends.cudnn.benchmark = not torch.backends.cudnn.deterministic
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = benchmark
            torch.set_autocast_cache_enabled(cached)


class WeightAddresses(EmptyInCopies):
    """Counts how often the addresses of a module's weights have changed.

    The count grows if a weight, a buffer or a submodule was moved or replaced since the last call. It does not grow if
    a weight was changed in place: a graph reads the weight where it is.

    The module is compared in every call that may be replayed. A question to a tensor costs Python 0.1 us, and the
    default model has 449 of them: so each is asked for its address alone, and containers compare themselves.
    """

    def __init__(self) -> None:
        self._count = 0
        self._registries: list[dict[str, Any]] = []
        self._entries: list[dict[str, Any]] = []
        self._tensors: list[Tensor] = []
        self._addresses: list[int] = []

    def version_of(self, module: nn.Module) -> int:
        """Returns the count for ``module``, which is the same one at every call."""
        if self._count == 0 or not self._is_current():
            self._count += 1
            self._registries = [r for m in module.modules() for r in (m._modules, m._parameters, m._buffers) if r]
            self._entries = [dict(registry) for registry in self._registries]
            # Only training reads how many batches a norm has seen, and nothing is replayed in training.
            self._tensors = [
                entry
                for entries in self._entries
                for name, entry in entries.items()
                if isinstance(entry, Tensor) and name != "num_batches_tracked"
            ]
            self._addresses = list(map(Tensor.data_ptr, self._tensors))
        return self._count

    def _is_current(self) -> bool:
        """Tells whether nothing was moved or replaced."""
        with _TensorsDiffer():
            if self._registries != self._entries:
                return False
        return list(map(Tensor.data_ptr, self._tensors)) == self._addresses


class _TensorsDiffer(TorchFunctionMode):
    """Makes a tensor unequal to every other, so that containers are equal only where they hold the same tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> bool:
        return False


def _serves(x: Tensor) -> bool:
    """Tells whether a CUDA graph may serve a call with ``x``."""
    return (
        x.is_cuda
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and not torch.is_grad_enabled()
        and not torch.cuda.is_current_stream_capturing()
    )
