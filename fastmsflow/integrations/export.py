"""Exports models as graphs that run without this library: torch.export, ONNX, OpenVINO, AOTInductor.

Every graph takes images (B, 3, H, W) float32 in [0, 1], any B, and returns the fields of ``MSFlow.predict`` in their
order and, in ONNX and OpenVINO, by their names. The graph of a model with a tiling takes tiles, and returns
``absolute_map`` (B, H, W) too, to be blended by the windows of fastmsflow.tiling; if the tiles' positional encodings
are of their places in an image, a second input, ``offsets`` (B, 2) float32, has these places: top and left divided by
the tile's side. Every file but a package holds the model's configuration as JSON, with its tiling. A graph is traced
from ``model.for_inference()``, computes by plain PyTorch unless its function says otherwise, and is loaded and compared
with the model before its file is renamed into place.
"""

import importlib.util
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .. import backend
from ..errors import InputError, UnavailableError
from ..files import checked_file, written_aside
from ..inductor import compiler_errors
from ..inference.openvino_files import WEIGHTS, ir_written_aside
from ..inference.openvino_graph import compiled, converted, import_openvino, joined, run
from ..inference.openvino_int8 import Int8Figures, Int8Report, check_good_images, quantize
from ..models.msflow import MSFlow, Prediction
from ..nn.weight_cache import as_constants
from ..ops.triton_export import inlined
from ..scoring import score_log_likelihoods

__all__ = [
    "Exported",
    "Int8Figures",
    "Int8Report",
    "export_onnx",
    "export_openvino",
    "export_package",
    "export_program",
]

# Batch sizes that are compared; the traced size is another one.
CHECKED_BATCHES = (1, 3)
TRACED_BATCH = 2
BATCH = ({0: Dim("batch")},)
# Largest differences of scores, relative to the larger of 1 and the score. In half precision another graph may use
# other convolutions.
LIMIT, HALF_LIMIT = 1e-4, 3e-2

Graph = Callable[..., Sequence[Tensor]]
# The name of the model's configuration in a program's file.
CONFIG = "fastmsflow.json"


class Exported(NamedTuple):
    """An exported file, and its difference from the model."""

    path: Path
    """The file."""
    difference: float
    """The largest difference of image scores from the model's, relative to the larger of 1 and the score: on noise or,
    in INT8, on held-out good images."""
    int8: Int8Report | None = None
    """The report on quantization to INT8, if there was one."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The file and, of OpenVINO, its weights."""
        return (self.path, self.path.with_suffix(WEIGHTS)) if self.path.suffix == ".xml" else (self.path,)


def export_program(model: MSFlow, path: str | Path) -> Exported:
    """Writes a torch.export program, which ``torch.export.load(path).module()`` reads.

    Raises: UnavailableError, with nothing written, if the graph's scores differ from the model's.
    """
    predictor = _Predictor(model)
    with backend.use("torch"), written_aside(path) as aside:
        program = predictor.program()
        with checked_file(aside) as file:
            torch.export.save(program, file, extra_files={CONFIG: predictor.config})
        return Exported(Path(path), predictor.difference(torch.export.load(aside).module()))


def export_onnx(model: MSFlow, path: str | Path) -> Exported:
    """Writes an ONNX file: input ``images``, outputs ``Prediction``'s fields. Needs the ``onnx`` extra.

    Raises: UnavailableError, with nothing written, if a package is missing, or the scores of ONNX Runtime on the CPU
    differ from the model's.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UnavailableError(f"ONNX needs {', '.join(missing)}: pip install 'fastmsflow[onnx]'")
    predictor = _Predictor(model).cpu()
    with backend.use("torch"), written_aside(path) as aside:
        written = torch.onnx.export(
            predictor.program(),
            input_names=predictor.inputs,
            output_names=predictor.outputs,
            dynamic_shapes=predictor.batch,  # names the dimension
            dynamo=True,
            verbose=False,
        )
        # The result is None only if a file's name is given.
        written = cast(torch.onnx.ONNXProgram, written)
        written.model.metadata_props["fastmsflow"] = predictor.config
        written.save(aside)
        return Exported(Path(path), predictor.difference(_onnx_graph(aside)))


def export_openvino(model: MSFlow, path: str | Path, int8: Sequence[Path] | None = None) -> Exported:
    """Writes OpenVINO's files, ``path`` (.xml) and .bin beside it. Needs the ``openvino`` extra.

    The input is named ``images``, outputs are named as ``Prediction``'s fields. The file asks for float32 in its
    ``runtime_options``. OpenVINO 2026.4 does not read that for a CPU, so give INFERENCE_PRECISION_HINT to
    ``compile_model`` too. The configuration of the model, with its calibration, is JSON under ``fastmsflow``,
    ``config`` in the file's ``rt_info``.

    ``int8``: image files of good images; convolutions are in INT8 as far as these score as before: see
    fastmsflow.inference.openvino_int8.

    Raises: UnavailableError, with nothing written, if a package is missing, scores differ from the model's, or INT8
    does not keep those of good images; InputError if these are too few, cannot be read, or all score alike, or the
    model's positional encodings are of a tile's place in its image.
    """
    if model.tiling is not None and model.tiling.position == "image":
        raise InputError(
            "OpenVINO's file would lack the places of tiles in their image, which this model has been trained with"
            " (--position image); export it to .onnx"
        )
    openvino = import_openvino(*(() if int8 is None else ("nncf",)))
    if int8 is not None:
        # A conversion takes seconds, after which these would be refused.
        check_good_images(int8)
    predictor = _Predictor(model).cpu()
    with ir_written_aside(path) as aside:
        graph = joined(converted(predictor.model, (*Prediction._fields, "absolute_map")))
        difference, report = predictor.difference(_openvino_graph(graph)), None
        if int8 is not None:
            graph, report = quantize(graph, int8, model, aside.with_name("quantized.xml"))
            difference = report.difference
        expected = _openvino_graph(graph.clone())
        if model.tiling is None:
            graph.remove_result(graph.get_results()[-1])
        graph.set_rt_info("f32", ["runtime_options", "INFERENCE_PRECISION_HINT"])
        graph.set_rt_info(json.dumps(model.config), ["fastmsflow", "config"])
        openvino.save_model(graph, aside, compress_to_fp16=False)
        predictor.difference(_openvino_graph(aside), expected)
        return Exported(Path(path), difference, report)


def export_package(model: MSFlow, path: str | Path, dtype: torch.dtype = torch.float32) -> Exported:
    """Writes an AOTInductor package (.pt2) of machine code, without Python, for the device of ``model``.

    On a GPU the package contains this library's kernels, as ``backend`` says. ``torch._inductor.aoti_load_package``
    reads the package; so does C++. ``dtype``: see ``MSFlow.for_inference``.

    Raises: UnavailableError, with nothing written, if the package's scores differ from the model's.
    """
    predictor = _Predictor(model, dtype)
    on_gpu = next(model.parameters()).is_cuda
    with nullcontext() if on_gpu else backend.use("torch"), written_aside(path) as aside:
        program = predictor.program()
        with inlined() if on_gpu else nullcontext(), checked_file(aside) as file, compiler_errors():
            torch._inductor.aoti_compile_and_package(program, package_path=file)
        return Exported(Path(path), predictor.difference(torch._inductor.aoti_load_package(str(aside))))


class _Predictor(nn.Module):
    """A module whose forward is ``predict`` of a copy of the model, or of a tile."""

    def __init__(self, model: MSFlow, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model = model.for_inference(dtype)
        self.config = json.dumps(model.config)
        self.inputs, self.outputs = ["images"], list(Prediction._fields)
        if model.tiling is not None:
            self.outputs.append("absolute_map")
            self.inputs += ["offsets"] if model.tiling.position == "image" else []
        self.batch = BATCH * len(self.inputs)
        self.eval()

    def forward(self, images: Tensor, offsets: Tensor | None = None) -> tuple[Tensor, ...]:
        if self.model.tiling is None:
            return tuple(self.model.predict(images))
        logp = self.model.log_likelihoods(self.model.features(images), offsets)
        scores = score_log_likelihoods(logp, self.model.image_size)
        return tuple(getattr(scores, name) for name in self.outputs)

    @torch.no_grad()
    def program(self) -> ExportedProgram:
        inputs = self._example(TRACED_BATCH)
        # Fills the caches of values derived from weights, which become constants of the graph.
        self(*inputs)
        with as_constants():
            return torch.export.export(self, inputs, dynamic_shapes=self.batch)

    @torch.no_grad()
    def difference(self, graph: Graph, model: Graph | None = None) -> float:
        """Returns the difference of ``Exported`` from the model's scores, or from those of the graph ``model``.

        Raises: UnavailableError if it exceeds rounding.
        """
        largest = 0.0
        for batch in CHECKED_BATCHES:
            inputs = self._example(batch)
            for given, expected in zip(graph(*inputs)[:2], (model or self)(*inputs)[:2], strict=True):
                largest = max(largest, ((given - expected).abs() / expected.abs().clamp_min(1)).max().item())
        limit = LIMIT if self.model.flow.dtype == torch.float32 else HALF_LIMIT
        if not largest <= limit:
            raise UnavailableError(
                f"the exported graph's scores differ from the model's by {largest:.1g}, more than {limit:g}; nothing"
                f" was written: report this with the extractor's name and torch {torch.__version__}"
            )
        return largest

    def _example(self, batch: int) -> tuple[Tensor, ...]:
        """Returns random images and, if they are taken, offsets; the same ones for the same batch size."""
        generator, device = torch.Generator().manual_seed(batch), next(self.parameters()).device
        images = torch.rand(batch, 3, *self.model.image_size, generator=generator).to(device)
        offsets = 4 * torch.rand(batch, 2, generator=generator).to(device)
        return (images, offsets)[: len(self.inputs)]


def _openvino_graph(model: Any) -> Graph:
    """Returns a function of an OpenVINO model, or of the path of its file."""
    graph = compiled(model)
    return lambda images: run(graph, [images])


def _onnx_graph(path: Path) -> Graph:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run_session(*inputs: Tensor) -> list[Tensor]:
        given = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        return [torch.from_numpy(out) for out in session.run(None, given)]

    return run_session
