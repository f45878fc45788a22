"""Opens folders of a single class: good images alone, or train/, test/KIND and ground_truth/KIND."""

from dataclasses import replace
from pathlib import Path

from ...errors import InputError
from ..file_search import list_images
from ..image_set import ImageSet, Sample, Source
from .layout import Layout, check_class

MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")


def folder(train: str | Path, test: str | Path | None = None, masks: str | Path | None = None) -> ImageSet:
    """Opens any folder of good images as an image set.

    ``test``: a folder with a folder for each kind of defect, and ``good`` among them. ``masks``: a folder of masks in
    the same tree. Raises: InputError if a folder is missing or empty, if masks come without test images, or if a
    defective image lacks its mask.
    """
    if masks is not None and test is None:
        raise InputError(f"{masks}: masks are of test images; name the test folder too")
    tests = samples_by_kind(Path(test), Path(masks) if masks is not None else None) if test is not None else ()
    return ImageSet(Path(train).resolve().name, good_samples(Path(train)), tests)


def good_samples(path: Path) -> tuple[Sample, ...]:
    """Returns all images below ``path`` as good samples. Raises: InputError if there are none."""
    return tuple(Sample(image, 0) for image in list_images(path))


def samples_by_kind(test: Path, masks: Path | None) -> tuple[Sample, ...]:
    """Returns the images of ``test``/KIND; all but those of ``test``/good are defective, with masks in ``masks``/KIND.

    Raises: InputError if there are no such folders or a mask is missing.
    """
    kinds = sorted(p for p in test.iterdir() if p.is_dir() and not p.name.startswith(".")) if test.is_dir() else []
    if not kinds:
        raise InputError(f"{test}: holds no folders by kind of defect; make {test.name}/good and one for each kind")
    samples: list[Sample] = []
    for kind in kinds:
        for image in list_images(kind):
            good = kind.name == "good"
            mask = None if good or masks is None else _find_mask(image, masks / image.parent.relative_to(test))
            samples.append(Sample(image, int(not good), mask, kind.name))
    return tuple(samples)


def _find_mask(image: Path, masks: Path) -> Path:
    for name in (f"{image.stem}_mask", image.stem):
        for suffix in (MASK_SUFFIXES[0], image.suffix, *MASK_SUFFIXES[1:]):
            if (masks / f"{name}{suffix}").is_file():
                return masks / f"{name}{suffix}"
    raise InputError(f"{image}: has no mask; put {image.stem}_mask.png into {masks}")


def _open(source: Source, category: str | None) -> ImageSet:
    root = Path(source)
    train, test, masks = (root / name for name in ("train", "test", "ground_truth"))
    if category is not None:
        hint = "; it is one class itself: leave the class out" if train.is_dir() else ""
        check_class(root, category, [], hint)
    if not train.is_dir():
        if test.is_dir():
            raise InputError(f"{root}: holds test images but no train folder; put the good images to learn from there")
        return folder(root)
    images = folder(train, test if test.is_dir() else None, masks if masks.is_dir() else None)
    return replace(images, name=root.resolve().name)


LAYOUT = Layout(name="folder", detects=lambda source: Path(source).is_dir(), classes=lambda source: [], open=_open)
