"""New images -> scores, labels, regions and pictures, written as they come."""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.image_batches import BatchReader, ReadBatch, ReadImage, file_batches, read_batches
from ..errors import InputError
from ..files import shown, write_faults, written_aside
from ..models.msflow import MSFlow
from ..scoring import MapKind
from ..visualization.color_scale import ColorScale
from ..visualization.image_visualizer import ImageVisualizer, Verdict
from . import AUTO
from .heat_map_names import HEAT_MAP, heat_map_names
from .regions import Region
from .scorer import LABELS, DecisionThreshold, ImageResult, Scorer
from .tables import SortedTable

UNFINISHED = "unfinished"
# A fifth larger than at Pillow's 6, in a quarter of the time.
COMPRESSION = 1
COLUMNS = ("image", "score", "log_score", "absolute_score", "label", "threshold", "heat_map", "regions")
# A CSV has no lists in it.
CSV_COLUMNS = (*COLUMNS, "largest_region")


@dataclass(frozen=True)
class Scored:
    image: Path
    score: float
    log_score: float
    absolute_score: float
    defective: bool | None


class Interrupted(Exception):
    """By the user; its text is what became of the results so far."""


class Predictor:
    """Scores images into a folder: a table of them all, highest score first, and a picture of each.

    Both go into ``out / "unfinished"`` as they come, and to ``out`` when all images are through. So an interrupted run,
    or one that fills the disk, leaves earlier results as they were, and its own, every file and row whole, apart.
    """

    def __init__(
        self,
        model: MSFlow,
        out: Path,
        table: str = "csv",
        limit: DecisionThreshold | None = None,
        false_alarms: float | None = None,
        pictures: bool = True,
        dtype: str = AUTO,
        kind: MapKind | None = None,
    ) -> None:
        """``table``: csv or jsonl; ``limit``: what labels are by; ``false_alarms``: share of good images that may show
        a region; ``dtype``: see fastmsflow.inference.resolve_dtype; ``kind``: the map that pictures show. Errors: those
        of ``ColorScale.from_model`` and ``Scorer``."""
        self.heat = ColorScale.from_model(model.calibration, len(model.flow.channels), false_alarms, kind)
        region_threshold = self.heat.region_threshold
        self._scorer = Scorer(model, limit=limit, region_threshold=region_threshold, dtype=dtype, kind=self.heat.kind)
        self.table = out / f"scores.{table}"
        self.scored: list[Scored] = []
        self.faults: list[str] = []
        """One line for each file that could not be scored."""
        self._out = out
        self._limit = limit
        self._painter = ImageVisualizer(self.heat, model.image_size) if pictures else None
        self._names: list[str] = []
        """The name of each image's heat map."""
        self._written: list[str] = []

    @property
    def paints(self) -> bool:
        """True where it makes pictures."""
        return self._painter is not None

    def run(self, files: Sequence[Path], batch_size: int, workers: int, progress: Callable[[int], None]) -> None:
        """``files``: heat maps that lie in ``out`` are passed over, so that it can be in the folder that is scored.
        ``workers``: processes that read them, see fastmsflow.data.image_batches.read_batches.

        Errors: InputError where not one of ``files`` can be scored, or results cannot be written; Interrupted;
        RuntimeError where a process that reads is killed.
        """
        apart = self._out / UNFINISHED
        files = [file for file in files if not self._is_own(file)]
        if not files:
            raise InputError(f"{shown(self._out)}: nothing but heat maps to score; name a folder of images")
        if self._painter is not None:
            self._names = heat_map_names(files)
        with write_faults(apart):
            apart.mkdir(parents=True, exist_ok=True)
            # What an earlier run left there, half-written files of one that was killed among it.
            for pattern in (f"*{HEAT_MAP}", "scores.*", ".*"):
                for left in apart.glob(pattern):
                    left.unlink()
        columns = CSV_COLUMNS if self.table.suffix == ".csv" else COLUMNS
        try:
            with SortedTable(apart / self.table.name, columns) as rows:
                # Closed, so that the processes end here, whatever happens.
                with closing(self._read(files, batch_size, workers)) as batches:
                    for read in batches:
                        self._score(read, rows)
                        progress(read.items[-1].number + 1)
                if not self.scored:
                    more = f"; and {len(self.faults) - 1} more" if len(self.faults) > 1 else ""
                    raise InputError(f"{self.faults[0]}{more}")
                self._finish(apart, rows)
        except KeyboardInterrupt as interrupt:
            kept = f"those are in {shown(apart)}; " if self.scored else ""
            raise Interrupted(
                f"interrupted after {len(self.scored)} of {len(files)} images; {kept}earlier results in"
                f" {shown(self._out)} are as they were"
            ) from interrupt
        finally:
            # Not even this can be had on some disks, and then another error is on its way.
            with suppress(OSError):
                if not self.scored:
                    (apart / self.table.name).unlink(missing_ok=True)
                if not any(apart.iterdir()):
                    apart.rmdir()

    def _read(self, files: Sequence[Path], size: int, workers: int) -> Generator[ReadBatch, None, None]:
        reader = BatchReader(self._scorer.model.image_size, None if self._painter is None else self._painter.shrink)
        batches = file_batches([str(file) for file in files], size)
        return read_batches(batches, -(-len(files) // size), reader, workers)

    def _score(self, read: ReadBatch, rows: SortedTable) -> None:
        for item, judged, fault in self._scorer.items(read):
            if judged is None:
                self.faults.append(str(fault))
                continue
            scored = Scored(Path(item.name or ""), *judged[:4])
            rows.add(self._row(scored, item, judged, rows.path.parent), scored.absolute_score)
            self.scored.append(scored)

    def _row(self, scored: Scored, item: ReadImage, judged: ImageResult, folder: Path) -> dict[str, Any]:
        regions = judged.regions
        name = None
        if self._painter is not None and item.shown is not None and item.size is not None:
            name = self._names[item.number]
            verdict = self._verdict(scored, regions)
            small = Image.fromarray(item.shown)
            picture = self._painter.paint(small, judged.score_map, regions or (), item.size, verdict)
            with written_aside(folder / name) as aside:
                picture.save(aside, format="PNG", compress_level=COMPRESSION)
            self._written.append(name)
        row = {
            "image": str(scored.image),
            "score": scored.score,
            "log_score": scored.log_score,
            "absolute_score": scored.absolute_score,
            "label": LABELS[scored.defective],
            "threshold": self._limit and self._limit.value,
            "heat_map": name,
        }
        if self.table.suffix == ".csv":
            found = (None, None) if regions is None else (len(regions), max((r.area for r in regions), default=0))
            return {**row, "regions": found[0], "largest_region": found[1]}
        return {**row, "regions": regions and [region.as_dict() for region in regions]}

    def _verdict(self, scored: Scored, regions: Sequence[Region] | None) -> Verdict:
        score = f"score {scored.absolute_score:.4g} nats"
        if self._limit is None:
            text = f"{score}, no threshold"
        else:
            word = "DEFECTIVE" if scored.defective else "GOOD"
            text = f"{word}: {score}, threshold {self._limit.value:.4g}"
        if regions is not None:
            text += f", {len(regions) or 'no'} region{'' if len(regions) == 1 else 's'}"
        return Verdict(shown(scored.image.name), text, scored.defective)

    def _finish(self, apart: Path, rows: SortedTable) -> None:
        for name in self._written:
            with write_faults(self._out / name):
                (apart / name).replace(self._out / name)
        rows.finish(self.table)
        rows.path.unlink()

    def _is_own(self, file: Path) -> bool:
        if not file.name.endswith(HEAT_MAP):
            return False
        return file.parent.resolve() in (self._out.resolve(), (self._out / UNFINISHED).resolve())
