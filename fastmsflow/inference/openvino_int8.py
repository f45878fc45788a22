"""Quantizes the convolutions of an OpenVINO model to INT8, as far as held-out good images score as before.

NNCF chooses ranges from half of the good images; the other half is scored before and after. First all convolutions are
quantized and, if that moves scores too far, those of the flow alone. Whatever is no convolution stays in float32:
scores, sums of squares and layer norms do not bear 8 bits.
"""

from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..calibration import FALSE_ALARMS, Calibration, DecisionThreshold
from ..data.image_views import ImageView, read_view, size_of
from ..errors import InputError, UnavailableError
from ..files import shown
from ..models.msflow import MSFlow
from ..quiet import QuietThread, errors_alone
from ..readable_file import check_file
from .openvino_graph import EXTRACTOR, compiled, import_openvino, without_telemetry

CONVOLUTIONS = ("Convolution", "GroupConvolution")
NOT_QUANTIZED: Mapping[str, tuple[str, ...]] = {"network": (), "flow": (f"{EXTRACTOR}/.*",)}
"""The parts that are quantized, in the order in which they are tried, and patterns of the names that are left out."""
SMALLEST_HALF = 20
"""The least images to choose ranges from, and to hold out: 19 are needed for a threshold of 5% false alarms."""
LARGEST_HALF = 300
"""The most: so many does NNCF take, and more would take longer than they are worth."""
MAP_SIDE = 32
"""Maps are compared at about so many pixels a side."""


@dataclass(frozen=True, kw_only=True)
class Int8Figures:
    """Compares the scores of held-out good images in INT8 with those in float32."""

    rank_correlation: float
    """Spearman's, of the absolute scores."""
    map_rank_correlation: float
    """The mean over images of Spearman's of their absolute maps."""
    same_label: float
    """Share of images on the same side of the model's threshold or, if it has none, of that of these images."""
    threshold_shift: float
    """How far the scores' quantile at which a threshold lies moves, in standard deviations of the scores in float32."""
    region_threshold_shift: float
    """The same for the largest values of the absolute maps."""


LIMITS = Int8Figures(
    # Errors of a third of the spread of good images' scores: as much as another filter for resizing moves them.
    rank_correlation=0.95,
    map_rank_correlation=0.95,
    # At the most one in twenty: a threshold for 5% false alarms gives 10% at the worst.
    same_label=0.95,
    # A threshold from 70 good images is as uncertain: sqrt(0.05 * 0.95 / 70) over the normal density there, 0.103.
    threshold_shift=0.25,
    region_threshold_shift=0.25,
)
NAMES = {
    "rank_correlation": "rank correlation of scores",
    "map_rank_correlation": "rank correlation of maps",
    "same_label": "share of images with the same label",
    "threshold_shift": "shift of the threshold over the scores' spread",
    "region_threshold_shift": "shift of the threshold of regions over the maps' spread",
}


@dataclass(frozen=True, kw_only=True)
class Int8Report:
    """Tells what was quantized, and what that did to held-out good images."""

    scope: str
    """network or flow: whose convolutions are in INT8."""
    quantized: int
    """Number of convolutions in INT8."""
    convolutions: int
    """Number of all convolutions."""
    calibration_images: int
    """Images from which ranges were chosen."""
    held_out_images: int
    """Images that were compared."""
    difference: float
    """The largest difference of their absolute scores, relative to the larger of 1 and the score."""
    figures: Int8Figures
    """The scores of held-out good images before and after, compared."""

    def __str__(self) -> str:
        whose = "" if self.scope == "network" else ", all of them the flow's"
        return (
            f"{self.quantized} of {self.convolutions} convolutions are in INT8{whose}; scores of {self.held_out_images}"
            f" held-out good images: ranks correlate by {self.figures.rank_correlation:.4f}, and a threshold moves by"
            f" {self.figures.threshold_shift:.3f} of their spread"
        )

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields, fit for JSON."""
        return asdict(self)


class ImageScores(NamedTuple):
    """The absolute scores of some images, and what is compared of their absolute maps."""

    scores: np.ndarray
    """(N,) nats."""
    peaks: np.ndarray
    """(N,) the largest value of each map, nats."""
    maps: np.ndarray
    """(N, P) some pixels of each map."""


def check_good_images(files: Sequence[Path]) -> None:
    """Raises InputError if these are too few for ``quantize``, or one of them is no file that may be read."""
    for file in files:
        check_file(file, "give good images, folders or patterns")
    if len(files) < 2 * SMALLEST_HALF:
        raise InputError(
            f"INT8 needs {2 * SMALLEST_HALF} good images, half of them to be compared, and there are {len(files)}: give"
            " more, or export without --int8"
        )


def quantize(graph: Any, files: Sequence[Path], model: MSFlow, scratch: Path) -> tuple[Any, Int8Report]:
    """Returns ``graph``, made of ``model``, with convolutions in INT8, and a report.

    ``graph``: an OpenVINO model with the outputs ``absolute_score`` and ``absolute_map``; ``files``: good images, as
    many as SMALLEST_HALF says twice or more, of which every second one is held out; ``scratch``: an .xml that may be
    written.

    Raises: InputError if there are too few images, one cannot be read, or all those held out score alike, as copies of
    one image do; UnavailableError if scores are not kept, or a package is missing.
    """
    openvino = import_openvino("nncf")
    check_good_images(files)
    ranges, held_out = _thinned(files[::2]), _thinned(files[1::2])
    before = _scored(graph, held_out, model)
    if min(np.ptp(before.scores), np.ptp(before.peaks)) == 0:
        raise InputError(
            f"INT8 needs good images that differ, and the {len(held_out)} that are held out all score alike: give"
            " others, or export without --int8"
        )
    for scope, names in NOT_QUANTIZED.items():
        # Weights are rounded to INT8 when they are written, so what was written is compared.
        openvino.save_model(_quantized(graph, ranges, model, names), scratch, compress_to_fp16=False)
        quantized = openvino.Core().read_model(scratch)
        after = _scored(quantized, held_out, model)
        figures = compare(before, after, model.calibration)
        if not faults(figures):
            report = Int8Report(
                scope=scope,
                quantized=sum(_is_quantized(operation) for operation in quantized.get_ops()),
                convolutions=sum(operation.get_type_name() in CONVOLUTIONS for operation in quantized.get_ops()),
                calibration_images=len(ranges),
                held_out_images=len(held_out),
                difference=float((np.abs(after.scores - before.scores) / np.maximum(1, before.scores)).max()),
                figures=figures,
            )
            return quantized, report
    raise UnavailableError(
        f"INT8 does not keep the scores of {len(held_out)} held-out good images, even if the flow alone is quantized"
        f" ({'; '.join(faults(figures))}); nothing was written: give more images, or export without --int8"
    )


def compare(before: ImageScores, after: ImageScores, calibration: Calibration | None = None) -> Int8Figures:
    """Compares scores in float32, ``before``, with those of the same images in INT8."""
    rate = FALSE_ALARMS if calibration is None else calibration.false_alarms
    decision = DecisionThreshold.from_calibration(calibration, None, None)
    limit = _quantile(before.scores, rate) if decision is None else decision.value
    return Int8Figures(
        rank_correlation=_rank_correlation(before.scores, after.scores),
        map_rank_correlation=float(
            np.mean([_rank_correlation(*maps) for maps in zip(before.maps, after.maps, strict=True)])
        ),
        same_label=float(np.mean((before.scores > limit) == (after.scores > limit))),
        threshold_shift=_shift(before.scores, after.scores, rate),
        region_threshold_shift=_shift(before.peaks, after.peaks, rate),
    )


def faults(figures: Int8Figures) -> list[str]:
    """Returns a text for each figure that is beyond its limit, or is not a number."""
    found = []
    for name, limit in asdict(LIMITS).items():
        value, is_shift = getattr(figures, name), name.endswith("shift")
        if not (value <= limit if is_shift else value >= limit):
            found.append(f"{NAMES[name]} {value:.3g}, at {'most' if is_shift else 'least'} {limit:g}")
    return found


def _thinned(files: Sequence[Path]) -> list[Path]:
    """Returns LARGEST_HALF of ``files``, evenly taken, or all if there are no more."""
    count = min(len(files), LARGEST_HALF)
    return [files[i * len(files) // count] for i in range(count)]


def _pixels(file: Path, model: MSFlow) -> np.ndarray:
    """Returns what the graph takes of an image, (1, 3, H, W): all, or of a model with a tiling a middle tile."""
    view = ImageView(file)
    if model.tiling is not None:
        places = model.tiling.places(size_of(file), shown(file))
        view = ImageView(file, model.tiling, places[len(places) // 2])
    return read_view(view, shown(file), model.image_size)[None].numpy()


def _quantized(graph: Any, files: Sequence[Path], model: MSFlow, kept: Sequence[str]) -> Any:
    """Returns a copy with all convolutions in INT8 but those whose names match one of ``kept``."""
    with without_telemetry():
        nncf: Any = import_module("nncf")
    others = {operation.get_type_name() for operation in graph.get_ops()} - {*CONVOLUTIONS, "Constant"}
    scope = nncf.IgnoredScope(patterns=list(kept), types=sorted(others - {"Parameter", "Result"}), validate=False)
    # NNCF draws bars, and torch tells of a missing GPU; standard output is for the command's own lines.
    with QuietThread(), errors_alone("nncf"), errors_alone("torch.utils.cpp_extension"), redirect_stdout(StringIO()):
        return nncf.quantize(
            graph.clone(),
            nncf.Dataset(list(files), lambda file: _pixels(file, model)),
            subset_size=len(files),
            preset=nncf.QuantizationPreset.MIXED,
            target_device=nncf.TargetDevice.CPU,
            ignored_scope=scope,
        )


def _scored(graph: Any, files: Sequence[Path], model: MSFlow) -> ImageScores:
    ready, step = compiled(graph), max(1, min(model.image_size) // MAP_SIDE)
    scores, peaks, maps = [], [], []
    for file in files:
        outputs = ready(_pixels(file, model))
        score_map = outputs["absolute_map"][0]
        scores.append(outputs["absolute_score"][0])
        peaks.append(score_map.max())
        maps.append(score_map[::step, ::step].ravel())
    return ImageScores(np.array(scores), np.array(peaks), np.array(maps))


def _is_quantized(operation: Any) -> bool:
    return operation.get_type_name() in CONVOLUTIONS and (
        operation.input_value(0).get_node().get_type_name() == "FakeQuantize"
    )


def _rank_correlation(before: np.ndarray, after: np.ndarray) -> float:
    from scipy.stats import spearmanr  # slow to import

    with QuietThread():
        # It warns of constant values, and returns NaN.
        return float(spearmanr(before, after).statistic)


def _quantile(values: np.ndarray, false_alarms: float) -> float:
    return float(np.quantile(values, 1 - false_alarms))


def _shift(before: np.ndarray, after: np.ndarray, false_alarms: float) -> float:
    return abs(_quantile(after, false_alarms) - _quantile(before, false_alarms)) / float(np.std(before))
