"""A callable that scores batches of images in whatever engine holds them: Ray Data, Spark, Daft, a web service."""

import copy
import math
import os
import shutil
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..calibration import check_rate
from ..data.batches import processors
from ..data.remote import is_url
from ..errors import InputError, in_one_line
from ..files import shown
from ..model import MSFlow
from .columns import BYTES, FAULT, IMAGE, PATH, Columns, Rows, result_columns
from .precision import AUTO, check_dtype
from .scorer import NOT_FINITE, Judged, Limit, Scorer, region_threshold

ENGINES = ("torch",)
# Engines hand over thousands of rows at once; so many images are in memory, and go through the model, together.
AT_ONCE = 32
# Reading from a server is waiting.
READERS = max(8, processors())


class BatchScorer:
    """Scores batches of images; loads its model once, at the first batch or by ``load``.

    ``model``: a checkpoint's path or URL, a folder that ``MSFlow.save_pretrained`` wrote, or a model; every process
    that scores reads it there. ``threshold``: absolute scores above it, in nats, are defective; by default the
    calibrated threshold for ``false_alarms``, the share of good images that may be called so (None: as calibrated).
    ``dtype``: float32, float16 or auto, which is float16 on a GPU. ``engine``: torch. ``tile``: None, images are
    resized to the model's size. ``maps``: results have a column ``score_map`` too, the absolute map at the model's
    size. ``device``: auto (a GPU if there is one), cpu, cuda or cuda:N.

    It can be pickled, before and after it has loaded; a copy loads for itself. Threads may share it: they decode side
    by side, and one of them at a time uses the model.

    Errors: InputError where an argument cannot be had.
    """

    def __init__(
        self,
        model: str | Path | MSFlow,
        threshold: float | None = None,
        false_alarms: float | None = None,
        dtype: str = AUTO,
        engine: str = "torch",
        tile: int | None = None,
        maps: bool = False,
        device: str = "auto",
    ) -> None:
        if threshold is not None and not math.isfinite(threshold):
            raise InputError(f"the threshold is {threshold}; give a number of nats")
        if false_alarms is not None:
            check_rate(false_alarms)
        if engine not in ENGINES:
            raise InputError(f"engine {engine!r} is not known; there is {', '.join(ENGINES)}")
        if tile is not None:
            raise InputError(f"tile {tile}: images are scored whole, resized to the model's size; leave tile out")
        check_dtype(dtype)
        _check_device(device)
        self._model = model if isinstance(model, MSFlow) else os.fspath(model)
        self._threshold, self._false_alarms = threshold, false_alarms
        self._dtype, self._maps, self._device = dtype, maps, device
        self._begin()

    def _begin(self) -> None:
        self._loading, self._scoring = threading.Lock(), threading.Lock()
        self._loaded: _Loaded | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What was given; not the loaded model, the threads and the locks."""
        return {name: value for name, value in vars(self).items() if name not in ("_loading", "_scoring", "_loaded")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    def load(self) -> "BatchScorer":
        """Loads the model now, so that the first batch does not wait for it -> itself.

        Errors: InputError or UnavailableError, one line, where the checkpoint cannot be read, has no such threshold, or
        the device is not there.
        """
        self._ready()
        return self

    def __call__(self, batch: Any) -> Any:
        """Scores a batch -> the same rows, in their order, without the columns ``bytes`` and ``image``, with those of
        the results.

        ``batch``: a dict of columns, each a NumPy array, a list or an Arrow array, or an Arrow table. One column holds
        the images, the first there is of: ``bytes``, files' bytes; ``image``, arrays (H, W, 3), (H, W, 4) or (H, W) of
        uint8, (H, W) of uint16, or (H, W, 3) of floats in [0, 1], of one size or several; ``path``, paths and URLs. A
        row with a text in the column ``fault`` keeps it and is not scored.

        Results: ``score`` (published, in [0, 1]), ``log_score`` and ``absolute_score`` in nats, float64; ``defective``,
        bool, null without a threshold; ``largest_region``, the area in pixels of the image, 0 if there is none above
        the model's threshold, null if it has no threshold; ``largest_region_left``, ``_top``, ``_right``, ``_bottom``,
        its box in pixels; ``fault``, one line where the image could not be read or scored, null elsewhere; with
        ``maps``, ``score_map`` (H, W) float32. Null is None or, of numbers in NumPy, NaN.

        Errors: InputError where the batch has no column of images, or columns of several lengths; ``load``'s.
        """
        arrow = _arrow_of(batch)
        if arrow is not None:
            table = arrow.as_table(batch)
            columns = {name: arrow.values(table[name]) if name in _READ else table[name] for name in table.column_names}
            results = self._results(Rows.of(columns))
            kept = table.drop_columns([name for name in (BYTES, IMAGE) if name in table.column_names])
            return arrow.with_results(kept, results)
        if not isinstance(batch, Mapping):
            raise InputError(f"the batch is a {type(batch).__name__}; give a dict of columns, or an Arrow table")
        results = self._results(Rows.of(batch))
        kept = {name: column for name, column in batch.items() if name not in (BYTES, IMAGE)}
        return {**kept, **results}

    def _results(self, rows: Rows) -> Columns:
        ready = self._ready()
        image_size = ready.scorer.model.image_size

        def read(start: int) -> list["Future[_Read]"]:
            return [ready.readers.submit(_read, rows, row, image_size) for row in rows.numbers[start : start + AT_ONCE]]

        results: list[Judged | str] = []
        ahead = read(0)
        for start in range(0, len(rows.numbers), AT_ONCE):
            # The next images are decoded while the model is at these.
            current, ahead = ahead, read(start + AT_ONCE)
            results += self._judged(ready.scorer, [future.result() for future in current], rows.names[start:])
        return result_columns(results, image_size if self._maps else None)

    def _judged(self, scorer: Scorer, read: "list[_Read]", names: Sequence[str]) -> list[Judged | str]:
        pixels = [one.pixels for one in read if one.pixels is not None]
        with self._scoring:
            judged = iter(scorer(torch.stack(pixels), [one.size for one in read if not one.fault]) if pixels else [])
        results: list[Judged | str] = []
        for one, name in zip(read, names, strict=False):
            results.append(one.fault or next(judged) or f"{shown(name)}: {NOT_FINITE}")
        return results

    def _ready(self) -> "_Loaded":
        with self._loading:
            if self._loaded is None:
                model = _load(self._model).to(_torch_device(self._device)).to(memory_format=torch.channels_last)
                limit = Limit.of(model.calibration, self._false_alarms, self._threshold)
                regions = region_threshold(model.calibration, self._false_alarms)
                scorer = Scorer(model, limit=limit, region_threshold=regions, dtype=self._dtype)
                self._loaded = _Loaded(scorer, ThreadPoolExecutor(READERS, "fastmsflow-read"))
            return self._loaded


_READ = frozenset({BYTES, IMAGE, PATH, FAULT})


class _Loaded(NamedTuple):
    scorer: Scorer
    readers: ThreadPoolExecutor


class _Read(NamedTuple):
    pixels: Tensor | None
    size: tuple[int, int]
    fault: str | None


def _read(rows: Rows, row: int, image_size: tuple[int, int]) -> _Read:
    try:
        return _Read(*rows.read(row, image_size), None)
    except Exception as error:  # one row never ends a job
        return _Read(None, (0, 0), in_one_line(error))


def _arrow_of(batch: Any) -> Any:
    """The module that knows Arrow, where the batch is of it."""
    if find_spec("pyarrow") is None:
        return None
    from . import arrow

    return arrow if arrow.is_arrow(batch) else None


def _load(model: str | MSFlow) -> MSFlow:
    if isinstance(model, MSFlow):
        # It is moved to the device; the caller's stays where it is.
        return copy.deepcopy(model)
    if not is_url(model):
        return MSFlow.from_pretrained(model) if Path(model).is_dir() else MSFlow.load(model)
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "model.safetensors"
        try:
            import fsspec

            with fsspec.open(model, "rb") as there, local.open("wb") as here:
                shutil.copyfileobj(there, here)
        except Exception as error:  # every kind of storage has its own
            raise InputError(f"{shown(model)}: the model cannot be read ({error})") from error
        try:
            return MSFlow.load(local)
        except InputError as error:
            raise InputError(str(error).replace(str(local), shown(model))) from error


def _check_device(device: str) -> None:
    if device != AUTO:
        try:
            torch.device(device)
        except RuntimeError as error:
            raise InputError(f"device {device!r} is not known; give auto, cpu, cuda or cuda:N") from error


def _torch_device(device: str) -> torch.device:
    if device == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = torch.device(device)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {device}: this process sees {torch.cuda.device_count()} GPUs; give auto or cpu")
    return chosen
