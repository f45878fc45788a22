"""Two image sets that pip installs: photographs of solar cells, and textures."""

import importlib
import os
import random
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from ...errors import InputError, UnavailableError
from ..image_set import ImageSet, Sample
from .texture_tiles import write_textures

SIZE = (256, 256)
ELPV_LICENCE = (
    "ELPV: electroluminescence images of solar cells, CC BY-NC-SA 4.0 (not for commercial use);"
    " Deitsch et al., doi:10.1016/j.solener.2019.02.067"
)
TEXTURES_LICENCE = "textures: photographs bundled with scikit-image, CC0, defects drawn by fastmsflow"
ELPV_KINDS = ("mono", "poly", "all")
# Each texture, and the one that its foreign patches come from.
TEXTURES = {"brick": "gravel", "grass": "brick", "gravel": "grass"}


def elpv(kind: str = "mono") -> ImageSet:
    """ELPV's cells of mono- or polycrystalline modules, or all; CC BY-NC-SA 4.0 (not for commercial use).

    Good: defect probability 0; defective: 1; those in between are left out. The good ones, in the order of labels.csv,
    are shuffled by ``random.Random(0)``; the first fifth joins the defective ones in the test, the others train.
    Errors: InputError for another kind, UnavailableError where the package ``elpv-dataset`` is not installed.
    """
    if kind not in ELPV_KINDS:
        raise InputError(f"elpv: no class {kind!r}; there are {', '.join(ELPV_KINDS)}")
    spec = find_spec("elpv_dataset")
    if spec is None or spec.origin is None:
        raise UnavailableError("the ELPV images are not installed: pip install elpv-dataset")
    data = Path(spec.origin).parent / "data"
    good: list[Path] = []
    defective: list[Path] = []
    for line in (data / "labels.csv").read_text().splitlines():
        image, probability, module = line.split()
        if kind in (module, "all") and float(probability) in (0.0, 1.0):
            (defective if float(probability) else good).append(data / image)
    random.Random(0).shuffle(good)
    fifth = len(good) // 5
    test = [Sample(path, 0) for path in good[:fifth]] + [Sample(path, 1, kind="defective") for path in defective]
    return ImageSet(f"elpv {kind}", tuple(Sample(path, 0) for path in good[fifth:]), tuple(test), SIZE, ELPV_LICENCE)


def textures(kind: str = "brick", cache_dir: str | Path | None = None) -> ImageSet:
    """Tiles of one photograph with synthetic defects and exact masks, written once into ``cache_dir``.

    ``cache_dir``: by default fastmsflow/textures-v1 in XDG_CACHE_HOME or ~/.cache. See
    fastmsflow.data.layouts.texture_tiles.
    Errors: InputError for another kind, UnavailableError where scikit-image is not installed.
    """
    if kind not in TEXTURES:
        raise InputError(f"textures: no class {kind!r}; there are {', '.join(TEXTURES)}")
    photographs = _scikit_image_data()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastmsflow" / "textures-v1"
    target = Path(cache_dir or cache) / kind
    if not target.is_dir():
        write_textures(target, getattr(photographs, kind)(), getattr(photographs, TEXTURES[kind])())
    # Imported here: layouts opens sample sets by name.
    from .folders import mvtec

    tiles = mvtec(target.parent, kind)
    return ImageSet(f"textures {kind}", tiles.train, tiles.test, SIZE, TEXTURES_LICENCE)


def _scikit_image_data() -> ModuleType:
    try:
        return importlib.import_module("skimage.data")
    except ImportError as error:
        raise UnavailableError("the texture photographs are not installed: pip install scikit-image") from error
