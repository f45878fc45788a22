"""Opens small_defects: large images of scikit-image's photographs with synthetic defects of 6 to 20 pixels."""

from pathlib import Path

from ..image_set import ImageSet, Source
from ..sample_cache import photograph, sample_cache
from ..synthetic_small_defects import write_small_defects
from .layout import Layout, check_class
from .mvtec import mvtec

IMAGE_SIZE = (256, 256)
LICENCE = "small_defects: photographs bundled with scikit-image, CC0, defects drawn by fastmsflow"
CLASSES = ("brick", "grass", "gravel")


def small_defects(kind: str = "brick", cache_dir: str | Path | None = None) -> ImageSet:
    """Opens images of 760x1000 pixels, (H, W), with defects of 6 to 20 pixels and exact masks, written once into
    ``cache_dir``.

    ``cache_dir``: by default fastmsflow/small_defects-v1 in XDG_CACHE_HOME or ~/.cache. See
    fastmsflow.data.synthetic_small_defects. Raises: InputError for another kind, UnavailableError if scikit-image is
    not installed.
    """
    check_class("small_defects", kind, CLASSES)
    target = (sample_cache("small_defects-v1") if cache_dir is None else Path(cache_dir)) / kind
    if not target.is_dir():
        write_small_defects(target, photograph(kind))
    images = mvtec(target.parent, kind)
    return ImageSet(f"small_defects {kind}", images.train, images.test, IMAGE_SIZE, LICENCE)


def _open(source: Source, category: str | None) -> ImageSet:
    return small_defects(category or "brick")


LAYOUT = Layout(
    name="small_defects",
    detects=lambda source: source == "small_defects",
    classes=lambda source: sorted(CLASSES),
    open=_open,
)
