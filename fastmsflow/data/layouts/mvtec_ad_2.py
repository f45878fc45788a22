"""Opens the MVTec AD 2 layout: OBJECT/train/good, validation/good, test_public and two private test sets.

The layout is documented on https://www.mvtec.com/company/research/datasets/mvtec-ad-2 and in arXiv 2503.21622.
"""

import os
import re
from functools import partial
from pathlib import Path

from ...errors import InputError
from ...files import shown
from ..file_search import FolderSearch
from ..image_set import ImageSet, Sample, Source
from ..masks import MaskFolder
from .folder import good_samples, samples_by_kind
from .layout import Layout, check_class, folders_in, root_and_class
from .mvtec import licence_of, mvtec_classes

OBJECTS = ("can", "fabric", "fruit_jelly", "rice", "sheet_metal", "vial", "wallplugs", "walnuts")
"""The published objects; a user's own may have other names."""
PRIVATE_SPLITS = ("test_private", "test_private_mixed")
"""The folders of images whose labels the evaluation server alone has."""
PUBLIC = "test_public"
KINDS = ("good", "bad")
MASK_FOLDER = partial(MaskFolder, names=("{}_mask",))
READ = (
    "images are read from train/good, validation/good and test_public/good, bad and ground_truth/bad: move or rename"
    " those, or save them as PNG"
)


def mvtec_ad_2(root: str | Path, category: str) -> ImageSet:
    """Opens one object of MVTec AD 2: train/good, validation/good, test_public/good and bad, and the masks
    test_public/ground_truth/bad/STEM_mask.png.

    The images of PRIVATE_SPLITS are in none of the set's parts, see ``private_images``. An InputWarning tells of other
    files in the object's folder that look like images and are not read. Raises: InputError if the object is not there,
    a folder of good images is missing or empty, or a defective image lacks its mask although ground_truth is there.
    """
    root = Path(root)
    _check_object(root, category)
    base = root / category
    search = FolderSearch()
    train, validation = (good_samples(search, base / split / "good") for split in ("train", "validation"))
    test: tuple[Sample, ...] = ()
    if (base / PUBLIC).is_dir():
        masks = base / PUBLIC / "ground_truth"
        test = samples_by_kind(
            search,
            base / PUBLIC,
            masks if masks.is_dir() else None,
            only=KINDS,
            mask_folder=MASK_FOLDER,
        )
    images = ImageSet(category, train, test, licence=licence_of(base), validation=validation)
    for split in PRIVATE_SPLITS:
        # Searched here, they do not count as images that nobody reads.
        search.images_and_faults(base / split)
    search.add_elsewhere(base, images, READ)
    search.passed_over.warn()
    return images


def private_images(root: str | Path, category: str) -> dict[str, list[Path]]:
    """Returns the image files of each of PRIVATE_SPLITS of an object, sorted by name, numbers in it by value.

    Raises: InputError if the object or a split is no folder, or a split holds no images or has folders of images.
    """
    base = Path(root) / category
    found: dict[str, list[Path]] = {}
    search = FolderSearch()
    for split in PRIVATE_SPLITS:
        folder = base / split
        if not folder.is_dir():
            missing = next(path for path in (base, folder) if not path.is_dir())
            fact = "not a folder" if missing.exists() else "no such folder"
            raise InputError(f"{shown(missing)}: {fact}; unpack MVTec AD 2's {shown(category)} there again")
        files = search.images(folder)
        deeper = next((file for file in files if file.parent != folder), None)
        if deeper is not None:
            raise InputError(
                f"{shown(deeper)}: the images of {split} lie in {shown(folder)} itself; move this one there or away"
            )
        found[split] = sorted(files, key=lambda file: _by_numbers(file.name))
    search.passed_over.warn()
    return found


def _by_numbers(name: str) -> tuple[list[str | int], str]:
    """Returns a key that sorts names by the values of the numbers in them; text and numbers take turns."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def _is_object(folder: Path) -> bool:
    # A class in the MVTec AD layout may have a folder of one of these names beside its test.
    splits = (PUBLIC,) if (folder / "test").is_dir() else (PUBLIC, *PRIVATE_SPLITS)
    return (folder / "train/good").is_dir() and any((folder / split).is_dir() for split in splits)


def _too_deep(root: Path) -> list[str]:
    """Returns the names of the folders in ``root`` that hold an object in a folder of the same name."""
    return [name for name in folders_in(root) if _is_object(root / name / name)]


def _check_object(root: Path, category: str) -> None:
    """Raises: InputError if ``root`` has no object ``category``."""
    if category in _too_deep(root):
        _refuse_too_deep(root, category)
    if os.path.lexists(root / category) and not (root / category).is_dir():
        raise InputError(
            f"{shown(root / category)}: no folder; an object of MVTec AD 2 is a folder, so unpack it there, or move the"
            " file away"
        )
    classes = mvtec_classes(root)
    if category not in classes and category in folders_in(root):
        raise InputError(
            f"{shown(root / category)}: holds no train/good, as an object of MVTec AD 2 does; unpack it there again"
        )
    hint = "; it is one object itself: leave the class out" if _is_object(root) else ""
    check_class(root, category, classes, hint)


def _refuse_too_deep(root: Path, name: str) -> None:
    raise InputError(
        f"{shown(root / name)}: holds the object in one folder more, {shown(Path(name) / name)}; move that up, or give"
        f" {shown(root / name)} as the source"
    )


def _detects(source: Source) -> bool:
    root = Path(source)
    return _is_object(root) or any(_is_object(root / name) for name in mvtec_classes(root)) or bool(_too_deep(root))


def _classes(source: Source) -> list[str]:
    root = Path(source)
    for name in _too_deep(root):
        _refuse_too_deep(root, name)
    # A published object that is damaged is named, and not passed over, where every object is asked for.
    return sorted({*mvtec_classes(root), *(name for name in OBJECTS if os.path.lexists(root / name))})


def _open(source: Source, category: str | None) -> ImageSet:
    return mvtec_ad_2(*root_and_class(source, category, _is_object, _classes))


LAYOUT = Layout(name="mvtec_ad_2", detects=_detects, classes=_classes, open=_open)
