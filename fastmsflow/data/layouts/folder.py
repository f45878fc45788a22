"""Opens folders of a single class: good images alone, or train/, test/KIND and ground_truth/KIND."""

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from ...errors import InputError
from ...files import shown
from ..file_search import FolderSearch
from ..folder_names import refuse_misnamed, refuse_mixed
from ..image_set import ImageSet, Sample, Source
from ..masks import DefectMaskFolder, MaskFolder
from .layout import Layout, check_class

READ = "images are read from train, test/KIND and ground_truth/KIND: move or rename those, or save them as PNG"


def folder(train: str | Path, test: str | Path | None = None, masks: str | Path | None = None) -> ImageSet:
    """Opens any folder of good images as an image set.

    ``test``: a folder with a folder for each kind of defect, and ``good`` among them. ``masks``: a folder of masks in
    the same tree. An InputWarning tells of files that look like images and are not read. Raises: InputError if a folder
    is missing or empty, if masks come without test images, if a defective image lacks its mask, or if folders' names
    say that images are not what they are taken for.
    """
    search = FolderSearch()
    below_test, below_masks = (None if path is None else Path(path) for path in (test, masks))
    images = _read(search, Path(train), below_test, below_masks)
    for root in (below_test, below_masks):
        if root is not None:
            search.add_elsewhere(root, images, READ)
    search.passed_over.warn()
    return images


def good_samples(search: FolderSearch, path: Path) -> tuple[Sample, ...]:
    """Returns all images below ``path`` as good samples.

    Raises: InputError if there are none, or folders' names say that some are not good.
    """
    images = search.images(path)
    refuse_mixed(path, images)
    return tuple(Sample(image, 0) for image in images)


def samples_by_kind(
    search: FolderSearch,
    test: Path,
    masks: Path | None,
    *,
    only: Collection[str] | None = None,
    good: str = "good",
    mask_folder: Callable[[Path], MaskFolder | DefectMaskFolder] = MaskFolder,
) -> tuple[Sample, ...]:
    """Returns the images of ``test``/KIND; all but those of ``test``/``good`` are defective, with masks in
    ``masks``/KIND, which ``mask_folder`` finds.

    ``only``: the names of the kinds that count; None: all folders do.
    Raises: InputError if there are no such folders, a mask is missing, or folders' names say that images are not of
    their kind.
    """
    kinds = sorted(p for p in test.iterdir() if p.is_dir() and not p.name.startswith(".")) if test.is_dir() else []
    if only is not None:
        kinds = [kind for kind in kinds if kind.name in only]
    samples: list[Sample] = []
    folders: dict[Path, MaskFolder | DefectMaskFolder] = {}
    for kind in kinds:
        images = search.images(kind, may_be_results=True)
        refuse_misnamed(test, kind.name, images, good)
        if kind.name == good:
            samples += (Sample(image, 0) for image in images)
            continue
        for image in images:
            mask = None
            if masks is not None:
                folder = masks / image.parent.relative_to(test)
                if folder not in folders:
                    folders[folder] = mask_folder(folder)
                mask = folders[folder].mask_of(image)
            samples.append(Sample(image, 1, mask, kind.name))
    if not samples:
        raise InputError(
            f"{shown(test)}: holds no folders by kind of defect; make {test.name}/{good} and one for each kind"
        )
    return tuple(samples)


def _read(search: FolderSearch, train: Path, test: Path | None, masks: Path | None) -> ImageSet:
    if masks is not None and test is None:
        raise InputError(f"{shown(masks)}: masks are of test images; name the test folder too")
    tests = samples_by_kind(search, test, masks) if test is not None else ()
    return ImageSet(train.resolve().name, good_samples(search, train), tests)


def _open(source: Source, category: str | None) -> ImageSet:
    root = Path(source)
    train, test, masks = (root / name for name in ("train", "test", "ground_truth"))
    if category is not None:
        hint = "; it is one class itself: leave the class out" if train.is_dir() else ""
        check_class(root, category, [], hint)
    search = FolderSearch()
    if train.is_dir():
        images = _read(
            search, train, test if test.is_dir() else None, masks if masks.is_dir() and test.is_dir() else None
        )
        images = replace(images, name=root.resolve().name)
        search.add_elsewhere(root, images, READ)
    elif test.is_dir():
        raise InputError(f"{root}: holds test images but no train folder; put the good images to learn from there")
    else:
        images = _read(search, root, None, None)
    search.passed_over.warn()
    return images


LAYOUT = Layout(name="folder", detects=lambda source: Path(source).is_dir(), classes=lambda source: [], open=_open)
