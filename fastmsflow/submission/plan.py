"""Plans a submission: each object's model and private images, all looked at before anything is scored."""

import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypedDict

from ..calibration import Calibration, PixelThreshold
from ..data import classes_of
from ..data.fingerprint import short_digest
from ..data.image_io import image_size_of
from ..data.layouts.mvtec_ad_2 import OBJECTS, PRIVATE_SPLITS, private_images
from ..errors import InputError, InputWarning, first_few
from ..evaluation.checkpoint_files import CHECKPOINT_FILES, ON_TEST
from ..files import shown
from ..inference import AUTO
from ..inference.precision import check_dtype
from ..models.checkpoint import read_config
from ..number_range import WORKERS
from ..schema import read_json_file
from ..training.run_directory import RESULTS_FILE, is_unfinished

IMAGES_OF = {
    "can": 321, "fabric": 314, "fruit_jelly": 255, "rice": 277, "sheet_metal": 142, "vial": 276, "wallplugs": 232,
    "walnuts": 228,
}  # fmt: skip
"""The number of images in each private set as published, in which the server counts (arXiv 2503.21622)."""
NAME_ENDS = dict(zip(PRIVATE_SPLITS, ("regular", "mixed"), strict=True))
"""The ends of the published names: 000_regular.png and 000_mixed.png."""
NUMBERED = re.compile(r"(\d{3})_")
CHECKPOINTS = [name for chosen, name in CHECKPOINT_FILES.items() if chosen != ON_TEST]
"""The checkpoints of a run, the one to use first; one that was chosen by the test set is none of them."""


@dataclass(frozen=True, kw_only=True)
class SubmissionOptions:
    """Options of ``submit``.

    ``false_pixels``: share of good pixels that may be marked; None: the rate of each model's calibration. ``dtype``:
    see fastmsflow.inference.resolve_dtype. ``workers``: processes that read images. Raises: InputError if ``dtype`` is
    not known, or ``workers`` out of its range.
    """

    false_pixels: float | None = None
    dtype: str = AUTO
    workers: int = 0

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        WORKERS.check("workers", self.workers)


@dataclass(frozen=True)
class PrivateImage:
    """An image of a private set."""

    split: str
    file: Path
    size: tuple[int, int]
    """(width, height), upright."""

    @property
    def name(self) -> str:
        """The split and the stem of the file's name, which its maps have too."""
        return f"{self.split}/{self.file.stem}"

    def stamp(self) -> list[int]:
        """Returns what differs if the image is replaced by one of other contents, most probably."""
        return [*self.size, self.file.stat().st_size]


@dataclass(frozen=True)
class PlannedObject:
    """An object whose private images are to be scored."""

    name: str
    checkpoint: Path
    threshold: PixelThreshold
    images: Sequence[PrivateImage]
    dtype: str

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings that all maps of the object depend on, fit for JSON."""
        with self.checkpoint.open("rb") as file:
            model = short_digest(iter(partial(file.read, 2**20), b""))
        return {"model": model, "threshold": self.threshold.value, "dtype": self.dtype}


@dataclass(frozen=True)
class SubmissionPlan:
    """The objects of a set."""

    objects: Sequence[PlannedObject]
    without_model: Mapping[str, str]
    """Object -> why it has no model that can be used."""
    differences: Sequence[str]
    """A line for each difference from the published set, which alone the server takes."""


def plan_submission(runs: Path, root: Path, options: SubmissionOptions) -> SubmissionPlan:
    """Finds the model of each object of the set ``root`` in ``runs``/OBJECT, and looks at all private images' headers.

    An InputWarning tells where the server, which takes the published set only, would refuse names or counts.

    Raises: InputError if ``root`` is no set in the layout of MVTec AD 2, an object is no folder, a private set is
    missing, has gaps or an image that cannot be read, no object has a model, or a model is of another object or has no
    threshold of pixels.
    """
    names = _objects_of(root)
    without_model: dict[str, str] = {}
    checkpoints: dict[str, Path] = {}
    for name in names:
        try:
            checkpoints[name] = _checkpoint_of(runs / name)
        except _NoModel as error:
            without_model[name] = str(error)
    if not checkpoints:
        raise InputError(_no_models(runs, root, names))
    thresholds = {name: _threshold(path, root / name, options) for name, path in checkpoints.items()}
    images = {name: _images_of(root, name) for name in names}
    differences = list(_differences(images))
    _warn_of_the_server(root, differences)
    objects = [
        PlannedObject(name, path, thresholds[name], images[name], options.dtype) for name, path in checkpoints.items()
    ]
    return SubmissionPlan(objects, without_model, differences)


def refuse_within_set(out: Path, root: Path) -> None:
    """Raises: InputError if ``out`` is the folder of an object of the set ``root``, or lies in it."""
    place = out.resolve()
    for name in _objects_of(root):
        if place.is_relative_to((root / name).resolve()):
            raise InputError(
                f"{shown(out)}: lies in {shown(root / name)}, among the images of {shown(name)}; choose another folder"
            )


def _objects_of(root: Path) -> list[str]:
    """Returns the names of the objects. Raises: InputError if there are none, or one is no folder."""
    if not root.is_dir():
        raise InputError(f"{shown(root)}: no such folder; give the one that holds the objects: {', '.join(OBJECTS)}")
    files = [name for name in OBJECTS if os.path.lexists(root / name) and not (root / name).is_dir()]
    if files:
        raise InputError(f"{shown(root / files[0])}: is no folder; unpack the object {files[0]} there")
    names = classes_of(root)
    if not names:
        raise InputError(
            f"{shown(root)}: holds no objects; give the folder of MVTec AD 2 that holds them: {', '.join(OBJECTS)}"
        )
    return names


def _no_models(runs: Path, root: Path, names: Sequence[str]) -> str:
    """Returns the line that tells of a folder of runs without any model."""
    fact = f"{shown(runs)}: holds no finished run of {', '.join(map(shown, names))}"
    if runs.is_file():
        return f"{shown(runs)}: is a file; give the folder that holds the folder of a run for each object"
    if any((runs / name).is_file() for name in CHECKPOINTS):
        return f"{fact}, but is a run itself; give the folder that holds the folder of a run for each object"
    return f"{fact}; `fastmsflow train {shown(root)} --class all --out {shown(runs)}` trains them"


class _NoModel(Exception):
    """The text says why an object has no model that can be used."""


def _checkpoint_of(run: Path) -> Path:
    """Returns the checkpoint of a run to use. Raises: _NoModel if there is none, or the run has not finished."""
    found = next((run / name for name in CHECKPOINTS if (run / name).is_file()), None)
    if found is None:
        raise _NoModel(f"{shown(run)} holds no {' or '.join(CHECKPOINTS)}")
    if is_unfinished(run):
        raise _NoModel(f"the run in {shown(run)} has not finished")
    return found


class _TrainedOn(TypedDict):
    name: str


class _Results(TypedDict):
    images: _TrainedOn


def _threshold(checkpoint: Path, folder: Path, options: SubmissionOptions) -> PixelThreshold:
    """Returns the model's threshold of pixels. Raises: InputError if it is of another object, or has none."""
    config = read_config(checkpoint)
    trained_on = config.get("notes", {}).get("images")
    results = checkpoint.with_name(RESULTS_FILE)
    if trained_on is None and results.is_file():
        # Earlier versions did not note the images in the checkpoint.
        read = read_json_file(results, _Results, f"{shown(results)}: damaged", "train the object again")
        trained_on = read["images"]["name"]
    if trained_on not in (None, folder.name):
        raise InputError(
            f"{shown(checkpoint)}: was trained on {shown(str(trained_on))}, not on {shown(folder.name)}; put each run"
            " into the folder of its object's name"
        )
    described = config.get("calibration")
    calibration = None if described is None else Calibration.from_dict(described)
    if calibration is None or not calibration.has_pixel_threshold:
        raise InputError(
            f"{shown(checkpoint)}: has no threshold of pixels; `fastmsflow calibrate {shown(checkpoint)}"
            f" {shown(folder / 'validation/good')}` sets one"
        )
    return calibration.pixel_threshold(options.false_pixels)


def _images_of(root: Path, name: str) -> list[PrivateImage]:
    """Returns the private images of an object. Raises: InputError if one is missing or cannot be read."""
    images: list[PrivateImage] = []
    faults: list[str] = []
    for split, files in private_images(root, name).items():
        _refuse_doubles(files)
        if name in OBJECTS:
            _refuse_gaps(root / name / split, files)
        for file in files:
            try:
                images.append(PrivateImage(split, file, image_size_of(file)))
            except InputError as error:
                faults.append(str(error))
    if faults:
        raise InputError(first_few(faults))
    return images


def _refuse_doubles(files: Sequence[Path]) -> None:
    """Raises: InputError if two files would have one map."""
    stems: dict[str, Path] = {}
    for file in files:
        other = stems.setdefault(file.stem, file)
        if other is not file:
            raise InputError(f"{shown(file)}: its map would have the name of {shown(other.name)}'s; remove one of them")


def _refuse_gaps(folder: Path, files: Sequence[Path]) -> None:
    """Raises: InputError if images are numbered, and a number is missing between others."""
    numbered = [NUMBERED.match(file.name) for file in files]
    numbers = {int(match[1]) for match in numbered if match}
    missing = sorted(set(range(min(numbers), max(numbers))) - numbers) if all(numbered) else []
    if missing:
        listed = first_few([f"{number:03}" for number in missing])
        raise InputError(
            f"{shown(folder)}: holds images from {min(numbers):03} to {max(numbers):03} without {listed}; copy the set"
            " again"
        )


def _warn_of_the_server(root: Path, lines: list[str]) -> None:
    """Warns where objects, counts or names are not the published ones, which the server insists on."""
    if lines:
        warnings.warn(
            f"{shown(root)}: is not the whole published set, which alone the evaluation server takes:"
            f" {first_few(lines)}",
            InputWarning,
            stacklevel=3,
        )


def _differences(images: Mapping[str, Sequence[PrivateImage]]) -> Iterator[str]:
    lacking = [name for name in OBJECTS if name not in images]
    if lacking:
        yield f"it lacks {', '.join(lacking)}"
    others = [name for name in images if name not in OBJECTS]
    if others:
        yield f"{', '.join(map(shown, others))} is none of its objects"
    for name, count in IMAGES_OF.items():
        for split, end in NAME_ENDS.items() if name in images else ():
            found = [image.file.stem for image in images[name] if image.split == split]
            if len(found) != count:
                yield f"{name}/{split} has {len(found)} images, not {count}"
            elif set(found) != {f"{number:03}_{end}" for number in range(count)}:
                yield f"{name}/{split} has other names than 000_{end}.png and so on"
