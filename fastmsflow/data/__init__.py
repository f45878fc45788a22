"""Image sets and how they are read. Knows nothing of models."""

from .dataset import ImageDataset, LooseImages
from .fingerprint import fingerprint
from .image_set import ImageSet, Sample
from .images import list_images, load_image, load_mask, read_image
from .layouts import categories, classes_of, folder, mvtec, open_image_set, visa
from .sample_sets import elpv, textures

__all__ = [
    "ImageDataset",
    "ImageSet",
    "LooseImages",
    "Sample",
    "categories",
    "classes_of",
    "elpv",
    "fingerprint",
    "folder",
    "list_images",
    "load_image",
    "load_mask",
    "mvtec",
    "open_image_set",
    "read_image",
    "textures",
    "visa",
]
