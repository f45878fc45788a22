"""Holds the labels and masks of a test set."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..data import ImageSet, Sample
from ..data.masks import Mask, check_mask_size, read_mask
from ..distributed.process_group import SINGLE_PROCESS, ProcessGroup
from ..errors import InputError, InputWarning, first_few
from ..files import shown

EXACT_PIXELS = 2**26
"""Pixels of a test set, 256 images of 512x512, up to which a single process holds all maps and masks in memory and
computes exact pixel metrics: 9 bytes a pixel for each model, and about as much again for sorting."""


class MaskNotes:
    """Collects masks that mark nothing or everything, or lose regions to resizing, and warns of them once."""

    def __init__(self) -> None:
        self._notes: dict[str, Mask] = {}
        self._has_warned = False

    def add(self, sample: Sample, mask: Mask) -> None:
        """Adds the mask of a defective sample."""
        if sample.mask is not None and (not mask.marked or mask.is_full or mask.lost):
            # Its pixels, which may be many, are left out.
            self._notes[shown(sample.mask)] = mask._replace(pixels=mask.pixels[:0])

    def warn(self, image_size: tuple[int, int] | None, world: ProcessGroup = SINGLE_PROCESS) -> None:
        """Warns of the masks that all processes have added; all call this, and the first one warns."""
        if self._has_warned:
            return
        self._has_warned = True
        gathered = world.all_gather(self._notes) if world.size > 1 else [self._notes]
        notes = {name: note for some in gathered for name, note in sorted(some.items())}
        for line in _mask_lines(notes, image_size) if world.first else ():
            warnings.warn(line, InputWarning, stacklevel=3)


def _mask_lines(notes: dict[str, Mask], image_size: tuple[int, int] | None) -> list[str]:
    empty = [name for name, mask in notes.items() if not mask.marked]
    full = [name for name, mask in notes.items() if mask.is_full]
    lost = {name: mask.lost for name, mask in notes.items() if mask.lost}
    lines: list[str] = []
    if empty:
        lines.append(
            f"{_masks(len(empty), 'marks', 'mark')} no pixel: {first_few(empty)}; draw the defects, or move the images"
            " to test/good"
        )
    if full:
        lines.append(
            f"{_masks(len(full), 'marks', 'mark')} every pixel: {first_few(full)}; if that is not meant, save them with"
            " 255 where the defect is and 0 elsewhere"
        )
    if lost and image_size is not None:
        height, width = image_size
        named = [f"{count} of {name}" for name, count in lost.items()]
        count = sum(lost.values())
        regions = "1 region" if count == 1 else f"{count} regions"
        masks = "1 mask" if len(lost) == 1 else f"{len(lost)} masks"
        lines.append(
            f"{regions} of {masks} {'is' if count == 1 else 'are'} too small to have a pixel at {height}x{width}:"
            f" {first_few(named)}; pixel metrics leave them out, images of a larger --image-size do not"
        )
    return lines


def _masks(count: int, one: str, several: str) -> str:
    return f"{count} mask {one}" if count == 1 else f"{count} masks {several}"


@dataclass(frozen=True)
class GroundTruth:
    """Labels (N,) of a test set, 1 for a defective image, and its masks if it has any."""

    samples: Sequence[Sample]
    labels: np.ndarray
    image_size: tuple[int, int] | None
    """(H, W) of maps and masks; None: those of an image have its own size."""
    has_masks: bool
    exact: bool
    """Pixel metrics are computed from all maps at once; if False, from histograms in constant memory."""
    masks: np.ndarray | None
    """Masks (N, H, W) bool, if ``exact``; else they are read when they are needed."""
    mask_notes: MaskNotes = field(default_factory=MaskNotes)

    @classmethod
    def from_image_set(
        cls, images: ImageSet, image_size: tuple[int, int] | None, world: ProcessGroup = SINGLE_PROCESS
    ) -> "GroundTruth":
        """Reads the labels of ``images.test``, and the masks if they fit in memory and are of one size, ``image_size``.

        An InputWarning names masks that mark nothing or everything, or lose regions to resizing; where masks are read
        later, their sizes are checked, and ``mask_notes`` collects these. Raises: InputError if the images are all good
        or all defective, or a mask cannot be read or has not its image's size.
        """
        labels = np.array([sample.label for sample in images.test])
        defective = int(labels.sum())
        if defective in (0, len(labels)):
            raise InputError(
                f"{images.name}: evaluating needs good and defective test images;"
                f" it has {len(labels) - defective} good and {defective} defective: add the missing ones, or, to train"
                " without an evaluation, move the test images elsewhere"
            )
        kinds = {sample.kind for sample in images.test if sample.label} if images.kinds_apart else ()
        # Each kind of defect that is judged apart is held once more, with all good images.
        held = len(labels) + len(kinds) * (len(labels) - defective) + (defective if kinds else 0)
        exact = world.size == 1 and image_size is not None and held * image_size[0] * image_size[1] <= EXACT_PIXELS
        truth = cls(images.test, labels, image_size, images.has_masks, exact, None)
        if images.has_masks and exact:
            truth = replace(truth, masks=truth.load_masks(range(len(labels))))
            truth.mask_notes.warn(image_size)
        elif images.has_masks:
            # A training reads masks after its first round only.
            for sample in images.test:
                check_mask_size(sample)
        return truth

    def part(self, numbers: Sequence[int]) -> "GroundTruth":
        """Returns the ground truth of some of the images, whose masks are read, and warned of, by this one."""
        samples = [self.samples[number] for number in numbers]
        return replace(self, samples=samples, labels=self.labels[numbers], masks=None, mask_notes=MaskNotes())

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
        """Returns the masks (B, H, W) bool of these images, of one size. Raises: InputError if one cannot be read."""
        if self.masks is not None:
            return self.masks[list(numbers)]
        samples = [self.samples[number] for number in numbers]
        masks = [read_mask(sample, self.image_size) for sample in samples]
        for sample, mask in zip(samples, masks, strict=True):
            if sample.label:
                self.mask_notes.add(sample, mask)
        return np.stack([mask.pixels.numpy() for mask in masks])
