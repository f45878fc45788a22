"""Holds the labels and masks of a test set."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..data import ImageSet, Sample, load_mask
from ..distributed.process_group import SINGLE_PROCESS, ProcessGroup
from ..errors import InputError
from ..files import shown

EXACT_PIXELS = 2**26
"""Pixels of a test set, 256 images of 512x512, up to which a single process holds all maps and masks in memory and
computes exact pixel metrics: 9 bytes a pixel for each model, and about as much again for sorting."""


@dataclass(frozen=True)
class GroundTruth:
    """Labels (N,) of a test set, 1 for a defective image, and its masks if it has any."""

    samples: Sequence[Sample]
    labels: np.ndarray
    image_size: tuple[int, int]
    has_masks: bool
    exact: bool
    """Pixel metrics are computed from all maps at once; if False, from histograms in constant memory."""
    masks: np.ndarray | None
    """Masks (N, H, W) bool, if ``exact``; else they are read when they are needed."""

    @classmethod
    def from_image_set(
        cls, images: ImageSet, image_size: tuple[int, int], world: ProcessGroup = SINGLE_PROCESS
    ) -> "GroundTruth":
        """Reads the labels of ``images.test``, and the masks if they fit in memory.

        Raises: InputError if the images are all good or all defective, or a mask cannot be read.
        """
        labels = np.array([sample.label for sample in images.test])
        defective = int(labels.sum())
        if defective in (0, len(labels)):
            raise InputError(
                f"{images.name}: evaluating needs good and defective test images;"
                f" it has {len(labels) - defective} good and {defective} defective: add the missing ones, or, to train"
                " without an evaluation, move the test images elsewhere"
            )
        exact = world.size == 1 and len(labels) * image_size[0] * image_size[1] <= EXACT_PIXELS
        masks = None
        if images.has_masks and exact:
            masks = np.stack([load_mask(sample, image_size).numpy() for sample in images.test])
        return cls(images.test, labels, image_size, images.has_masks, exact, masks)

    @property
    def names(self) -> list[str]:
        """The names of the images' files."""
        return [shown(sample.image) for sample in self.samples]

    @property
    def scoring_order(self) -> list[int]:
        """The images' numbers in the order in which they are to be scored.

        This is the set's own order for exact metrics. The first images choose the bins of histograms, so for these any
        few images in a row are spread over the whole set.
        """
        numbers = np.arange(len(self.labels))
        if self.exact:
            return numbers.tolist()
        # Fractional parts of multiples of the golden ratio leave no wide gap, however many there are.
        return np.argsort(numbers * ((5**0.5 - 1) / 2) % 1).tolist()

    def load_masks(self, numbers: Sequence[int]) -> np.ndarray:
        """Returns the masks (B, H, W) bool of these images. Raises: InputError if one cannot be read."""
        if self.masks is not None:
            return self.masks[list(numbers)]
        return np.stack([load_mask(self.samples[number], self.image_size).numpy() for number in numbers])
