"""Opens ELPV, photographs of solar cells that the package ``elpv-dataset`` installs."""

import random
from importlib.util import find_spec
from pathlib import Path

from ...errors import UnavailableError
from ..image_set import ImageSet, Sample, Source
from .layout import Layout, check_class

IMAGE_SIZE = (256, 256)
LICENCE = (
    "ELPV: electroluminescence images of solar cells, CC BY-NC-SA 4.0 (not for commercial use);"
    " Deitsch et al., doi:10.1016/j.solener.2019.02.067"
)
CLASSES = ("mono", "poly")
# Not listed among the classes, as its images are theirs.
ALL = "all"


def elpv(kind: str = "mono") -> ImageSet:
    """Opens ELPV's cells of mono- or polycrystalline modules, or all; CC BY-NC-SA 4.0 (not for commercial use).

    Good: defect probability 0; defective: 1; those in between are left out. The good ones, in the order of labels.csv,
    are shuffled by ``random.Random(0)``; the first fifth joins the defective ones in the test, the others train.
    Raises: InputError for another kind, UnavailableError if the package ``elpv-dataset`` is not installed.
    """
    check_class("elpv", kind, (*CLASSES, ALL))
    spec = find_spec("elpv_dataset")
    if spec is None or spec.origin is None:
        raise UnavailableError("the ELPV images are not installed: pip install elpv-dataset")
    data = Path(spec.origin).parent / "data"
    good: list[Path] = []
    defective: list[Path] = []
    for line in (data / "labels.csv").read_text().splitlines():
        image, probability, module = line.split()
        if kind in (module, ALL) and float(probability) in (0.0, 1.0):
            (defective if float(probability) else good).append(data / image)
    random.Random(0).shuffle(good)
    fifth = len(good) // 5
    test = [Sample(path, 0) for path in good[:fifth]] + [Sample(path, 1, kind="defective") for path in defective]
    return ImageSet(f"elpv {kind}", tuple(Sample(path, 0) for path in good[fifth:]), tuple(test), IMAGE_SIZE, LICENCE)


def _open(source: Source, category: str | None) -> ImageSet:
    return elpv(category or CLASSES[0])


LAYOUT = Layout(name="elpv", detects=lambda source: source == "elpv", classes=lambda source: list(CLASSES), open=_open)
