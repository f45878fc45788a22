"""New images -> scores, labels, regions and pictures, written as they come."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..data.images import as_tensor, read_image
from ..errors import InputError
from ..files import LONGEST_NAME, shown, write_faults, written_aside
from ..model import MSFlow
from .picture import Painter, Verdict
from .regions import Region
from .rows import Rows
from .scorer import LABELS, NOT_FINITE, Judged, Limit, Scorer

UNFINISHED = "unfinished"
HEAT_MAP = "_heatmap.png"
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


class _Read(NamedTuple):
    file: Path
    size: tuple[int, int]
    """(width, height) of the file's pixels."""
    pixels: Tensor
    shown: Image.Image | None
    """For the picture, if there is to be one."""


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
        limit: Limit | None = None,
        false_alarms: float | None = None,
        pictures: bool = True,
    ) -> None:
        """``table``: csv or jsonl; ``limit``: what labels are by; ``false_alarms``: share of good images that may show
        a region. Errors: InputError where ``false_alarms`` cannot be had."""
        self._scorer = Scorer(model, limit, false_alarms)
        self.heat = self._scorer.heat
        self.table = out / f"scores.{table}"
        self.scored: list[Scored] = []
        self.faults: list[str] = []
        """One line for each file that could not be scored."""
        self._out = out
        self._limit = limit
        self._painter = Painter(self.heat, model.image_size) if pictures else None
        self._names: dict[str, str] = {}

    def run(self, files: Sequence[Path], batch_size: int, progress: Callable[[int], None]) -> None:
        """``files``: heat maps that lie in ``out`` are passed over, so that it can be in the folder that is scored.

        Errors: InputError where not one of ``files`` can be scored, or results cannot be written; Interrupted.
        """
        apart = self._out / UNFINISHED
        files = [file for file in files if not self._is_own(file)]
        if not files:
            raise InputError(f"{shown(self._out)}: nothing but heat maps to score; name a folder of images")
        with write_faults(apart):
            apart.mkdir(parents=True, exist_ok=True)
            # What an earlier run left there, half-written files of one that was killed among it.
            for pattern in (f"*{HEAT_MAP}", "scores.*", ".*"):
                for left in apart.glob(pattern):
                    left.unlink()
        columns = CSV_COLUMNS if self.table.suffix == ".csv" else COLUMNS
        try:
            with Rows(apart / self.table.name, columns) as rows:
                for start in range(0, len(files), batch_size):
                    self._batch(files[start : start + batch_size], rows)
                    progress(min(start + batch_size, len(files)))
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

    def _batch(self, files: Sequence[Path], rows: Rows) -> None:
        read: list[_Read] = []
        for file in files:
            try:
                image = read_image(file)
                small = None if self._painter is None else self._painter.shrink(image)
                read.append(_Read(file, image.size, as_tensor(image, self._scorer.model.image_size), small))
            except InputError as error:
                self.faults.append(str(error))
        if not read:
            return
        pixels = torch.stack([one.pixels for one in read])
        for one, judged in zip(read, self._scorer(pixels, [one.size for one in read]), strict=True):
            if judged is None:
                self.faults.append(f"{shown(one.file)}: {NOT_FINITE}")
                continue
            scored = Scored(one.file, *judged[:4])
            rows.add(self._row(scored, one, judged, rows.path.parent), scored.absolute_score)
            self.scored.append(scored)

    def _row(self, scored: Scored, one: _Read, judged: Judged, folder: Path) -> dict[str, Any]:
        regions = judged.regions
        name = None
        if self._painter is not None and one.shown is not None:
            name = self._unused(one.file.stem)
            verdict = self._verdict(scored, regions)
            picture = self._painter.paint(one.shown, judged.score_map, regions or (), one.size, verdict)
            with written_aside(folder / name) as aside:
                picture.save(aside, format="PNG", compress_level=COMPRESSION)
            self._names[name.casefold()] = name
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

    def _finish(self, apart: Path, rows: Rows) -> None:
        for name in self._names.values():
            with write_faults(self._out / name):
                (apart / name).replace(self._out / name)
        rows.finish(self.table)
        rows.path.unlink()

    def _is_own(self, file: Path) -> bool:
        if not file.name.endswith(HEAT_MAP):
            return False
        return file.parent.resolve() in (self._out.resolve(), (self._out / UNFINISHED).resolve())

    def _unused(self, stem: str) -> str:
        """A name for the picture that no other has, on file systems that ignore case too; of printable characters,
        and short enough."""
        clean = "".join(c if c.isprintable() else "_" for c in stem)
        copy = 1
        while True:
            end = HEAT_MAP if copy == 1 else f"_{copy}{HEAT_MAP}"
            name = clean.encode()[: LONGEST_NAME - len(end)].decode(errors="ignore") + end
            if name.casefold() not in self._names:
                return name
            copy += 1
