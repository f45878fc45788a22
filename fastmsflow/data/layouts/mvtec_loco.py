"""Opens the MVTec LOCO AD layout, in which each defect of an image has a mask of its own.

The layout is documented on https://www.mvtec.com/company/research/datasets/mvtec-loco and in
doi:10.1007/s11263-022-01578-9.
"""

from dataclasses import replace
from pathlib import Path

from ..file_search import FolderSearch
from ..image_set import ImageSet, Source, images_in
from ..masks import DefectMaskFolder
from .folder import good_samples, samples_by_kind
from .layout import Layout, check_class, folders_in, root_and_class
from .mvtec import licence_of, mvtec_classes

DEFECTS = ("logical_anomalies", "structural_anomalies")
KINDS = ("good", *DEFECTS)
READ = (
    "images are read from train/good, validation/good, test/KIND and ground_truth/KIND/STEM, KIND being good,"
    " logical_anomalies or structural_anomalies: move or rename those, or save them as PNG"
)


def mvtec_loco(root: str | Path, category: str) -> ImageSet:
    """Opens one class of MVTec LOCO AD: train/good, validation/good, test/good, logical_anomalies and
    structural_anomalies, and the masks ground_truth/KIND/STEM/000.png, 001.png, ..., one of each defect.

    Every pixel of a mask that is not 0 is defective, whatever kind of defect its value stands for. An InputWarning
    tells of files in the class's folder that look like images and are not read. Raises: InputError if the class is not
    there, a folder is missing or empty, or a defective image lacks its masks although ground_truth is there.
    """
    root = Path(root)
    hint = "; it is one class itself: leave the class out" if _is_class(root) else ""
    check_class(root, category, mvtec_classes(root), hint)
    base = root / category
    masks = base / "ground_truth"
    search = FolderSearch()
    train, validation = (good_samples(search, base / split / "good") for split in ("train", "validation"))
    samples = samples_by_kind(
        search, base / "test", masks if masks.is_dir() else None, only=KINDS, mask_folder=DefectMaskFolder
    )
    test = tuple(replace(sample, mask_above=0) for sample in samples)
    images = ImageSet(category, train, test, licence=licence_of(base), kinds_apart=True, validation=validation)
    search.add_elsewhere(base, images, READ)
    search.passed_over.warn()
    return images


def _is_class(folder: Path) -> bool:
    if not ((folder / "train/good").is_dir() and any((folder / "test" / kind).is_dir() for kind in DEFECTS)):
        return False
    masks = [path for path in (folder / "ground_truth" / kind for kind in DEFECTS) if path.is_dir()]
    # With one mask an image, in a file, these may be kinds of defect in the MVTec AD layout.
    return any(map(folders_in, masks)) or ((folder / "validation").is_dir() and not any(map(images_in, masks)))


def _detects(source: Source) -> bool:
    root = Path(source)
    return _is_class(root) or any(_is_class(root / name) for name in mvtec_classes(root))


def _open(source: Source, category: str | None) -> ImageSet:
    return mvtec_loco(*root_and_class(source, category, _is_class, mvtec_classes))


LAYOUT = Layout(name="mvtec_loco", detects=_detects, classes=mvtec_classes, open=_open)
