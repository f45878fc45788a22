"""Opens the BTAD layout, in which good images are called ok and defective ones ko.

The layout is documented with the images, https://avires.dimi.uniud.it/papers/btad/btad.zip, and in arXiv 2104.10036.
"""

from functools import partial
from pathlib import Path

from ..file_search import FolderSearch
from ..image_set import ImageSet, Source
from ..masks import MaskFolder
from .folder import good_samples, samples_by_kind
from .layout import Layout, check_class, classes_below, root_and_class
from .mvtec import licence_of

GOOD, DEFECTIVE = "ok", "ko"
MASK_FOLDER = partial(MaskFolder, names=("{}",))
READ = "images are read from train/ok, test/ok, test/ko and ground_truth/ko: move or rename those, or save them as PNG"


def btad(root: str | Path, category: str) -> ImageSet:
    """Opens one class of BTAD: train/ok, test/ok, test/ko and the masks ground_truth/ko/STEM, with any image's suffix.

    An InputWarning tells of files in the class's folder that look like images and are not read. Raises: InputError if
    the class is not there, a folder is missing or empty, or a defective image lacks its mask although ground_truth is
    there.
    """
    root = Path(root)
    hint = "; it is one class itself: leave the class out" if _is_class(root) else ""
    check_class(root, category, _classes(root), hint)
    base = root / category
    masks = base / "ground_truth"
    search = FolderSearch()
    test = samples_by_kind(
        search,
        base / "test",
        masks if masks.is_dir() else None,
        only=(GOOD, DEFECTIVE),
        good=GOOD,
        mask_folder=MASK_FOLDER,
    )
    images = ImageSet(category, good_samples(search, base / "train" / GOOD), test, licence=licence_of(base))
    search.add_elsewhere(base, images, READ)
    search.passed_over.warn()
    return images


def _is_class(folder: Path) -> bool:
    return all((folder / inner).is_dir() for inner in (f"train/{GOOD}", f"test/{GOOD}", f"test/{DEFECTIVE}"))


def _classes(source: Source) -> list[str]:
    return [name for name in classes_below(source, f"train/{GOOD}") if _is_class(Path(source) / name)]


def _detects(source: Source) -> bool:
    return _is_class(Path(source)) or bool(_classes(source))


def _open(source: Source, category: str | None) -> ImageSet:
    return btad(*root_and_class(source, category, _is_class, _classes))


LAYOUT = Layout(name="btad", detects=_detects, classes=_classes, open=_open)
