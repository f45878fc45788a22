"""Scores new images into a table and a picture of each, written one by one."""

from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..calibration import DecisionThreshold
from ..data.image_batches import ReadImage, file_batches, read_batches
from ..errors import InputError
from ..files import shown
from ..models.msflow import MSFlow
from ..number_range import COUNT
from ..owned_files import owned_files
from ..result_folder import ResultFolder, claimed_results
from ..scoring import MapKind
from ..visualization.color_scale import ColorScale
from ..visualization.image_visualizer import ImageVisualizer
from . import AUTO
from .engines import TORCH
from .heat_map_names import heat_map_names
from .regions import Region
from .scorer import LABELS, ImageResult, Scorer
from .sorted_table import SortedTable
from .tiled_predictor import BATCH_SIZE

VERB = "predict"
FORMATS = ("csv", "jsonl")
# PNG files a fifth larger than with Pillow's 6, in a quarter of the time.
COMPRESSION = 1
COLUMNS = ("image", "score", "log_score", "absolute_score", "label", "threshold", "heat_map", "regions")
# CSV has no lists.
CSV_COLUMNS = (*COLUMNS, "largest_region")


@dataclass(frozen=True)
class ScoredImage:
    """The scores and the label of one image file."""

    image: Path
    score: float
    log_score: float
    absolute_score: float
    defective: bool | None


class Interrupted(Exception):
    """The user has interrupted the run; the text says where the results so far are."""


class Predictor:
    """Scores images into a folder: a table of all images, highest score first, and a picture of each.

    Both are written to ``out / "unfinished"`` one by one, and take the place of earlier results in ``out``, all at
    once, when all images are scored. An interrupted run, or one that fills the disk, leaves earlier results as they
    were, and complete files and rows of its own in "unfinished".
    """

    def __init__(
        self,
        model: MSFlow,
        out: Path,
        *,
        table: str = "csv",
        decision: DecisionThreshold | None = None,
        false_alarms: float | None = None,
        pictures: bool = True,
        dtype: str = AUTO,
        kind: MapKind | None = None,
        engine: str = TORCH,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        """Prepares ``model``.

        ``table``: csv or jsonl; ``decision``: labels images, None for no labels; ``false_alarms``: share of good images
        that may show a region; ``dtype``: see fastmsflow.inference.resolve_dtype; ``kind``: the map that pictures show;
        ``engine``: torch or openvino, see Scorer; ``batch_size``: images or, if the model has a tiling, tiles that are
        computed at once.

        Raises: InputError if ``ColorScale.from_model`` or ``Scorer`` refuse an argument; UnavailableError if the engine
        is not installed.
        """
        COUNT.check("batch_size", batch_size)
        self.color_scale = ColorScale.from_model(model.calibration, len(model.flow.channels), false_alarms, kind)
        self._scorer = Scorer(
            model,
            decision=decision,
            region_threshold=self.color_scale.region_threshold,
            dtype=dtype,
            kind=self.color_scale.kind,
            engine=engine,
            tiles=batch_size,
        )
        # Images that are cut share batches by their tiles.
        self._images_at_once = batch_size if model.tiling is None else 1
        self.table = out / f"scores.{table}"
        self.scored: list[ScoredImage] = []
        self.faults: list[str] = []
        """A line for each file that could not be scored."""
        self._out = out
        self._decision = decision
        shown_size = model.image_size if model.tiling is None else None
        self._visualizer = ImageVisualizer(self.color_scale, shown_size) if pictures else None
        self._names: list[str] = []
        """The name of the heat map of each image."""

    @property
    def draws(self) -> bool:
        """True if a picture of each image is drawn."""
        return self._visualizer is not None

    def run(self, files: Sequence[Path], workers: int, progress: Callable[[int], None]) -> None:
        """Scores ``files``.

        ``workers``: processes that read images, see fastmsflow.data.image_batches.read_batches; ``progress`` is called
        with the number of images that are done.

        Raises: InputError if none of ``files`` can be scored, or results cannot be written; fastmsflow.files.Busy if
        another process is writing to ``out``; Interrupted after Ctrl-C; RuntimeError if a process that reads is killed.
        """
        reader = self._scorer.reader(None if self._visualizer is None else self._visualizer.shrink)
        batches = list(file_batches([str(file) for file in files], self._images_at_once))
        with claimed_results(self._out, VERB) as results:
            if self._visualizer is not None:
                self._names = heat_map_names(files, results.others())
            # Tables of other formats stay if no picture, old or new, could be taken for theirs.
            earlier = owned_files(self._out, VERB) - {self.table.name}
            has_pictures = bool(self._names) or not earlier <= {f"scores.{form}" for form in FORMATS}
            results.begin([*self._names, self.table.name], () if has_pictures else earlier)
            table = results.unfinished / self.table.name
            try:
                with closing(SortedTable(table, CSV_COLUMNS if table.suffix == ".csv" else COLUMNS)) as rows:
                    # Closing ends the reading processes, whatever happens.
                    with closing(read_batches(batches, len(batches), reader, workers)) as read:
                        for item, result, fault in self._scorer.items(read):
                            if result is None:
                                self.faults.append(str(fault))
                            else:
                                self._add(item, result, rows, results)
                            progress(item.number + 1)
                    if not self.scored:
                        more = f"; and {len(self.faults) - 1} more" if len(self.faults) > 1 else ""
                        raise InputError(f"{self.faults[0]}{more}")
                    rows.finish(table)
                results.finish()
            except KeyboardInterrupt as interrupt:
                finished = f"those are in {shown(results.unfinished)}; " if self.scored else ""
                raise Interrupted(
                    f"interrupted after {len(self.scored)} of {len(files)} images; {finished}earlier results in"
                    f" {shown(self._out)} are as they were"
                ) from interrupt
            finally:
                # On a full or read-only disk this fails too; the first error is the one to report.
                if not self.scored:
                    with suppress(OSError):
                        table.unlink(missing_ok=True)

    def _add(self, item: ReadImage, result: ImageResult, rows: SortedTable, results: ResultFolder) -> None:
        scored = ScoredImage(Path(item.name or ""), *result[:4])
        rows.add(self._row(scored, item, result, results), scored.absolute_score)
        self.scored.append(scored)

    def _row(self, scored: ScoredImage, item: ReadImage, result: ImageResult, results: ResultFolder) -> dict[str, Any]:
        regions = result.regions
        name = None
        if self._visualizer is not None and item.shown is not None and item.size is not None:
            name = self._names[item.number]
            picture = self._visualizer.paint(
                Image.fromarray(item.shown),
                result.score_map,
                outlines=[region.outline for region in regions or ()],
                size=item.size,
                name=shown(scored.image.name),
                verdict=self._verdict(scored, regions),
                defective=scored.defective,
            )
            with results.partial(name) as path:
                picture.save(path, format="PNG", compress_level=COMPRESSION)
        row = {
            "image": str(scored.image),
            "score": scored.score,
            "log_score": scored.log_score,
            "absolute_score": scored.absolute_score,
            "label": LABELS[scored.defective],
            "threshold": self._decision and self._decision.value,
            "heat_map": name,
        }
        if self.table.suffix == ".csv":
            if regions is None:
                return {**row, "regions": None, "largest_region": None}
            return {**row, "regions": len(regions), "largest_region": max((r.area for r in regions), default=0)}
        return {**row, "regions": regions and [region.as_dict() for region in regions]}

    def _verdict(self, scored: ScoredImage, regions: Sequence[Region] | None) -> str:
        score = f"score {scored.absolute_score:.4g} nats"
        if self._decision is None:
            text = f"{score}, no threshold"
        else:
            label = "DEFECTIVE" if scored.defective else "GOOD"
            text = f"{label}: {score}, threshold {self._decision.value:.4g}"
        if regions is not None:
            text += f", {len(regions) or 'no'} region{'' if len(regions) == 1 else 's'}"
        return text
