"""Contestants that run on a CPU only, inference only: the runtimes and the compiler that a user may take in place of
this library, and this library in bfloat16 or compiled."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contestants import Compiled, Contestant, FastMSFlow, Grids
from benchmarks.runtimes import ONNX_PACKAGES, Graph, OpenVINO, not_installed, onnx_runtime, openvino_has_bfloat16
from benchmarks.suite_settings import cpu_units
from fastmsflow import MultiScaleFlow
from fastmsflow.inductor import protect_constants
from fastmsflow.nn.compiled_functions import CompiledFunctions

NO_BFLOAT16 = "this chip has no units for bfloat16: neither AVX512-BF16 nor AMX"


class Runtime(Contestant):
    """A runtime that reads the ONNX files of the model and of its flow."""

    cpu_only = True
    trains = False

    def prepare_flow(self, flow: MultiScaleFlow, grids: Grids) -> nn.Module:
        self._graphs: dict[tuple[Path, int], Graph] = {}
        return flow

    @abstractmethod
    def open(self, path: Path, batch: int) -> Graph:
        """Returns a call of the graph in ``path``, for batches of that size."""

    def _run(self, path: Path, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        key = path, len(inputs[0])
        if key not in self._graphs:
            self._graphs[key] = self.open(*key)
        return self._graphs[key](*inputs)

    def likelihoods(self, features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        *maps, log_det = self._run(self.exports.flow, features)
        return maps, log_det

    def predict(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._run(self.exports.model, [images]))


class ONNXRuntime(Runtime):
    """ONNX Runtime on its CPU provider."""

    name = "ONNX Runtime"

    @classmethod
    def missing(cls) -> str | None:
        return not_installed(*ONNX_PACKAGES)

    def open(self, path: Path, batch: int) -> Graph:
        return onnx_runtime(path)


class OpenVINOFloat32(Runtime):
    """OpenVINO, kept to float32: of itself it takes bfloat16 where the chip has units for it."""

    name = "OpenVINO"
    hint = "f32"

    @classmethod
    def missing(cls) -> str | None:
        return not_installed(*ONNX_PACKAGES, "openvino")

    def open(self, path: Path, batch: int) -> Graph:
        graph = OpenVINO(path, self.hint, batch)
        if graph.precision != self.hint:
            raise RuntimeError(f"OpenVINO computes in {graph.precision}, not in {self.hint}")
        return graph


class OpenVINOBfloat16(OpenVINOFloat32):
    """OpenVINO in bfloat16, its own choice on a chip with units for it."""

    name = "OpenVINO bfloat16"
    hint = "bf16"
    precision = "bfloat16"

    @classmethod
    def missing(cls) -> str | None:
        return super().missing() or (None if openvino_has_bfloat16() else NO_BFLOAT16)


class TorchCompile(Compiled):
    """PyTorch's compiler (Inductor) with frozen weights, float32."""

    name = "torch.compile"
    dtype = torch.float32
    gpu_only = False
    cpu_only = True
    trains = False
    options: Mapping[str, Any] = MappingProxyType({"post_grad_custom_pre_pass": protect_constants})


class FastMSFlowBfloat16(FastMSFlow):
    """This library's inference in bfloat16."""

    name = "fastmsflow bfloat16"
    dtype = torch.bfloat16
    cpu_only = True
    trains = False

    @classmethod
    def missing(cls) -> str | None:
        return None if {"AVX512-BF16", "AMX-BF16"} & set(cpu_units()) else NO_BFLOAT16


class FastMSFlowCompiled(FastMSFlow):
    """This library's inference with ``compile=True``."""

    name = "fastmsflow compiled"
    cpu_only = True
    trains = False
    compiles = True

    @cached_property
    def _compiled(self) -> CompiledFunctions:
        return CompiledFunctions(enabled=True)

    def likelihoods(self, features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        *maps, log_det = self._compiled(self._flat, features, self._inference)
        return maps, log_det


CPU_CONTESTANTS = (FastMSFlowCompiled, FastMSFlowBfloat16, ONNXRuntime, OpenVINOFloat32, OpenVINOBfloat16, TorchCompile)
