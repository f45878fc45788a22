"""Image sets and how they are read. Knows nothing of models."""

from .datasets import ImageDataset, ImageFileDataset
from .file_search import list_images
from .fingerprint import fingerprint
from .image_io import load_image, read_image
from .image_set import ImageSet, Sample
from .layouts import categories, classes_of, open_image_set
from .layouts.btad import btad
from .layouts.elpv import elpv
from .layouts.folder import folder
from .layouts.mvtec import mvtec
from .layouts.mvtec_ad_2 import mvtec_ad_2, private_images
from .layouts.mvtec_loco import mvtec_loco
from .layouts.real_iad import real_iad
from .layouts.small_defects import small_defects
from .layouts.textures import textures
from .layouts.visa import visa
from .light import LIGHT_CORRUPTIONS, LIGHT_RANGES, LightChange, draw_light
from .masks import load_mask
from .shards.dataset import ShardedImages
from .shards.shard_set import ShardSet
from .shards.writer import write_shards

# The name in version 0.1.
LooseImages = ImageFileDataset

__all__ = [
    "LIGHT_CORRUPTIONS",
    "LIGHT_RANGES",
    "ImageDataset",
    "ImageFileDataset",
    "ImageSet",
    "LightChange",
    "Sample",
    "ShardSet",
    "ShardedImages",
    "btad",
    "categories",
    "classes_of",
    "draw_light",
    "elpv",
    "fingerprint",
    "folder",
    "list_images",
    "load_image",
    "load_mask",
    "mvtec",
    "mvtec_ad_2",
    "mvtec_loco",
    "open_image_set",
    "private_images",
    "read_image",
    "real_iad",
    "small_defects",
    "textures",
    "visa",
    "write_shards",
]
