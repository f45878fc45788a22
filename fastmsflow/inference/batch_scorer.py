"""Scores batches of images in the engine that holds them: Ray Data, Spark, Daft, a web service."""

import copy
import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..calibration import DecisionThreshold, check_rate, region_threshold
from ..data.image_batches import processors
from ..data.image_views import ScaledImage
from ..errors import InputError, UnavailableError
from ..models.msflow import MSFlow
from ..number_range import FINITE, OVERLAP, SCALE, SIDE, TOP_SHARES
from .columns import BYTES, IMAGE, BatchColumns, Columns, result_columns
from .engines import OPENVINO, TORCH, check_engine
from .loading import parse_device, read_model, to_device
from .precision import AUTO
from .scorer import NOT_FINITE, ImageResult, Scorer
from .tiled_models import TileOptions, retile

# Images that are cut may be large, and their tiles share batches.
IMAGES_IN_TILES = 4
TILE_RANGES = {"tile": SIDE, "overlap": OVERLAP, "scale": SCALE, "top_share": TOP_SHARES}
# Engines hand over thousands of rows at once; so many images are in memory and in the model together.
BATCH_SIZE = 32
# More threads than processors, since reading from a server is waiting.
READERS = max(8, processors())


class BatchScorer:
    """Scores batches of images; loads its model once, at the first batch or by ``load``.

    ``model``: a checkpoint's path or URL, a folder that ``MSFlow.save_pretrained`` wrote, or a model; every process
    that scores reads it there. ``threshold``: absolute scores above it, in nats, are defective; by default the
    calibrated threshold for ``false_alarms``, the share of good images that may be called so (None: as calibrated).
    ``dtype``: float32, bfloat16, float16 or auto, which is float16 on a GPU and float32 on a CPU; see
    ``resolve_dtype``. ``engine``: torch, or openvino, which computes on the CPU in float32 or, if ``dtype`` says so,
    bfloat16. ``tile``, ``overlap``, ``scale``, ``top_share``: images are cut at their own size, times ``scale``, into
    tiles, see fastmsflow.inference.TiledPredictor; None: as the model was trained or calibrated, which may be not at
    all: images are resized then. ``maps``: results have a column ``score_map`` too, the absolute map at the model's
    size or, of tiles, each at its image's. ``device``: auto (a GPU if there is one and the engine is torch), cpu, cuda
    or cuda:N.

    A scorer can be pickled, before and after it has loaded its model; a copy loads its own. Threads may share a scorer:
    they decode side by side, and one of them at a time uses the model. A process that is forked after the model has
    loaded computes in one thread.

    Raises: InputError if an argument is not valid.
    """

    def __init__(
        self,
        model: str | Path | MSFlow,
        threshold: float | None = None,
        false_alarms: float | None = None,
        *,
        dtype: str = AUTO,
        engine: str = TORCH,
        tile: int | None = None,
        overlap: float | None = None,
        scale: float | None = None,
        top_share: float | None = None,
        maps: bool = False,
        device: str = "auto",
    ) -> None:
        if threshold is not None:
            FINITE.check("threshold", threshold)
        if false_alarms is not None:
            check_rate(false_alarms)
        self._tiles = TileOptions(tile, overlap, scale, top_share)
        for value, (name, numbers) in zip(self._tiles, TILE_RANGES.items(), strict=True):
            if value is not None:
                numbers.check(name, value)
        check_engine(engine, dtype)
        place = parse_device(device)
        if engine == OPENVINO:
            if place is not None and place.type != "cpu":
                raise InputError(f"device {device}: the engine openvino computes on the CPU; give auto or cpu")
            place = torch.device("cpu")
        self._model = model if isinstance(model, MSFlow) else os.fsdecode(model)
        self._threshold, self._false_alarms = threshold, false_alarms
        self._dtype, self._maps, self._engine, self._device = dtype, maps, engine, place
        self._begin()

    def _begin(self) -> None:
        self._loading, self._scoring = threading.Lock(), threading.Lock()
        self._loaded: _Loaded | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Returns the arguments alone; a copy makes its own model, threads and locks."""
        return {name: value for name, value in vars(self).items() if name not in ("_loading", "_scoring", "_loaded")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    def load(self) -> "BatchScorer":
        """Loads the model now, so that the first batch does not wait, and returns the scorer.

        Raises: InputError or UnavailableError if the checkpoint cannot be read or has no such threshold, or the device
        is not available or has no units for ``dtype``.
        """
        self._ready()
        return self

    def __call__(self, batch: Any) -> Any:
        """Scores a batch and returns its rows with the columns of the results, without ``bytes`` and ``image``.

        ``batch``: a dict of columns, each a NumPy array, a list or an Arrow array, or an Arrow table. The images are in
        the first of these columns that the batch has: ``bytes``, files' bytes; ``image``, arrays (H, W, 3), (H, W, 4)
        or (H, W) of uint8, (H, W) of uint16, or (H, W, 3) of floats in [0, 1], of one size or several; ``path``, paths
        and URLs. A row with a text in the column ``fault`` keeps that text and is not scored.

        Results: ``score`` (published, in [0, 1]), ``log_score`` and ``absolute_score`` in nats, float64; ``defective``,
        bool, null without a threshold; ``largest_region``, the area in pixels of the image, 0 if there is none above
        the model's threshold, null if it has no threshold; ``largest_region_left``, ``_top``, ``_right``, ``_bottom``,
        its box in pixels; ``fault``, one line where the image could not be read or scored, null elsewhere; with
        ``maps``, ``score_map`` (H, W) float32, of tiles in a column of objects. Null is None or, of numbers in NumPy,
        NaN.

        Raises: InputError if the batch has no column of images, or columns of several lengths; the errors of ``load``.
        """
        arrow = import_module(".arrow", __package__) if find_spec("pyarrow") else None
        is_arrow = arrow is not None and arrow.is_arrow(batch)
        columns = arrow.columns_of(batch) if arrow and is_arrow else batch
        if not isinstance(columns, Mapping):
            raise InputError(f"the batch is a {type(batch).__name__}; give a dict of columns, or an Arrow table")
        rows = BatchColumns.from_batch(
            {name: arrow.values(column) if arrow else column for name, column in columns.items()}
        )
        results = self._results(rows)
        if arrow and is_arrow:
            table = arrow.as_table(batch)
            return arrow.with_results(arrow.without(table, (BYTES, IMAGE)), results)
        others = {name: column for name, column in columns.items() if name not in (BYTES, IMAGE, *results)}
        return {**others, **results}

    def _results(self, rows: BatchColumns) -> Columns:
        ready = self._ready()
        model = ready.scorer.model
        at_once = BATCH_SIZE if model.tiling is None else IMAGES_IN_TILES
        map_size = model.image_size if self._maps and model.tiling is None else None
        own_maps = self._maps and model.tiling is not None
        numbers = range(len(rows.values))

        def read(start: int) -> list["Future[_Read]"]:
            return [ready.readers.submit(_read, rows, row, model) for row in numbers[start : start + at_once]]

        results: list[Columns] = []
        ahead = read(0)
        # At least once, since a batch without rows has result columns too.
        for start in range(0, max(1, len(numbers)), at_once):
            # The next images are decoded while the model scores these.
            current, ahead = ahead, read(start + at_once)
            scored = self._score(ready.scorer, [future.result() for future in current], rows, start)
            # Made at once, so that the maps of the images are not all in memory.
            results.append(result_columns(scored, map_size, own_maps=own_maps))
        return {name: np.concatenate([some[name] for some in results]) for name in results[0]}

    def _score(self, scorer: Scorer, read: "list[_Read]", rows: BatchColumns, start: int) -> list[ImageResult | str]:
        """Returns the result or the fault of each image; ``start``: the row of the first one."""
        whole = [image for image in read if not isinstance(image, (str, ScaledImage))]
        to_cut = [image for image in read if isinstance(image, ScaledImage)]
        with self._scoring:
            scored = list(scorer.in_tiles(to_cut)) if to_cut else []
            if whole:
                scored = scorer(torch.stack([pixels for pixels, _ in whole]), [size for _, size in whole])
        results = iter(scored)
        return [
            image if isinstance(image, str) else next(results) or f"{rows.name(row)}: {NOT_FINITE}"
            for row, image in enumerate(read, start)
        ]

    def _ready(self) -> "_Loaded":
        with self._loading:
            if self._loaded is None:
                # A copy is moved to the device; the caller's model stays where it is.
                given = self._model
                model = to_device(
                    copy.deepcopy(given) if isinstance(given, MSFlow) else read_model(given), self._device
                )
                model = retile(model, self._tiles)
                decision = DecisionThreshold.from_calibration(model.calibration, self._false_alarms, self._threshold)
                regions = region_threshold(model.calibration, self._false_alarms)
                scorer = Scorer(
                    model, decision=decision, region_threshold=regions, dtype=self._dtype, engine=self._engine
                )
                self._loaded = _Loaded(scorer, _readers(), os.getpid())
            elif self._loaded.process != os.getpid():
                # A forked process has none of its parent's threads, and torch would wait for its own.
                torch.set_num_threads(1)
                self._loaded = self._loaded._replace(readers=_readers(), process=os.getpid())
            return self._loaded


class _Loaded(NamedTuple):
    scorer: Scorer
    readers: ThreadPoolExecutor
    process: int
    """The process id of the readers' threads."""


def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(READERS, "fastmsflow-read")


_Read: TypeAlias = tuple[Tensor, tuple[int, int]] | ScaledImage | str
"""An image at the model's size with its own (width, height), or one that is to be cut into tiles, or its fault."""


def _read(rows: BatchColumns, row: int, model: MSFlow) -> _Read:
    try:
        fault = rows.fault(row)
        if fault is None and model.tiling is not None:
            return rows.read_to_cut(row, model.tiling)
        return fault or rows.read(row, model.image_size)
    except (InputError, UnavailableError) as error:
        fault = str(error)
    except Exception as error:  # one row never ends a job
        fault = f"{rows.name(row)}: {type(error).__name__}: {error}"
    return " ".join(fault.split())
