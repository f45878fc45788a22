"""Image sets and how they are read. Knows nothing of models."""

from .dataset import ImageDataset, LooseImages
from .fingerprint import fingerprint
from .image_set import ImageSet, Sample
from .images import load_image, load_mask, read_image
from .layouts import categories, classes_of, folder, mvtec, open_image_set, visa
from .listing import list_images
from .sample_sets import elpv, textures
from .shard_set import ShardSet
from .sharding import write_shards
from .shards import ShardedImages

__all__ = [
    "ImageDataset",
    "ImageSet",
    "LooseImages",
    "Sample",
    "ShardSet",
    "ShardedImages",
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
    "write_shards",
]
