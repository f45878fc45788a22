"""Opens VisA as published: a table, split_csv/1cls.csv, names each image's class, split, label and mask."""

import csv
from pathlib import Path

from ...errors import InputError
from ...files import shown
from ..file_search import FolderSearch
from ..image_set import ImageSet, Sample, Source
from .layout import Layout, check_class, only_class
from .mvtec import mvtec

SPLIT_FILE = Path("split_csv/1cls.csv")
COLUMNS = frozenset({"object", "split", "label", "image", "mask"})


def visa(root: str | Path, category: str) -> ImageSet:
    """Opens one class of VisA as published (split_csv/1cls.csv), or rearranged into the MVTec AD layout.

    An InputWarning tells of images in the class's folder that the table does not name. Raises: InputError if the class
    is not there, or names the row of the table that cannot be used.
    """
    root = Path(root)
    if not _detects(root):
        return mvtec(root, category)
    table = root / SPLIT_FILE
    rows = _read_rows(root)
    check_class(root, category, _class_names(rows))
    samples: dict[str, list[Sample]] = {"train": [], "test": []}
    for row in rows:
        if row["object"] != category:
            continue
        if row["split"] not in samples or row["label"] not in ("normal", "anomaly"):
            raise InputError(
                f"{table}: split {row['split']!r}, label {row['label']!r} of {row['image']};"
                " splits are train and test, labels normal and anomaly"
            )
        good = row["label"] == "normal"
        if row["split"] == "train" and not good:
            raise InputError(f"{table}: {row['image']} is an anomaly in train; only normal images train")
        mask = root / row["mask"] if row["mask"] else None
        # VisA's masks number the defects from 1.
        samples[row["split"]].append(
            Sample(root / row["image"], int(not good), mask, "good" if good else "anomaly", mask_above=0)
        )
    if not samples["train"]:
        raise InputError(f"{table}: no training images of {category}")
    images = ImageSet(category, tuple(samples["train"]), tuple(samples["test"]))
    search = FolderSearch()
    if (root / category).is_dir():
        search.add_elsewhere(root / category, images, f"images are read that {shown(table)} names: complete it")
    search.passed_over.warn()
    return images


def _detects(source: Source) -> bool:
    return (Path(source) / SPLIT_FILE).is_file()


def _classes(source: Source) -> list[str]:
    return _class_names(_read_rows(Path(source)))


def _class_names(rows: list[dict[str, str]]) -> list[str]:
    return sorted({row["object"] for row in rows})


def _open(source: Source, category: str | None) -> ImageSet:
    return visa(source, category or only_class(source, _classes(source)))


def _read_rows(root: Path) -> list[dict[str, str]]:
    path = root / SPLIT_FILE
    try:
        # Spreadsheets begin a saved CSV with a byte order mark.
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, restval=""))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not CSV in UTF-8 ({error}); copy it again") from error
    if rows and not rows[0].keys() >= COLUMNS:
        raise InputError(f"{path}: needs the columns {', '.join(sorted(COLUMNS))}")
    for row in rows:
        if not row["image"]:
            raise InputError(f"{path}: a row of {row['object']!r} names no image; complete it or remove it")
    return rows


LAYOUT = Layout(name="visa", detects=_detects, classes=_classes, open=_open)
