"""Makes a submission: scores private images, writes their maps, checks them and packs them."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..data.datasets import Progress
from ..data.image_batches import file_batches, read_batches
from ..errors import InputError
from ..files import shown
from ..inference.loading import load_model
from ..inference.scorer import Scorer
from ..inference.tiled_predictor import BATCH_SIZE
from .archive import pack
from .folder import SubmissionFolder, check_tifffile
from .plan import PlannedObject, PrivateImage, SubmissionOptions, SubmissionPlan, plan_submission, refuse_within_set

BYTES_OF_PIXEL = 2
Stage = Callable[[str, int], None]
DEFAULT_OPTIONS = SubmissionOptions()


@dataclass(frozen=True)
class ObjectResult:
    """The maps of an object."""

    name: str
    checkpoint: Path
    threshold: float
    """In nats of the absolute map."""
    images: Mapping[str, int]
    """Private set -> number of images that have a map."""
    marked: Mapping[str, float]
    """Private set -> share of the pixels that are marked, the mean over images."""


@dataclass(frozen=True)
class SubmissionResult:
    """The outcome of ``submit``."""

    objects: Sequence[ObjectResult]
    without_model: Mapping[str, str]
    """Object -> why it has no model that can be used."""
    faults: Sequence[str]
    """A line for each image that could not be scored."""
    archive: Path | None
    """The archive; None if it was not packed, since maps are missing."""
    differences: Sequence[str]
    """A line for each difference from the published set, which alone the server takes."""

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields, fit for JSON."""
        return {**asdict(self), "archive": self.archive and str(self.archive)}


def submit(
    runs: str | Path,
    root: str | Path,
    out: str | Path,
    options: SubmissionOptions = DEFAULT_OPTIONS,
    *,
    planned: Callable[[SubmissionPlan], None] = lambda plan: None,
    progress: Progress = lambda done: None,
    stage: Stage = lambda what, total: None,
) -> SubmissionResult:
    """Writes the maps of the private sets of MVTec AD 2 into ``out``, and packs them into ``out/submission.tar.gz``.

    ``root``: the set's folder, which holds its objects; ``runs``: the folder of ``train --class all``, which holds a
    run for each object. A run's checkpoint that was chosen on the set's validation images scores the images, else its
    last one. Maps are absolute, in nats; pixels above the checkpoint's threshold of pixels are marked.

    Called again, it goes on: maps that are there stay, unless their model, threshold or images have changed. The
    archive is packed only if every image of every object has its maps, which are all read and checked before.
    ``planned`` is called with the plan before anything is scored. ``stage`` is called with the label of the next stage
    and the number up to which ``progress`` then counts.

    Raises: InputError as ``plan_submission`` does, if ``out`` lies in an object or holds something else, the disk has
    too little space, or a map is damaged; fastmsflow.files.Busy if another process is writing to ``out``;
    UnavailableError if tifffile is not installed.
    """
    check_tifffile()
    plan = plan_submission(Path(runs), Path(root), options)
    refuse_within_set(Path(out), Path(root))
    planned(plan)
    with SubmissionFolder.opened(Path(out)) as folder:
        work = _Work(plan, folder, options, stage, progress)
        faults = work.score()
        complete = not faults and not plan.without_model
        results = work.check(complete)
        if complete:
            work.pack()
    archive = folder.archive if complete else None
    return SubmissionResult(results, plan.without_model, faults, archive, plan.differences)


@dataclass(frozen=True)
class _Work:
    """The steps of a submission."""

    plan: SubmissionPlan
    folder: SubmissionFolder
    options: SubmissionOptions
    stage: Stage
    progress: Progress

    def score(self) -> list[str]:
        """Writes the maps that are missing, and returns a line for each image that could not be scored."""
        waiting = [(planned, self.folder.waiting(planned)) for planned in self.plan.objects]
        self._refuse_full_disk(waiting)
        faults: list[str] = []
        for planned, images in waiting:
            if images:
                self.stage(f"scoring {planned.name}", len(images))
                faults += self._score(planned, images)
        return faults

    def _refuse_full_disk(self, waiting: Sequence[tuple[PlannedObject, Sequence[PrivateImage]]]) -> None:
        """Raises: InputError if the disk has no space for the maps of ``waiting``, and the archive of all."""
        every = [image for planned in self.plan.objects for image in planned.images]
        missing = [image for _, images in waiting for image in images]
        needed = sum(width * height * BYTES_OF_PIXEL for width, height in (image.size for image in [*missing, *every]))
        replaced = (
            path for planned, images in waiting for image in images for path in self.folder.paths(planned.name, image)
        )
        free = shutil.disk_usage(self.folder.out).free + sum(path.stat().st_size for path in replaced if path.is_file())
        if missing and needed > free:
            raise InputError(
                f"{shown(self.folder.out)}: the maps of {len(missing)} images and the archive take up to"
                f" {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free; free some space or choose another"
                " folder"
            )

    def _score(self, planned: PlannedObject, images: Sequence[PrivateImage]) -> list[str]:
        model = load_model(planned.checkpoint)
        scorer = Scorer(model, dtype=self.options.dtype, kind="absolute")
        # Only a model that can score replaces maps of earlier settings.
        self.folder.begin(planned)
        # Images that are cut share batches by their tiles.
        at_once = BATCH_SIZE if model.tiling is None else 1
        batches = list(file_batches([str(image.file) for image in images], at_once))
        faults: list[str] = []
        # Closing ends the reading processes, whatever happens.
        with closing(read_batches(batches, len(batches), scorer.reader(), self.options.workers)) as read:
            for item, result, fault in scorer.items(read):
                image = images[item.number]
                if result is None:
                    faults.append(str(fault))
                else:
                    score_map = resized(result.score_map, image.size)
                    self.folder.write(planned.name, image, score_map, planned.threshold.value)
                self.progress(item.number + 1)
        return faults

    def check(self, complete: bool) -> list[ObjectResult]:
        """Checks all maps, or if the submission is not ``complete`` those that are there."""
        self.stage("checking", sum(len(planned.images) for planned in self.plan.objects))
        results: list[ObjectResult] = []
        done = 0
        for planned in self.plan.objects:
            shares: dict[str, list[float]] = {image.split: [] for image in planned.images}
            for image in planned.images:
                if complete or all(path.exists() for path in self.folder.paths(planned.name, image)):
                    shares[image.split].append(self.folder.check(planned.name, image))
                done += 1
                self.progress(done)
            results.append(
                ObjectResult(
                    planned.name,
                    planned.checkpoint,
                    planned.threshold.value,
                    images={split: len(marked) for split, marked in shares.items()},
                    marked={split: float(np.mean(marked)) for split, marked in shares.items() if marked},
                )
            )
        return results

    def pack(self) -> None:
        """Packs all maps into the archive."""
        files = [
            path
            for planned in self.plan.objects
            for image in planned.images
            for path in self.folder.paths(planned.name, image)
        ]
        self.stage("packing", len(files))
        pack(files, self.folder.out, self.folder.archive, self.progress)


def resized(score_map: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns a map (H, W) float32 at the image's own ``size``, (width, height), by bilinear interpolation."""
    width, height = size
    if score_map.shape == (height, width):
        return score_map
    values = torch.from_numpy(score_map)[None, None]
    return F.interpolate(values, (height, width), mode="bilinear", align_corners=False, antialias=True)[0, 0].numpy()
