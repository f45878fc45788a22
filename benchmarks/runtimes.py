"""Runs ONNX files by ONNX Runtime and by OpenVINO on the CPU, with as many threads as PyTorch has."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

Graph = Callable[..., Sequence[Tensor]]

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def not_installed(*packages: str) -> str | None:
    """Returns a line on those of ``packages`` that are not installed, or None."""
    missing = [package for package in packages if find_spec(package) is None]
    return f"not installed: {', '.join(missing)}; pip install {' '.join(missing)}" if missing else None


def onnx_runtime(path: Path) -> Graph:
    """Returns a call of the graph, for batches of any size."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        given = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(output) for output in session.run(None, given)]

    return run


class OpenVINO:
    """Calls a graph that OpenVINO has compiled; ``precision`` names its arithmetic."""

    def __init__(self, path: Path, precision: str | None = None, batch: int | None = None) -> None:
        """``precision``: "f32" or "bf16"; None: OpenVINO's own choice for this chip.

        ``batch``: the only size of batches that is served, for which some operations are compiled better; None: any.
        """
        from fastmsflow.inference.openvino_graph import cpu_core

        core = cpu_core()
        model = core.read_model(path)
        if batch is not None:
            model.reshape({node: [batch, *list(node.partial_shape)[1:]] for node in model.inputs})
        # Nothing that an earlier run compiled is read.
        options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "CACHE_DIR": ""}
        if precision is not None:
            options["INFERENCE_PRECISION_HINT"] = precision
        self._compiled = core.compile_model(model, "CPU", options)
        self.precision: str = self._compiled.get_property("INFERENCE_PRECISION_HINT").to_string()

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        outputs = self._compiled([x.numpy() for x in inputs])
        return [torch.from_numpy(output) for output in outputs.to_tuple()]


def openvino_has_bfloat16() -> bool:
    """Returns whether OpenVINO finds units for bfloat16 (AVX512-BF16 or AMX) in this chip."""
    from fastmsflow.inference.openvino_graph import cpu_core

    return "BF16" in cpu_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
