"""What is known of a test set: which images are defective, and where."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..data import ImageSet, Sample, load_mask
from ..distributed.process_group import SINGLE_PROCESS, ProcessGroup
from ..errors import InputError
from ..files import shown

EXACT_PIXELS = 2**26
"""Up to so many pixels of a test set, 256 images of 512x512, a single process keeps its maps and masks and computes
pixel metrics from them exactly: 9 bytes a pixel for each model, and while it sorts about as much again."""


@dataclass(frozen=True)
class GroundTruth:
    """Labels (N,) of a test set and, where it has them, its masks."""

    samples: Sequence[Sample]
    labels: np.ndarray
    image_size: tuple[int, int]
    has_masks: bool
    exact: bool
    """Whether pixel metrics are from all maps at once; else, in constant memory, from histograms."""
    kept: np.ndarray | None
    """Masks (N, H, W) bool, where ``exact``."""

    @classmethod
    def from_image_set(
        cls, images: ImageSet, image_size: tuple[int, int], world: ProcessGroup = SINGLE_PROCESS
    ) -> "GroundTruth":
        """Errors: InputError where the images are all good or all defective, or a mask that is kept cannot be read."""
        labels = np.array([sample.label for sample in images.test])
        defective = int(labels.sum())
        if defective in (0, len(labels)):
            raise InputError(
                f"{images.name}: evaluating needs good and defective test images;"
                f" it has {len(labels) - defective} good and {defective} defective: add the missing ones, or, to train"
                " without an evaluation, move the test images elsewhere"
            )
        exact = world.size == 1 and len(labels) * image_size[0] * image_size[1] <= EXACT_PIXELS
        kept = None
        if images.has_masks and exact:
            kept = np.stack([load_mask(sample, image_size).numpy() for sample in images.test])
        return cls(images.test, labels, image_size, images.has_masks, exact, kept)

    @property
    def names(self) -> list[str]:
        """Of the files."""
        return [shown(sample.image) for sample in self.samples]

    @property
    def order(self) -> list[int]:
        """The images' numbers, in the order to score them in: the set's own; for histograms, whose bins the first ones
        make, so that any few in a row are spread over the set."""
        numbers = np.arange(len(self.labels))
        if self.exact:
            return numbers.tolist()
        # The golden ratio's multiples, less their whole parts, leave no wide gap however many there are.
        return np.argsort(numbers * ((5**0.5 - 1) / 2) % 1).tolist()

    def masks(self, numbers: Sequence[int]) -> np.ndarray:
        """Of these images, (B, H, W) bool. Errors: InputError where one cannot be read."""
        if self.kept is not None:
            return self.kept[list(numbers)]
        return np.stack([load_mask(self.samples[number], self.image_size).numpy() for number in numbers])
