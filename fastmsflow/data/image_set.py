"""What an image set is: samples to train on and samples to test on."""

from dataclasses import dataclass
from pathlib import Path

Source = str | Path
"""A folder of images, or the name of a sample set."""


@dataclass(frozen=True, slots=True)
class Sample:
    """An image file and what is known of it."""

    image: Path
    """The file."""
    label: int
    """0 good, 1 defective."""
    mask: Path | None = None
    """Where the defect is; None: nowhere (label 0) or not known (label 1)."""
    kind: str = "good"
    """The defect's folder name."""
    mask_above: int = 127
    """Mask pixels above this value are defective."""


@dataclass(frozen=True)
class ImageSet:
    """Images to learn from and images to be judged on; none of them is opened yet."""

    name: str
    """The class, for reports."""
    train: tuple[Sample, ...]
    """Good images only."""
    test: tuple[Sample, ...]
    """Good and defective images; empty where there are none to judge on."""
    image_size: tuple[int, int] = (512, 512)
    """(H, W) to resize to, unless the user says otherwise."""
    licence: str = ""
    """One line: source and licence."""

    @property
    def has_masks(self) -> bool:
        """Whether every defective test sample has its mask, and there is one."""
        defective = [sample for sample in self.test if sample.label]
        return bool(defective) and all(sample.mask is not None for sample in defective)
