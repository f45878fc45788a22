"""Opens textures: tiles of scikit-image's photographs with synthetic defects."""

from pathlib import Path

from ..image_set import ImageSet, Source
from ..sample_cache import photograph, sample_cache
from ..synthetic_textures import write_textures
from .layout import Layout, check_class
from .mvtec import mvtec

IMAGE_SIZE = (256, 256)
LICENCE = "textures: photographs bundled with scikit-image, CC0, defects drawn by fastmsflow"
# Each texture, and the one that its foreign patches come from.
TEXTURES = {"brick": "gravel", "grass": "brick", "gravel": "grass"}


def textures(kind: str = "brick", cache_dir: str | Path | None = None) -> ImageSet:
    """Opens tiles of one photograph with synthetic defects and exact masks, written once into ``cache_dir``.

    ``cache_dir``: by default fastmsflow/textures-v1 in XDG_CACHE_HOME or ~/.cache. See
    fastmsflow.data.synthetic_textures. Raises: InputError for another kind, UnavailableError if scikit-image is not
    installed.
    """
    check_class("textures", kind, list(TEXTURES))
    target = (sample_cache("textures-v1") if cache_dir is None else Path(cache_dir)) / kind
    if not target.is_dir():
        write_textures(target, photograph(kind), photograph(TEXTURES[kind]))
    tiles = mvtec(target.parent, kind)
    return ImageSet(f"textures {kind}", tiles.train, tiles.test, IMAGE_SIZE, LICENCE)


def _open(source: Source, category: str | None) -> ImageSet:
    return textures(category or "brick")


LAYOUT = Layout(
    name="textures", detects=lambda source: source == "textures", classes=lambda source: sorted(TEXTURES), open=_open
)
