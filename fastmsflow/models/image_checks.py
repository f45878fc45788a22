"""Checks the images that a model is given, where that costs next to nothing."""

import warnings

import torch
from torch import Tensor

from ..errors import InputError, InputWarning, first_few

# Interpolation of images in [0, 1] goes a little beyond; images of mean 0 and deviation 1, or in 0..255, far beyond.
LOWEST, HIGHEST = -0.4, 1.4
DISPATCH = "__torch_dispatch__"


def check_images(images: Tensor, image_size: tuple[int, int], device: torch.device) -> None:
    """Checks type, shape, dtype and device, which waits for no GPU.

    ``image_size``: (H, W) and ``device`` of the model. Raises: InputError if images (B, 3, H, W) are not as they
    should be, or there are none.
    """
    check_form(images)
    if images.shape[2:] != image_size:
        raise InputError(f"images are {tuple(images.shape[2:])}; this model takes {image_size}: resize them")
    if images.device != device:
        raise InputError(f"images are on {images.device}, the model is on {device}: images.to({str(device)!r})")


def check_form(images: Tensor) -> None:
    """Checks type, shape and dtype of images of any size.

    Raises: InputError if images (B, 3, H, W) are not as they should be, or there are none.
    """
    if not isinstance(images, Tensor):
        raise InputError(f"images are of type {type(images).__name__}; give a tensor (B, 3, H, W) in [0, 1]")
    shape = tuple(images.shape)
    if images.ndim != 4 or shape[1] != 3:
        remedies = {
            images.ndim == 3 and shape[0] == 3: ": images[None]",
            images.ndim == 4 and shape[1] == 1: ": images.expand(-1, 3, -1, -1)",
            images.ndim == 4 and shape[3] == 3: ": images.permute(0, 3, 1, 2)",
        }
        raise InputError(f"images have shape {shape}; give (B, 3, H, W){remedies.get(True, '')}")
    if not len(images):
        raise InputError(f"images have shape {shape}; give at least one image")
    if not images.is_floating_point():
        raise InputError(f"images have dtype {images.dtype}; give floating ones in [0, 1]: images.float() / 255")
    if images.dtype.itemsize < 2:
        raise InputError(f"images have dtype {images.dtype}; give float32: images.float()")
    if images.layout != torch.strided:
        raise InputError("images are a sparse tensor; give a dense one: images.to_dense()")


def check_values(images: Tensor, may_be_nan: bool) -> None:
    """Checks the values of pixels, which waits for a GPU.

    An image with NaN or infinite pixels is told by an InputWarning, unless ``may_be_nan``: its neighbors can be used.
    Raises: InputError if pixels are far out of [0, 1], or no image is finite, unless ``may_be_nan``.
    """
    if images.is_meta or getattr(type(images), DISPATCH) is not getattr(Tensor, DISPATCH):
        # Such tensors, FakeTensor for one, have no values.
        return
    images = images.detach()
    lowest, highest = (value.item() for value in images.aminmax())
    if lowest >= LOWEST and highest <= HIGHEST:
        return
    finite = images.isfinite().flatten(1).all(1)
    usable = images[finite]
    if len(usable):
        lowest, highest = (value.item() for value in usable.aminmax())
        if not (lowest >= LOWEST and highest <= HIGHEST):
            remedy = "images / 255" if lowest >= 0 and highest <= 255 else "they are not to be normalized before"
            raise InputError(f"images have values from {lowest:.4g} to {highest:.4g}; give [0, 1]: {remedy}")
    if may_be_nan:
        return
    bad = [str(number) for number in (~finite).nonzero()[:, 0].tolist()]
    fact = f"pixels of the images {first_few(bad)} of the batch are NaN or infinite"
    if not len(usable):
        raise InputError(f"{fact}; replace them")
    warnings.warn(f"{fact}, and so their scores will be; replace them", InputWarning, stacklevel=5)
