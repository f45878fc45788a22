"""Opens Real-IAD as published: a JSON file of each class names its images, their split, kind of defect and masks.

The layout is documented on https://huggingface.co/datasets/Real-IAD/Real-IAD and in arXiv 2403.12580.
"""

from pathlib import Path, PurePosixPath
from typing import TypedDict

from ...errors import InputError
from ...files import shown
from ...schema import read_json_file
from ..image_set import ImageSet, Sample, Source
from .layout import Layout, check_class, only_class

TABLES = "realiad_jsons"
IMAGES = ("realiad_1024", "realiad_512", "realiad_256", "realiad_raw")
"""The folders of images, one a resolution; the first that is there is read."""
REMEDY = "copy it again"


class _Meta(TypedDict):
    normal_class: str
    prefix: str


class _Entry(TypedDict):
    anomaly_class: str
    image_path: str
    mask_path: str | None


class _Table(TypedDict):
    meta: _Meta
    train: list[_Entry]
    test: list[_Entry]


def real_iad(root: str | Path, category: str) -> ImageSet:
    """Opens one class of Real-IAD by its table, realiad_jsons/CLASS.json, which names images below realiad_1024, or
    where that is missing below realiad_512, realiad_256 or realiad_raw.

    All five views of a part are images of one class. Raises: InputError if the class is not there, or its table cannot
    be read, names an image outside of the folder of images, or has defective images to train on.
    """
    root = Path(root)
    check_class(root, category, _classes(root))
    table = _folder_of_tables(root) / f"{category}.json"
    content = read_json_file(table, _Table, f"{shown(table)}: no table of Real-IAD", REMEDY)
    images, meta = _folder_of_images(root), content["meta"]
    base = _below(images, meta["prefix"], table)
    if not base.is_dir():
        raise InputError(f"{shown(base)}: no such folder; unpack the images of {shown(category)} there")

    def sample(entry: _Entry) -> Sample:
        image = _below(base, entry["image_path"], table)
        if entry["anomaly_class"] == meta["normal_class"]:
            return Sample(image, 0)
        mask = None if not entry["mask_path"] else _below(base, entry["mask_path"], table)
        return Sample(image, 1, mask, entry["anomaly_class"])

    train, test = (tuple(map(sample, content[split])) for split in ("train", "test"))
    defective = next((each for each in train if each.label), None)
    if defective is not None:
        raise InputError(f"{shown(table)}: {shown(defective.image)} is defective and in train; {REMEDY}")
    if not train:
        raise InputError(f"{shown(table)}: names no images to train on; {REMEDY}")
    return ImageSet(category, train, test)


def _below(folder: Path, name: str, table: Path) -> Path:
    """Returns the path ``name`` below ``folder``. Raises: InputError if it leads out of that, or is no path."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise InputError(f"{shown(table)}: the path {shown(name)} leads out of {shown(folder)}; {REMEDY}")
    return folder / path


def _folder_of_tables(root: Path) -> Path:
    """Returns the folder of the published split; the archive holds folders of other splits beside it."""
    inner = root / TABLES / TABLES
    return inner if inner.is_dir() else root / TABLES


def _folder_of_images(root: Path) -> Path:
    """Raises: InputError if there is none."""
    for name in IMAGES:
        if (root / name).is_dir():
            return root / name
    raise InputError(f"{shown(root)}: holds {TABLES} but no images; unpack them into {shown(root / IMAGES[0])}")


def _detects(source: Source) -> bool:
    return (Path(source) / TABLES).is_dir()


def _classes(source: Source) -> list[str]:
    tables = _folder_of_tables(Path(source)).glob("[!.]*.json")
    return sorted(path.stem for path in tables)


def _open(source: Source, category: str | None) -> ImageSet:
    return real_iad(source, category or only_class(source, _classes(source)))


LAYOUT = Layout(name="real_iad", detects=_detects, classes=_classes, open=_open)
