"""Opens the MVTec AD layout: CLASS/train/good, CLASS/test/KIND and CLASS/ground_truth/KIND."""

from pathlib import Path

from ..file_search import FolderSearch
from ..image_set import ImageSet, Sample, Source
from .folder import good_samples, samples_by_kind
from .layout import Layout, check_class, classes_below, root_and_class

# The published runs train this class at another size.
IMAGE_SIZES = {"transistor": (256, 256)}
DEFAULT_SIZE = (512, 512)
READ = "images are read from train/good, test/KIND and ground_truth/KIND: move or rename those, or save them as PNG"
LICENCE_FILES = ("LICENCE.txt", "license.txt")


def mvtec(root: str | Path, category: str) -> ImageSet:
    """Opens one class of the MVTec AD layout: train/good, test/KIND, ground_truth/KIND/STEM_mask.png (or STEM.png).

    An InputWarning tells of files in the class's folder that look like images and are not read. Raises: InputError if
    the class is not there, a folder is empty, a defective image lacks its mask although ground_truth is there, or
    folders' names say that images are not what they are taken for.
    """
    root = Path(root)
    classes = mvtec_classes(root)
    hint = "; it is one class itself: leave the class out" if not classes and (root / "train").is_dir() else ""
    check_class(root, category, classes, hint)
    base = root / category
    masks = base / "ground_truth"
    search = FolderSearch()
    test: tuple[Sample, ...] = ()
    if (base / "test").is_dir():
        test = samples_by_kind(search, base / "test", masks if masks.is_dir() else None)
    size = IMAGE_SIZES.get(category, DEFAULT_SIZE)
    images = ImageSet(category, good_samples(search, base / "train/good"), test, size, licence_of(base))
    search.add_elsewhere(base, images, READ)
    search.passed_over.warn()
    return images


def mvtec_classes(root: Source) -> list[str]:
    """Returns the names of the folders in ``root`` that have a folder train/good, sorted; hidden ones are left out."""
    return classes_below(root, "train/good")


def _is_class(root: Path) -> bool:
    return (root / "train/good").is_dir()


def _detects(source: Source) -> bool:
    return _is_class(Path(source)) or bool(mvtec_classes(source))


def _open(source: Source, category: str | None) -> ImageSet:
    return mvtec(*root_and_class(source, category, _is_class, mvtec_classes))


def licence_of(base: Path) -> str:
    """Returns the first line of the class's own licence file, or an empty text."""
    for name in LICENCE_FILES:
        if (base / name).is_file():
            return (base / name).read_text(errors="replace").strip().split("\n")[0]
    return ""


LAYOUT = Layout(name="mvtec", detects=_detects, classes=mvtec_classes, open=_open)
