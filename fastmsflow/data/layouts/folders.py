"""Folders of known layouts -> image sets."""

import csv
import difflib
from dataclasses import replace
from pathlib import Path

from ...errors import InputError
from ..file_search import list_images
from ..image_set import ImageSet, Sample
from .sample_sets import TEXTURES, elpv, textures

VISA_SPLIT = Path("split_csv/1cls.csv")
SIZES = {"transistor": (256, 256)}
DEFAULT_SIZE = (512, 512)


def open_image_set(source: str | Path, category: str | None = None) -> ImageSet:
    """``"elpv"`` or ``"textures"``, or a folder: VisA as published, the MVTec AD layout, train/ of good images beside
    test/KIND and ground_truth/KIND, or just good images.

    ``category``: the class, where there are several. Errors: InputError naming what is there instead.
    """
    if source == "elpv":
        return elpv(category or "mono")
    if source == "textures":
        return textures(category or "brick")
    root = Path(source)
    if not root.is_dir():
        raise InputError(f"{source}: no such folder, and not a sample set (elpv, textures)")
    if category is None and (root / "train/good").is_dir():
        return mvtec(root.resolve().parent, root.resolve().name)
    there = categories(root)
    if not there and category is None:
        return _plain(root)
    if category is None:
        if len(there) > 1:
            raise InputError(f"{root}: holds several classes; name one with --class: {', '.join(there)}")
        category = there[0]
    return visa(root, category) if (root / VISA_SPLIT).is_file() else mvtec(root, category)


def classes_of(source: str | Path) -> list[str]:
    """The classes of a set by the name or folder that ``open_image_set`` takes; none where it is one class itself."""
    if source == "elpv":
        return ["mono", "poly"]
    return sorted(TEXTURES) if source == "textures" else categories(source)


def categories(root: str | Path) -> list[str]:
    """The classes below ``root``, in the VisA or the MVTec AD layout; none where it has neither.

    Errors: InputError where VisA's table cannot be read.
    """
    root = Path(root)
    if (root / VISA_SPLIT).is_file():
        return sorted({row["object"] for row in _visa_rows(root)})
    return sorted(p.parents[1].name for p in root.glob("[!.]*/train/good") if p.is_dir())


def mvtec(root: str | Path, category: str) -> ImageSet:
    """One class of the MVTec AD layout: train/good, test/KIND, ground_truth/KIND/STEM_mask.png (or STEM.png).

    Errors: InputError where the class is not there, a folder is empty, or a defective image lacks its mask although
    ground_truth is there.
    """
    root = Path(root)
    _known(root, category)
    base = root / category
    truth = base / "ground_truth"
    test = _by_kind(base / "test", truth if truth.is_dir() else None) if (base / "test").is_dir() else ()
    return ImageSet(category, _good(base / "train/good"), test, SIZES.get(category, DEFAULT_SIZE), _licence(base))


def visa(root: str | Path, category: str) -> ImageSet:
    """VisA as published (split_csv/1cls.csv), or rearranged into the MVTec AD layout.

    Errors: InputError where the class is not there, or naming the row of the table that cannot be used.
    """
    root = Path(root)
    if not (root / VISA_SPLIT).is_file():
        return mvtec(root, category)
    _known(root, category)
    samples: dict[str, list[Sample]] = {"train": [], "test": []}
    for row in _visa_rows(root):
        if row["object"] != category:
            continue
        if row["split"] not in samples or row["label"] not in ("normal", "anomaly"):
            raise InputError(
                f"{root / VISA_SPLIT}: split {row['split']!r}, label {row['label']!r} of {row['image']};"
                " splits are train and test, labels normal and anomaly"
            )
        good = row["label"] == "normal"
        if row["split"] == "train" and not good:
            raise InputError(f"{root / VISA_SPLIT}: {row['image']} is an anomaly in train; only normal images train")
        mask = root / row["mask"] if row["mask"] else None
        # VisA's masks number the defects from 1.
        samples[row["split"]].append(
            Sample(root / row["image"], int(not good), mask, "good" if good else "anomaly", mask_above=0)
        )
    if not samples["train"]:
        raise InputError(f"{root / VISA_SPLIT}: no training images of {category}")
    return ImageSet(category, tuple(samples["train"]), tuple(samples["test"]))


def folder(train: str | Path, test: str | Path | None = None, masks: str | Path | None = None) -> ImageSet:
    """Any folder of good images; ``test``: folders by kind, ``good`` among them; ``masks``: the same tree of masks.

    Errors: InputError where a folder is missing or empty, masks come without test images, or one lacks its mask.
    """
    if masks is not None and test is None:
        raise InputError(f"{masks}: masks are of test images; name the test folder too")
    tests = _by_kind(Path(test), Path(masks) if masks is not None else None) if test is not None else ()
    return ImageSet(Path(train).resolve().name, _good(Path(train)), tests)


def _plain(root: Path) -> ImageSet:
    """train/ of good images and, where they are there, test/KIND and ground_truth/KIND; or just images."""
    train, test, truth = (root / name for name in ("train", "test", "ground_truth"))
    if not train.is_dir():
        if test.is_dir():
            raise InputError(f"{root}: holds test images but no train folder; put the good images to learn from there")
        return folder(root)
    images = folder(train, test if test.is_dir() else None, truth if truth.is_dir() else None)
    return replace(images, name=root.resolve().name)


def _good(path: Path) -> tuple[Sample, ...]:
    return tuple(Sample(image, 0) for image in list_images(path))


def _by_kind(test: Path, masks: Path | None) -> tuple[Sample, ...]:
    kinds = sorted(p for p in test.iterdir() if p.is_dir() and not p.name.startswith(".")) if test.is_dir() else []
    if not kinds:
        raise InputError(f"{test}: holds no folders by kind of defect; make {test.name}/good and one for each kind")
    samples = []
    for kind in kinds:
        for image in list_images(kind):
            good = kind.name == "good"
            mask = None if good or masks is None else _mask_of(image, masks / image.parent.relative_to(test))
            samples.append(Sample(image, int(not good), mask, kind.name))
    return tuple(samples)


def _mask_of(image: Path, masks: Path) -> Path:
    for name in (f"{image.stem}_mask", image.stem):
        for suffix in (".png", image.suffix, ".bmp", ".tif", ".tiff"):
            if (masks / f"{name}{suffix}").is_file():
                return masks / f"{name}{suffix}"
    raise InputError(f"{image}: has no mask; put {image.stem}_mask.png into {masks}")


def _known(root: Path, category: str) -> None:
    there = categories(root)
    if category not in there:
        close = difflib.get_close_matches(category, there, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        if not there and (root / "train").is_dir():
            hint = "; it is one class itself: leave the class out"
        raise InputError(f"{root}: no class {category!r} (there: {', '.join(there) or 'none'}){hint}")


def _visa_rows(root: Path) -> list[dict[str, str]]:
    path = root / VISA_SPLIT
    try:
        # Spreadsheets begin a saved CSV with a byte order mark.
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, restval=""))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not CSV in UTF-8 ({error}); copy it again") from error
    needed = {"object", "split", "label", "image", "mask"}
    if rows and not needed <= rows[0].keys():
        raise InputError(f"{path}: needs the columns {', '.join(sorted(needed))}")
    for row in rows:
        if not row["image"]:
            raise InputError(f"{path}: a row of {row['object']!r} names no image; complete it or remove it")
    return rows


def _licence(base: Path) -> str:
    """The first line of the set's own LICENCE.txt, where it has one."""
    for name in ("LICENCE.txt", "license.txt"):
        if (base / name).is_file():
            return (base / name).read_text(errors="replace").strip().split("\n")[0]
    return ""
