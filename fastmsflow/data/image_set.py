"""Image sets: samples to train on, to validate on and to test on."""

from dataclasses import dataclass
from pathlib import Path

from .image_formats import SUFFIXES, suffix_of

Source = str | Path
"""A folder of images, or the name of a sample set."""


@dataclass(frozen=True, slots=True)
class Sample:
    """An image file with its label and mask."""

    image: Path
    """The file."""
    label: int
    """0 for a good image, 1 for a defective one."""
    mask: Path | None = None
    """A mask of the defect, or a folder of masks, which the defect's pixels are in any of; None if there is no defect
    (label 0) or its place is not known (label 1)."""
    kind: str = "good"
    """The name of the folder, which says the kind of defect."""
    mask_above: int = 127
    """Mask pixels above this value are defective."""

    @property
    def mask_files(self) -> list[Path]:
        """The files of ``mask``, sorted; those of a folder are looked up anew each time."""
        if self.mask is None:
            return []
        return images_in(self.mask) if self.mask.is_dir() else [self.mask]


def images_in(folder: Path) -> list[Path]:
    """Returns the files in ``folder`` itself that have an image's suffix and are not hidden, sorted."""
    return sorted(
        path for path in folder.iterdir() if suffix_of(path.name) in SUFFIXES and not path.name.startswith(".")
    )


@dataclass(frozen=True)
class ImageSet:
    """Images to learn from and images to test on; none of them is opened yet."""

    name: str
    """The class, for reports."""
    train: tuple[Sample, ...]
    """Good images only."""
    test: tuple[Sample, ...]
    """Good and defective images; empty if there are none to test on."""
    image_size: tuple[int, int] = (512, 512)
    """(H, W) to resize to, unless the user says otherwise."""
    licence: str = ""
    """One line: source and licence."""
    kinds_apart: bool = False
    """True if figures of each kind of defect are reported too, as papers on this set do."""
    validation: tuple[Sample, ...] = ()
    """Good images of the set's own that choose the epoch and set thresholds; where there are some, no image of
    ``train`` is held out."""

    @property
    def samples(self) -> tuple[Sample, ...]:
        """All samples, those to train on first."""
        return (*self.train, *self.validation, *self.test)

    @property
    def has_masks(self) -> bool:
        """True if there are defective test samples and each of them has its mask."""
        defective = [sample for sample in self.test if sample.label]
        return bool(defective) and all(sample.mask is not None for sample in defective)
