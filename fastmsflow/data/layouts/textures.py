"""Opens textures: tiles of scikit-image's photographs with synthetic defects."""

import os
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

from ...errors import UnavailableError
from ..image_set import ImageSet, Source
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
    try:
        import skimage.data as photographs
    except ImportError as error:
        raise UnavailableError("the texture photographs are not installed: pip install scikit-image") from error
    target = (_cache() if cache_dir is None else Path(cache_dir)) / kind
    if not target.is_dir():
        write_textures(target, getattr(photographs, kind)(), getattr(photographs, TEXTURES[kind])())
    tiles = mvtec(target.parent, kind)
    return ImageSet(f"textures {kind}", tiles.train, tiles.test, IMAGE_SIZE, LICENCE)


@lru_cache(maxsize=1)
def _temporary() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="fastmsflow-textures-")


def _cache() -> Path:
    """Returns a folder of the user's cache, or one of this process's own where there is no home to write into."""
    with suppress(OSError, RuntimeError):
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastmsflow" / "textures-v1"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK) or any(folder.iterdir()):
            return folder
    return Path(_temporary().name)


def _open(source: Source, category: str | None) -> ImageSet:
    return textures(category or "brick")


LAYOUT = Layout(
    name="textures", detects=lambda source: source == "textures", classes=lambda source: sorted(TEXTURES), open=_open
)
