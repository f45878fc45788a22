"""Models as graphs that run without this library: torch.export, ONNX, AOTInductor.

Every graph takes images (B, 3, H, W) float32 in [0, 1], any B, and returns what ``MSFlow.predict`` does, in its order
and, in ONNX, by its names. It is made of ``model.for_inference()``, computes by plain PyTorch except where kernels are
named, and is loaded and compared with the model before it is handed over.
"""

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .. import backend
from ..errors import UnavailableError
from ..files import written_aside
from ..model import MSFlow, Prediction
from ..nn.kept import as_constants

# Sizes of batches that are compared. Neither is the one that is traced.
CHECKED_BATCHES = (1, 3)
TRACED_BATCH = 2
# Of scores, relative to the larger of 1 and the score; half precisions have other convolutions in another graph.
LIMIT, HALF_LIMIT = 1e-4, 3e-2

Graph = Callable[[Tensor], Sequence[Tensor]]


class Exported(NamedTuple):
    path: Path
    difference: float
    """The largest of image scores from the model's, relative to the larger of 1 and the score."""


def export_program(model: MSFlow, path: str | Path) -> Exported:
    """Writes a torch.export program, which ``torch.export.load(path).module()`` reads on any device.

    Errors: UnavailableError, with nothing written, where the graph does not compute what the model does.
    """
    predictor, example = _predictor(model, torch.float32)
    with written_aside(path) as aside:
        torch.export.save(_program(predictor, example), aside)
        difference = _compared(torch.export.load(aside).module(), predictor, example)
    return Exported(Path(path), difference)


def export_onnx(model: MSFlow, path: str | Path) -> Exported:
    """Writes an ONNX file: input ``images``, outputs ``Prediction``'s fields. Needs the ``onnx`` extra.

    Errors: UnavailableError, with nothing written, where a package is missing, or ONNX Runtime on the CPU does not
    compute what the model does.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UnavailableError(f"ONNX needs {', '.join(missing)}: pip install 'fastmsflow[onnx]'")
    predictor, example = _predictor(model.cpu(), torch.float32)
    written = torch.onnx.export(
        _program(predictor, example),
        input_names=["images"],
        output_names=list(Prediction._fields),
        dynamo=True,
        verbose=False,
    )
    with written_aside(path) as aside:
        written.save(aside)
        difference = _compared(_onnx_graph(aside), predictor, example)
    return Exported(Path(path), difference)


def export_package(model: MSFlow, path: str | Path, dtype: torch.dtype = torch.float32) -> Exported:
    """Writes an AOTInductor package (.pt2) for the device that ``model`` is on: machine code, no Python in it.

    ``torch._inductor.aoti_load_package(path)`` reads it; so does C++. ``dtype``: see ``MSFlow.for_inference``.
    Errors: UnavailableError, with nothing written, where the package does not compute what the model does.
    """
    predictor, example = _predictor(model, dtype)
    program = _program(predictor, example)
    with written_aside(path) as aside:
        torch._inductor.aoti_compile_and_package(program, package_path=str(aside))
        difference = _compared(torch._inductor.aoti_load_package(str(aside)), predictor, example)
    return Exported(Path(path), difference)


class _Predictor(nn.Module):
    """``predict`` as a module's forward."""

    def __init__(self, model: MSFlow) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.predict(images))


def _predictor(model: MSFlow, dtype: torch.dtype) -> tuple[_Predictor, Callable[[int], Tensor]]:
    """-> (the model for inference, images of it by the size of a batch)."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    example = partial(_images, size=model.image_size, generator=generator, device=device)
    return _Predictor(model.for_inference(dtype)).eval(), example


def _images(batch: int, size: tuple[int, int], generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.rand(batch, 3, *size, generator=generator).to(device)


@torch.no_grad()
def _program(predictor: _Predictor, example: Callable[[int], Tensor]) -> ExportedProgram:
    images = example(TRACED_BATCH)
    with backend.use("torch"):
        # What is kept of the weights, computed now, goes into the graph.
        predictor(images)
        with as_constants():
            return torch.export.export(predictor, (images,), dynamic_shapes=({0: Dim("batch")},))


def _onnx_graph(path: Path) -> Graph:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(out) for out in session.run(None, {"images": images.numpy()})]


@torch.no_grad()
def _compared(graph: Graph, predictor: _Predictor, example: Callable[[int], Tensor]) -> float:
    """The largest difference of scores. Errors: UnavailableError where it is more than rounding."""
    largest = 0.0
    for batch in CHECKED_BATCHES:
        images = example(batch)
        with backend.use("torch"):
            ours = predictor(images)
        for given, expected in zip(graph(images)[:2], ours[:2], strict=True):
            largest = max(largest, ((given - expected).abs() / expected.abs().clamp_min(1)).max().item())
    dtype = predictor.model.flow.dtype
    limit = LIMIT if dtype == torch.float32 else HALF_LIMIT
    if not largest <= limit:
        raise UnavailableError(
            f"the exported graph's scores differ from the model's by {largest:.1g}, more than {limit:g}; nothing was"
            f" written: report this with the extractor's name and torch {torch.__version__}"
        )
    return largest
