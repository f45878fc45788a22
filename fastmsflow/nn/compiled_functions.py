"""Compiles functions of a frozen module by PyTorch's Inductor, for a CPU."""

import logging
import sys
import time
import weakref
from collections.abc import Callable, Hashable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import reset_code
from torch.jit._trace import is_tracing

from .. import backend
from ..cpu.convolution import in_programs, nothing_kept
from ..inductor import compiler_errors, protect_constants
from ..weight_state import WeightState
from .cuda_graph import Outputs

_LOG = logging.getLogger("fastmsflow")
# A program serves one batch size, or from the second size on all.
MOST_PROGRAMS = 256
Option = str | int | bool | Callable[..., Any]
OPTIONS: dict[str, Option] = {"freezing": True, "post_grad_custom_pre_pass": protect_constants}


class _Program:
    """Holds a compiled function and what it was compiled for: weights, threads and backend."""

    def __init__(self, compiled: Callable[..., Any], weights: Sequence[Tensor]) -> None:
        self.compiled = compiled
        self._weights, self._settings = WeightState(weights), self._settings_now()

    def is_of(self, weights: Sequence[Tensor]) -> bool:
        """Tells whether weights, threads and backend are still those."""
        return self._settings == self._settings_now() and self._weights.is_of(weights)

    @staticmethod
    def _settings_now() -> Hashable:
        return torch.get_num_threads(), backend.override()


class CompiledFunctions:
    """Calls functions of a module on a CPU, compiled at their first call if ``enabled``; elsewhere as they are.

    Weights become constants of the programs, packed for the CPU, so that they take their memory once more. A program
    is dropped, and compiled anew at the next call, if a weight, the number of threads or the backend has changed.
    Copies compile their own programs.
    """

    def __init__(self, enabled: bool = False) -> None:
        self.enabled = enabled
        self._programs: dict[str, _Program] = {}

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
        name, weights = function.__name__, [*module.parameters(), *module.buffers()]
        known = self._programs.get(name)
        # Inference mode would be a program of its own.
        with torch.inference_mode(False), torch.no_grad():
            if known is None or not known.is_of(weights):
                # Fills the caches that are no part of a program, and tells of unfit inputs in this library's words.
                # The program holds prepared weights of its own.
                with nothing_kept():
                    function(*inputs)
                known = _Program(_compile(function), weights)
                self._programs[name] = known
            return _call(name, known.compiled, inputs)

    def _serves(self, inputs: Sequence[Tensor]) -> bool:
        with_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        is_traced = torch.compiler.is_compiling() or is_tracing()
        return self.enabled and inputs[0].device.type == "cpu" and not with_gradient and not is_traced


def _compile(function: Callable[..., Outputs]) -> Callable[..., Outputs]:
    """Compiles ``function``, with a code object of its own, and frees the programs with the result.

    Dynamo keeps programs with the code, and takes one for all weights of the same shapes, though they are constants.
    """

    def call(*inputs: Tensor) -> Outputs:
        return function(*inputs)

    code = call.__code__.replace()
    own = FunctionType(code, globals(), call.__name__, None, call.__closure__)
    compiled = torch.compile(own, fullgraph=True, options=OPTIONS)
    weakref.finalize(compiled, reset_code, code).atexit = False
    return compiled


def _call(name: str, program: Callable[..., Outputs], inputs: Sequence[Tensor]) -> Outputs:
    # The imports take a second.
    from torch._dynamo.utils import counters
    from torch._inductor.codecache import PyCodeCache

    modules = len(PyCodeCache.modules)
    compiled, begin = counters["stats"]["unique_graphs"], time.perf_counter()
    # Without the first Dynamo makes weights inputs of the program, and Inductor finds nothing to freeze.
    options = {
        "prepare_freezing": True,
        "recompile_limit": MOST_PROGRAMS,
        "accumulated_recompile_limit": MOST_PROGRAMS,
    }
    with torch._dynamo.config.patch(options), in_programs(), compiler_errors():
        results = program(*inputs)
    if counters["stats"]["unique_graphs"] > compiled:
        # Inductor would keep the constants of programs that are gone; a program runs without its module.
        for module in PyCodeCache.modules[modules:]:
            sys.modules.pop(module.__name__, None)
        del PyCodeCache.modules[modules:]
        seconds = time.perf_counter() - begin
        _LOG.warning("torch.compile: %s took %.0f s, at a batch of %d", name.strip("_"), seconds, len(inputs[0]))
    return results
