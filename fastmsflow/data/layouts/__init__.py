"""Data layouts, one file each, and the functions that open an image set of any of them."""

from pathlib import Path

from ...errors import InputError
from ..file_search import EMPTY_NAME
from ..image_set import ImageSet, Source
from ..shards.shard_set import refuse_shards
from . import btad, elpv, folder, mvtec, mvtec_ad_2, mvtec_loco, real_iad, small_defects, textures, visa
from .layout import Layout

SAMPLE_SETS = (elpv.LAYOUT, textures.LAYOUT, small_defects.LAYOUT)
FOLDER_LAYOUTS = (
    visa.LAYOUT, real_iad.LAYOUT, mvtec_ad_2.LAYOUT, mvtec_loco.LAYOUT, mvtec.LAYOUT, btad.LAYOUT, folder.LAYOUT
)  # fmt: skip
OF_FOLDERS = (mvtec_ad_2.LAYOUT, mvtec_loco.LAYOUT, btad.LAYOUT)
"""Layouts whose classes may lie beside those of another layout."""
LAYOUTS: tuple[Layout, ...] = (*SAMPLE_SETS, *FOLDER_LAYOUTS)
"""All layouts; the first that detects a source opens it."""


def open_image_set(source: str | Path, category: str | None = None) -> ImageSet:
    """Opens ``"elpv"``, ``"textures"`` or ``"small_defects"``, or a folder: VisA, Real-IAD, MVTec AD 2, MVTec LOCO AD
    or BTAD as published, the MVTec AD layout, train/ of good images beside test/KIND and ground_truth/KIND, or just
    good images.

    ``category``: the class, where there are several. Raises: InputError that names what is there instead.
    """
    refuse_shards(str(source))
    layout = _detect(source)
    if layout is None:
        if Path(source).exists():
            raise InputError(f"{source}: not a folder; give the folder that the images are in")
        names = ", ".join(layout.name for layout in SAMPLE_SETS)
        raise InputError(f"{source}: no such folder, and not a sample set ({names})")
    return _of_class(layout, source, category).open(source, category)


def classes_of(source: str | Path) -> list[str]:
    """Returns the classes of a set by the name or folder that ``open_image_set`` takes; none where it is one class
    itself."""
    layout = _detect(source)
    return [] if layout is None else layout.classes(source)


def categories(root: str | Path) -> list[str]:
    """Returns the classes below ``root``, in a layout that has classes; none where it has no such layout.

    Raises: InputError if VisA's table cannot be read, or objects of MVTec AD 2 lie one folder too deep.
    """
    return classes_of(Path(root))


def _detect(source: Source) -> Layout | None:
    if source == "":
        raise InputError(EMPTY_NAME)
    return next((layout for layout in LAYOUTS if layout.detects(source)), None)


def _of_class(layout: Layout, source: Source, category: str | None) -> Layout:
    """Returns the layout of a class of ``source``, whose first class has ``layout``."""
    if not category or layout not in (*OF_FOLDERS, mvtec.LAYOUT):
        return layout
    base = Path(source) / category
    # A class that holds other classes is not of their layout.
    own = next((other for other in OF_FOLDERS if other.detects(base) and not other.classes(base)), None)
    # An object or a class of the others has no such folders, even if some of its own are missing.
    is_plain = all((base / name).is_dir() for name in ("train/good", "test")) and not (base / "validation").is_dir()
    return own or (mvtec.LAYOUT if is_plain else layout)
