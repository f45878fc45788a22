"""Makes OpenVINO models of an MSFlow: of its extractor and of its flow, apart or joined.

They are converted from torch.export's programs. The way through ONNX gives the same scores at the same speed, takes no
less time, and needs three packages more.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim

from .. import backend
from ..errors import UnavailableError
from ..models.msflow import MSFlow
from ..nn.weight_cache import as_constants
from ..quiet import QuietThread

TELEMETRY = "openvino_telemetry"
TRACED_BATCH = 2
EXTRACTOR, FLOW = "extractor", "flow"
"""The names of a joined model's operations begin with one of these and a slash."""


class Parts(NamedTuple):
    """Two OpenVINO models in float32, one after the other."""

    extractor: Any
    """images (B, 3, H, W) in [0, 1] -> features per level."""
    flow: Any
    """Features per level -> fields of Scores, or its properties."""


def import_openvino(*others: str) -> Any:
    """Imports OpenVINO without its telemetry.

    Raises: UnavailableError if it, or one of the packages ``others`` of its extra, is not installed.
    """
    missing = [name for name in ("openvino", *others) if find_spec(name) is None]
    if missing:
        raise UnavailableError(f"OpenVINO needs {', '.join(missing)}: pip install 'fastmsflow[openvino]'")
    with without_telemetry():
        return import_module("openvino")


def converted(model: MSFlow, outputs: Sequence[str] | None) -> Parts:
    """Converts a model that ``for_inference`` made in float32, on the CPU; batches may have any size.

    ``outputs``: names of fields or properties of fastmsflow.scoring.Scores, which become the names of the flow's
    outputs; None: the flow's outputs are the log-likelihoods per level. The extractor's input is named images.

    Raises: UnavailableError if OpenVINO is not installed, or lacks an operation of the extractor.
    """
    openvino, batch = import_openvino(), {0: Dim("batch")}
    images = torch.rand(TRACED_BATCH, 3, *model.image_size, generator=torch.Generator().manual_seed(0))
    features_of = _Features(model).eval()
    scores_of = (_LogLikelihoods(model) if outputs is None else _Scores(model, outputs)).eval()
    with backend.use("torch"), torch.no_grad(), QuietThread(), without_telemetry():
        features = features_of(images)
        # Fills the caches of values derived from weights, which become constants of the graph.
        scores_of(*features)
        with as_constants():
            extractor = torch.export.export(features_of, (images,), dynamic_shapes=(batch,))
            flow = torch.export.export(scores_of, features, dynamic_shapes=((batch,) * len(features),))
        parts = Parts(*(_converted_program(program, model.extractor.description) for program in (extractor, flow)))
    for part, inputs in zip(parts, ((images,), features), strict=True):
        part.reshape(
            {port: openvino.PartialShape([-1, *x.shape[1:]]) for port, x in zip(part.inputs, inputs, strict=True)}
        )
    parts.extractor.input(0).get_tensor().set_names({"images"})
    names = [f"log_likelihoods_{level}" for level in range(len(features))] if outputs is None else outputs
    for port, name in zip(parts.flow.outputs, names, strict=True):
        port.get_tensor().set_names({name})
    return parts


def _converted_program(program: torch.export.ExportedProgram, extractor: str) -> Any:
    """Converts a program. Raises: UnavailableError if OpenVINO lacks one of its operations."""
    openvino = import_openvino()
    try:
        return openvino.convert_model(program)
    except openvino.frontend.OpConversionFailure as error:
        operations = ", ".join(sorted(set(re.findall(r"\baten\.\w+", str(error)))))
        raise UnavailableError(
            f"OpenVINO cannot convert {operations or 'an operation'} of {extractor}: export the"
            " model to .onnx, or take --engine torch"
        ) from error


def joined(parts: Parts) -> Any:
    """Returns one OpenVINO model of both parts, which it takes over."""
    openvino = import_openvino()
    for part, prefix in zip(parts, (EXTRACTOR, FLOW), strict=True):
        for operation in part.get_ops():
            operation.set_friendly_name(f"{prefix}/{operation.get_friendly_name()}")
    for features, result in zip(parts.flow.get_parameters(), parts.extractor.get_results(), strict=True):
        for target in features.output(0).get_target_inputs():
            target.replace_source_output(result.input_value(0))
    return openvino.Model(parts.flow.get_results(), parts.extractor.get_parameters(), "fastmsflow")


def compiled(model: Any, precision: str = "f32") -> Any:
    """Compiles an OpenVINO model for the CPU, in ``precision``, f32 or bf16, and in as many threads as torch has."""
    options = {
        # OpenVINO does not read this one from a file, and would choose bfloat16 where the chip has it.
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        # Several processes of a machine would be pinned to the same processors.
        "ENABLE_CPU_PINNING": False,
    }
    return cpu_core().compile_model(model, "CPU", options)


@cache
def cpu_core() -> Any:
    """Returns OpenVINO's Core for the CPU, the same one for the life of the process.

    A Core gives the thread that first uses the CPU a stack for its signal handlers, and takes it away when it ends.
    If it ends in another thread, or before a later Core, the next signal ends the process.
    """
    return import_openvino().Core()


def run(graph: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Returns the outputs of a compiled OpenVINO model, in their order."""
    return [torch.from_numpy(output) for output in graph([x.numpy() for x in inputs]).to_tuple()]


class _Features(nn.Module):
    """A module whose forward is ``features``."""

    def __init__(self, model: MSFlow) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.features(images))


class _Scores(nn.Module):
    """A module whose forward gives some outputs of ``scores_of_features``."""

    def __init__(self, model: MSFlow, outputs: Sequence[str]) -> None:
        super().__init__()
        self.model, self.outputs = model, tuple(outputs)

    def forward(self, *features: Tensor) -> tuple[Tensor, ...]:
        scores = self.model.scores_of_features(features)
        return tuple(getattr(scores, name) for name in self.outputs)


class _LogLikelihoods(nn.Module):
    """A module whose forward is ``log_likelihoods``."""

    def __init__(self, model: MSFlow) -> None:
        super().__init__()
        self.model = model

    def forward(self, *features: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.log_likelihoods(features))


@contextmanager
def without_telemetry() -> Iterator[None]:
    """Keeps OpenVINO in the block from its package of telemetry, whether that was imported before or not.

    It would write into the home folder and, in processes that it forks, send data to a server.
    """
    absent: Any = None
    if TELEMETRY not in sys.modules:
        sys.modules[TELEMETRY] = absent
        try:
            yield
        finally:
            del sys.modules[TELEMETRY]
        return
    package: Any = sys.modules[TELEMETRY]
    if package is None:
        yield
    else:
        theirs = package.Telemetry
        package.Telemetry = import_module("openvino.tools.ovc.telemetry_stub").Telemetry
        try:
            yield
        finally:
            package.Telemetry = theirs
