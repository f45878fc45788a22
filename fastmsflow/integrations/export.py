"""Models as graphs that run without this library: torch.export, ONNX, AOTInductor.

Every graph takes images (B, 3, H, W) float32 in [0, 1], any B, and returns what ``MSFlow.predict`` does, in its order
and, in ONNX, by its names. It is made of ``model.for_inference()``, computes by plain PyTorch except where kernels are
named, and is loaded and compared with the model before it is handed over.
"""

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .. import backend
from ..errors import UnavailableError
from ..files import written_aside
from ..models.msflow import MSFlow, Prediction
from ..nn.weight_cache import as_constants
from ..ops.triton_export import inlined

__all__ = ["Exported", "export_onnx", "export_package", "export_program"]

# Sizes of batches that are compared. Neither is the one that is traced.
CHECKED_BATCHES = (1, 3)
TRACED_BATCH = 2
BATCH = ({0: Dim("batch")},)
# Of scores, relative to the larger of 1 and the score; half precisions have other convolutions in another graph.
LIMIT, HALF_LIMIT = 1e-4, 3e-2

Graph = Callable[[Tensor], Sequence[Tensor]]


class Exported(NamedTuple):
    """What was written, and how near it is."""

    path: Path
    """The file."""
    difference: float
    """The largest of image scores from the model's, relative to the larger of 1 and the score."""


def export_program(model: MSFlow, path: str | Path) -> Exported:
    """Writes a torch.export program, which ``torch.export.load(path).module()`` reads.

    Errors: UnavailableError, with nothing written, where the graph does not compute what the model does.
    """
    predictor = _Predictor(model)
    with backend.use("torch"), written_aside(path) as aside:
        torch.export.save(predictor.program(), aside)
        return Exported(Path(path), predictor.difference(torch.export.load(aside).module()))


def export_onnx(model: MSFlow, path: str | Path) -> Exported:
    """Writes an ONNX file: input ``images``, outputs ``Prediction``'s fields. Needs the ``onnx`` extra.

    Errors: UnavailableError, with nothing written, where a package is missing, or ONNX Runtime on the CPU does not
    compute what the model does.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UnavailableError(f"ONNX needs {', '.join(missing)}: pip install 'fastmsflow[onnx]'")
    predictor = _Predictor(model).cpu()
    names = list(Prediction._fields)
    with backend.use("torch"), written_aside(path) as aside:
        written = torch.onnx.export(
            predictor.program(),
            input_names=["images"],
            output_names=names,
            dynamic_shapes=BATCH,  # for its name
            dynamo=True,
            verbose=False,
        )
        # None only where it was given a file's name.
        cast(torch.onnx.ONNXProgram, written).save(aside)
        return Exported(Path(path), predictor.difference(_onnx_graph(aside)))


def export_package(model: MSFlow, path: str | Path, dtype: torch.dtype = torch.float32) -> Exported:
    """Writes an AOTInductor package (.pt2) for the device that ``model`` is on: machine code, no Python in it.

    On a GPU this library's kernels are in it, as ``backend`` says. ``torch._inductor.aoti_load_package(path)`` reads
    it; so does C++. ``dtype``: see ``MSFlow.for_inference``.
    Errors: UnavailableError, with nothing written, where the package does not compute what the model does.
    """
    predictor = _Predictor(model, dtype)
    on_gpu = next(model.parameters()).is_cuda
    with nullcontext() if on_gpu else backend.use("torch"), written_aside(path) as aside:
        program = predictor.program()
        with inlined() if on_gpu else nullcontext():
            torch._inductor.aoti_compile_and_package(program, package_path=str(aside))
        return Exported(Path(path), predictor.difference(torch._inductor.aoti_load_package(str(aside))))


class _Predictor(nn.Module):
    """``predict`` of a copy of the model as a module's forward."""

    def __init__(self, model: MSFlow, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model = model.for_inference(dtype)
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.predict(images))

    @torch.no_grad()
    def program(self) -> ExportedProgram:
        images = self._images(TRACED_BATCH)
        # What is kept of the weights, computed now, goes into the graph.
        self(images)
        with as_constants():
            return torch.export.export(self, (images,), dynamic_shapes=BATCH)

    @torch.no_grad()
    def difference(self, graph: Graph) -> float:
        """See ``Exported``. Errors: UnavailableError where it is more than rounding."""
        largest = 0.0
        for batch in CHECKED_BATCHES:
            images = self._images(batch)
            for given, expected in zip(graph(images)[:2], self(images)[:2], strict=True):
                largest = max(largest, ((given - expected).abs() / expected.abs().clamp_min(1)).max().item())
        limit = LIMIT if self.model.flow.dtype == torch.float32 else HALF_LIMIT
        if not largest <= limit:
            raise UnavailableError(
                f"the exported graph's scores differ from the model's by {largest:.1g}, more than {limit:g}; nothing"
                f" was written: report this with the extractor's name and torch {torch.__version__}"
            )
        return largest

    def _images(self, batch: int) -> Tensor:
        """The same for the same batch."""
        generator = torch.Generator().manual_seed(batch)
        return torch.rand(batch, 3, *self.model.image_size, generator=generator).to(next(self.parameters()).device)


def _onnx_graph(path: Path) -> Graph:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(out) for out in session.run(None, {"images": images.numpy()})]
