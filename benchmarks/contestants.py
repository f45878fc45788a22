"""Who is measured, each at its best settings: one class a contestant, all with the same four calls.

Contestants start from the same weights. Features are pooled, float32, channels-first; how a contestant wants them is
its own affair, done before the clock starts (``adapt``).
"""

import copy
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.exports import Exports
from fastmsflow import MSFlow, MultiScaleFlow
from fastmsflow.nn.cuda_graph import CudaGraphCache
from fastmsflow.nn.feature_pooling import pool_features
from fastmsflow.reference.likelihood import log_likelihood_maps
from fastmsflow.scoring import score_log_likelihoods
from fastmsflow.training.optimizer import Adam

Grids = Sequence[tuple[int, int]]
CLIP = 2.0


class Contestant(ABC):
    """The flows alone, or behind an extractor where ``model`` is given. ``exports``: files of both, for runtimes."""

    name: str
    dtype = torch.float32
    layout = torch.contiguous_format
    gpu_only = False
    adam: type[torch.optim.Adam] = torch.optim.Adam
    cpu_only = False
    trains = True
    compiles = False
    """True if ``fast`` computes by programs of torch.compile."""

    def __init__(
        self, flow: MultiScaleFlow, grids: Grids, model: MSFlow | None = None, exports: Exports | None = None
    ) -> None:
        self.flow = self.prepare_flow(flow, grids)
        self.model = model
        self.exports = exports
        self.optimizer: torch.optim.Optimizer | None = None

    @classmethod
    def missing(cls) -> str | None:
        """Returns a line on what the contestant needs and this machine lacks, or None."""
        return None

    @property
    def precision(self) -> str:
        """The arithmetic of its inference."""
        return str(self.dtype)[6:]

    @property
    def training_precision(self) -> str:
        """The arithmetic of its ``step``."""
        return self.precision

    @abstractmethod
    def prepare_flow(self, flow: MultiScaleFlow, grids: Grids) -> nn.Module: ...

    def adapt(self, x: Tensor) -> Tensor:
        return x.to(self.dtype, memory_format=self.layout)

    def adapt_training(self, x: Tensor) -> Tensor:
        """The same for ``step``."""
        return self.adapt(x)

    @abstractmethod
    def likelihoods(self, features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """-> log-likelihood map per level, log_det (B,)."""

    @abstractmethod
    def predict(self, images: Tensor) -> tuple[Tensor, ...]:
        """-> score, log score, both maps."""

    def loss(self, features: Sequence[Tensor]) -> Tensor:
        raise NotImplementedError(f"{self.name} does not train")

    def training_features(self, images: Tensor) -> Sequence[Tensor]:
        raise NotImplementedError(f"{self.name} does not train")

    @cached_property
    def fast(self) -> MSFlow:
        """The model made ready for inference, around this contestant's flow."""
        model = copy.deepcopy(self.model)
        model.flow = copy.deepcopy(self.flow)
        return model.for_inference(self.dtype, compile=self.compiles)

    def step(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """One step of Adam on the flow: -> loss, gradient norm before clipping."""
        if self.optimizer is None:
            self.optimizer = self.adam(self.flow.parameters(), lr=1e-4, fused=True)
        self.optimizer.zero_grad()
        loss = self.loss(features)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.flow.parameters(), CLIP)
        self.optimizer.step()
        return loss.detach(), norm

    def image_step(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The same from images."""
        return self.step(self.training_features(images))


def scored(logp: Sequence[Tensor], image_size: tuple[int, int]) -> tuple[Tensor, ...]:
    s = score_log_likelihoods(logp, image_size, backend="torch")
    return s.score, s.log_score, s.score_map_add, s.score_map_mul, s.absolute_score


class AsShipped(Contestant):
    """The reference algorithm as its users run it: eager, float32, TF32 convolutions on GPUs; in training the
    extractor's gradients are computed and thrown away."""

    name = "as shipped"
    autocast: torch.dtype | None = None

    @classmethod
    def missing(cls) -> str | None:
        found = importlib.util.find_spec("FrEIA")
        return None if found else "FrEIA 0.2 is not installed: pip install FrEIA==0.2"

    @property
    def precision(self) -> str:
        if self.autocast is not None:
            return str(self.autocast)[6:]
        return "tf32" if next(self.flow.parameters()).is_cuda else "float32"

    @cached_property
    def net(self) -> nn.Module:
        """The extractor, which takes gradients."""
        return copy.deepcopy(self.model.extractor.net).requires_grad_(True)

    def prepare_flow(self, flow: MultiScaleFlow, grids: Grids) -> nn.Module:
        # FrEIA may be missing where only the others run.
        from benchmarks.peers.freia import FreiaMSFlow

        return FreiaMSFlow(flow, grids).to(next(flow.parameters()).device)

    def _autocast(self, x: Tensor) -> torch.autocast:
        return torch.autocast(x.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None)

    def likelihoods(self, features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        with torch.no_grad(), self._autocast(features[0]):
            z, log_det = self.flow(features)
        return log_likelihood_maps(z), log_det

    def training_features(self, images: Tensor) -> list[Tensor]:
        extractor = self.model.extractor
        with self._autocast(images):
            return pool_features(self.net((images - extractor.mean) / extractor.std))

    def predict(self, images: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            logp, _ = self.likelihoods(self.training_features(images))
            return scored(logp, self.model.image_size)

    def loss(self, features: Sequence[Tensor]) -> Tensor:
        with self._autocast(features[0]):
            return self.flow.nll(features).mean()


class AsShippedAutocast(AsShipped):
    """The same under float16 autocast, as its option has it. Its loss scaler, a few small kernels, is left out."""

    name = "as shipped, autocast fp16"
    autocast = torch.float16
    gpu_only = True


class Compiled(Contestant):
    """The best that PyTorch does without our kernels: the cleaned-up flow in bfloat16, channels-last, compiled to one
    graph and recorded in CUDA graphs. Convolutions are ATen's."""

    name = "compiled bf16"
    dtype = torch.bfloat16
    layout = torch.channels_last
    gpu_only = True
    options: Mapping[str, bool] = MappingProxyType({"triton.cudagraphs": True})

    @classmethod
    def compile(cls, function: Callable, frozen: bool = False) -> Callable:
        """``frozen``: constants are computed while compiling: condition maps, joined weights."""
        compiled = torch.compile(function, fullgraph=True, options={**cls.options, "freezing": frozen})
        if not frozen:
            return compiled

        def call(*args: Any) -> Any:
            # Without it Dynamo makes weights inputs of the graph, and Inductor finds nothing to freeze.
            with torch._dynamo.config.patch(prepare_freezing=True):
                return compiled(*args)

        return call

    @cached_property
    def _nll(self) -> Callable:
        return self.compile(self.flow.nll)

    @cached_property
    def _maps(self) -> Callable:
        inference = copy.deepcopy(self.flow).to(self.dtype).requires_grad_(False).eval()
        return self.compile(inference.log_likelihood_maps, frozen=True)

    @cached_property
    def _features(self) -> Callable:
        return self.compile(self.fast.features, frozen=True)

    @cached_property
    def _predict(self) -> Callable:
        return self.compile(partial(self._scores, self.fast), frozen=True)

    @staticmethod
    def _scores(model: MSFlow, images: Tensor) -> tuple[Tensor, ...]:
        maps = model.flow.log_likelihoods(model.features(images))
        return scored(maps, model.image_size)

    def prepare_flow(self, flow: MultiScaleFlow, grids: Grids) -> nn.Module:
        flow = copy.deepcopy(flow).to(memory_format=torch.channels_last)
        flow.backend = "torch"
        # Position codes are made at the first use of a grid, which is no part of what is compiled.
        for code, grid in zip(flow.position_codes, grids, strict=True):
            code(torch.empty(1, 1, *grid, dtype=self.dtype, device=next(flow.parameters()).device))
        return flow

    def likelihoods(self, features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            return self._maps(features)

    def predict(self, images: Tensor) -> tuple[Tensor, ...]:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            return self._predict(images)

    def training_features(self, images: Tensor) -> list[Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            # A graph's outputs are written over by its next replay.
            return [level.clone() for level in self._features(images)]

    def loss(self, features: Sequence[Tensor]) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(features[0].device.type, self.dtype):
            return self._nll(features).mean()


class CompiledAutotuned(Compiled):
    """The same with the compiler's own products and convolutions where it times them to be faster, which takes it
    minutes."""

    name = "compiled bf16, autotuned"
    options = MappingProxyType({**Compiled.options, "max_autotune": True})


class FastMSFlow(Contestant):
    """This library. On GPUs float16 (training: bfloat16), kernels, one graph for inference; elsewhere float32 and plain
    PyTorch."""

    name = "fastmsflow"
    adam = Adam
    layout = torch.channels_last

    @property
    def training_precision(self) -> str:
        return "bfloat16" if self.on_gpu else "float32"

    @cached_property
    def _play(self) -> CudaGraphCache:
        return CudaGraphCache()

    @cached_property
    def _inference(self) -> MultiScaleFlow:
        return copy.deepcopy(self.flow).to(self.dtype).requires_grad_(False).eval()

    def adapt_training(self, x: Tensor) -> Tensor:
        return x.to(torch.bfloat16 if self.on_gpu else torch.float32, memory_format=self.layout)

    def prepare_flow(self, flow: MultiScaleFlow, grids: Grids) -> nn.Module:
        self.on_gpu = next(flow.parameters()).is_cuda
        if self.on_gpu:
            self.dtype = torch.float16
        flow = copy.deepcopy(flow).to(memory_format=torch.channels_last)
        flow.backend = "triton" if self.on_gpu else "auto"
        return flow

    def likelihoods(self, features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        with torch.no_grad():
            *maps, log_det = self._play(self._flat, features)
        return maps, log_det

    def _flat(self, *features: Tensor) -> tuple[Tensor, ...]:
        maps, log_det = self._inference.log_likelihood_maps(features)
        return (*maps, log_det)

    def predict(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.fast.predict(images)

    def training_features(self, images: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            return [self.adapt_training(level) for level in self.fast.features(images)]

    def loss(self, features: Sequence[Tensor]) -> Tensor:
        with torch.autocast(features[0].device.type, torch.bfloat16, enabled=self.on_gpu):
            return self.flow.nll(features).mean()


CONTESTANTS = (FastMSFlow, Compiled, AsShipped, AsShippedAutocast, CompiledAutotuned)
