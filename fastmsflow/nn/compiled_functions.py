"""Compiles functions of a frozen module by PyTorch's Inductor, for a CPU."""

import logging
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit._trace import is_tracing

from .. import backend
from ..inductor import compiler_errors, protect_constants
from .cuda_graph import Outputs

_LOG = logging.getLogger("fastmsflow")
# A program serves one batch size, or from the second size on all; torch counts them for all models together.
MOST_PROGRAMS = 256
OPTIONS = {"freezing": True, "post_grad_custom_pre_pass": protect_constants}


class CompiledFunctions:
    """Calls functions of a module on a CPU, compiled at their first call if ``enabled``; elsewhere as they are.

    Weights become constants of the programs, packed for the CPU, so that they take their memory once more. A program
    is dropped, and compiled anew at the next call, if a weight, the number of threads or the backend has changed.
    Copies compile their own programs.
    """

    def __init__(self, enabled: bool = False) -> None:
        self.enabled = enabled
        self._programs: dict[str, tuple[Hashable, Callable[..., Any]]] = {}

    def __reduce__(self) -> tuple[type, tuple[bool]]:
        return type(self), (self.enabled,)

    def clear(self) -> None:
        """Drops the programs."""
        self._programs.clear()

    def __call__(self, function: Callable[..., Outputs], inputs: Sequence[Tensor], module: nn.Module) -> Outputs:
        """Returns ``function(*inputs)``. ``function``: a bound method, which uses weights of ``module`` alone.

        Raises: UnavailableError if the compiler fails.
        """
        if not self._serves(inputs):
            return function(*inputs)
        # One memory format, since a program serves one.
        inputs = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
        name, state = function.__name__, _state(module)
        known, program = self._programs.get(name, (None, None))
        # Inference mode would be a program of its own.
        with torch.inference_mode(False), torch.no_grad():
            if program is None or known != state:
                # Fills the caches that are no part of a program, and tells of unfit inputs in this library's words.
                function(*inputs)
                program = torch.compile(function, fullgraph=True, options=OPTIONS)
                self._programs[name] = state, program
            return _call(name, program, inputs)

    def _serves(self, inputs: Sequence[Tensor]) -> bool:
        with_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        is_traced = torch.compiler.is_compiling() or is_tracing()
        return self.enabled and inputs[0].device.type == "cpu" and not with_gradient and not is_traced


def _call(name: str, program: Callable[..., Outputs], inputs: Sequence[Tensor]) -> Outputs:
    from torch._dynamo.utils import counters

    compiled, begin = counters["stats"]["unique_graphs"], time.perf_counter()
    # Without the first Dynamo makes weights inputs of the program, and Inductor finds nothing to freeze.
    options = {
        "prepare_freezing": True,
        "recompile_limit": MOST_PROGRAMS,
        "accumulated_recompile_limit": MOST_PROGRAMS,
    }
    with torch._dynamo.config.patch(options), compiler_errors():
        results = program(*inputs)
    if counters["stats"]["unique_graphs"] > compiled:
        seconds = time.perf_counter() - begin
        _LOG.warning("torch.compile: %s took %.0f s, at a batch of %d", name.strip("_"), seconds, len(inputs[0]))
    return results


def _state(module: nn.Module) -> Hashable:
    """Returns what a program was compiled for: weights, threads and backend."""
    tensors = (*module.parameters(), *module.buffers())
    weights = tuple((t.data_ptr(), None if t.is_inference() else t._version) for t in tensors)
    return weights, torch.get_num_threads(), backend.override()
