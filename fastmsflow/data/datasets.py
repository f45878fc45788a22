"""Datasets that turn samples, files and arrays into tensors, for a DataLoader or a ReaderPool."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from ..tiling import Tiling
from .image_io import load_image, read_bytes
from .image_set import Sample
from .image_tiles import ImageTiles
from .image_views import GivenImage, ImageView, ScaledImage, name_of, read_scaled, read_view
from .jpeg_decoder import encoded_or_pixels
from .masks import load_mask

ReadItem = Callable[[], dict[str, Any]]
"""Reads one item when called, in any process."""
Progress = Callable[[int], None]
"""Is called with the number of images done so far."""


def count_from(before: int, progress: Progress) -> Progress:
    """Returns a progress that counts from ``before`` on."""
    return lambda done: progress(before + done)


class ImageFileDataset(Dataset[dict[str, Any]]):
    """Reads image files, arrays and views of them at ``image_size`` (H, W), without masks and labels.

    ``images``: files, or arrays: gray (H, W) or color (H, W, 3 or 4) of uint8, or gray of uint16; or views of these,
    whose tiles have the side of ``image_size``. Items: ``image`` (3, H, W) float32 in [0, 1]; with ``encoded``, what
    ``jpeg_decoder.decode_batch`` takes, and ``source``, its name for errors. Reading an item raises InputError that
    names the file or the array's number.
    """

    variants = 1
    """The number of items in a row that show the same image, or tile, in different ways."""
    tiles: ImageTiles | None = None
    """The tiles of the images, each of which is an item; None if whole images are."""

    def __init__(
        self, images: Sequence[GivenImage | ImageView], image_size: tuple[int, int], encoded: bool = False
    ) -> None:
        self.images = images
        self.image_size = image_size
        self.encoded = encoded

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.to_read(index)()

    @property
    def image_count(self) -> int:
        """The number of images, of which each may have several items."""
        return len(self)

    def items_of(self, image: int) -> range:
        """Returns the numbers of an image's items."""
        return range(image, image + 1)

    @property
    def unit(self) -> str:
        """The word for items: images or tiles."""
        return "images" if self.tiles is None else "tiles"

    def view_name(self, index: int) -> str:
        """Returns the name of an item for messages, the place of a tile included."""
        return self.name(index)

    def offsets(self, numbers: Sequence[int]) -> Tensor | None:
        """Returns the places of the tiles of ``numbers`` as the flow takes them, see Tiling.offsets; None for none."""
        return None

    def in_epoch(self, epoch: int) -> "ImageFileDataset":
        """Returns the dataset of an epoch, whose items may be drawn anew."""
        return self

    def to_read(self, index: int) -> ReadItem:
        """Returns a function that reads the item and holds none of the others."""
        return partial(_read_image, self.images[index], self.name(index), self.image_size, self.encoded)

    def to_cut(self, index: int, tiling: Tiling) -> Callable[[], ScaledImage]:
        """Returns a function that reads the whole image, ready to be cut."""
        return partial(read_scaled, self.images[index], self.name(index), tiling)

    def name(self, index: int) -> str:
        """Returns the image's name for errors: its file, or its number if it is an array."""
        image = self.images[index]
        return name_of(image.image if isinstance(image, ImageView) else image, index)


class ImageDataset(ImageFileDataset):
    """Reads samples at ``image_size`` (H, W) when they are asked for.

    Items: ``image`` (3, H, W) float32 in [0, 1], ``mask`` (H, W) bool, ``label`` (1 is defective) and ``index`` int.
    Reading an item raises InputError that names the file, if the file cannot be read.
    """

    def __init__(self, samples: Sequence[Sample], image_size: tuple[int, int]) -> None:
        super().__init__([sample.image for sample in samples], image_size)
        self.samples = samples

    def to_read(self, index: int) -> ReadItem:
        """Returns what reads the sample ``index``."""
        return partial(_read_sample, self.samples[index], index, self.image_size)


def _read_sample(sample: Sample, index: int, image_size: tuple[int, int]) -> dict[str, Any]:
    return {
        "image": load_image(sample.image, image_size),
        "mask": load_mask(sample, image_size),
        "label": sample.label,
        "index": index,
    }


def _read_image(given: GivenImage | ImageView, name: str, image_size: tuple[int, int], encoded: bool) -> dict[str, Any]:
    source = {"source": name} if encoded else {}
    if encoded and isinstance(given, (str, Path)):
        return {"image": encoded_or_pixels(read_bytes(given), name, image_size), **source}
    view = given if isinstance(given, ImageView) else ImageView(given)
    return {"image": read_view(view, name, image_size), **source}
