"""What an image set is: samples to train on and samples to test on."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sample:
    image: Path
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
    name: str
    train: tuple[Sample, ...]
    """Good images only."""
    test: tuple[Sample, ...]
    image_size: tuple[int, int] = (512, 512)
    """(H, W) to resize to, unless the user says otherwise."""
    licence: str = ""
    """One line: source and licence."""

    @property
    def has_masks(self) -> bool:
        """Whether every defective test sample has its mask, and there is one."""
        defective = [sample for sample in self.test if sample.label]
        return bool(defective) and all(sample.mask is not None for sample in defective)
