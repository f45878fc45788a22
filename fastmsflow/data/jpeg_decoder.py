"""Decodes JPEG files in batches on a GPU, which decoding them one by one would keep waiting."""

import io
from collections import defaultdict
from collections.abc import Sequence
from typing import cast

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from ..errors import InputError, UnavailableError
from .image_io import ORIENTATION, SMALLEST, as_tensor, decode_image

START, END = b"\xff\xd8\xff", b"\xff\xd9"


def check_decoder(device: torch.device) -> None:
    """Decodes a small image, so that a missing package is reported before any file is read.

    Raises: UnavailableError if TorchCodec is not installed, or decodes no JPEG files on ``device``.
    """
    content = io.BytesIO()
    Image.new("RGB", (SMALLEST, SMALLEST)).save(content, "JPEG")
    try:
        _decode([torch.frombuffer(bytearray(content.getvalue()), dtype=torch.uint8)], device)
    except ImportError as error:
        raise UnavailableError("JPEG files on a GPU need TorchCodec: pip install 'fastmsflow[jpeg]'") from error
    except (OSError, RuntimeError) as error:  # a library that is missing, or a build without nvJPEG
        reason = str(error).partition("\n")[0]
        raise UnavailableError(
            f"TorchCodec decodes no JPEG files on {device} here ({reason}); leave decoding on the GPU out"
        ) from error


def is_plain_jpeg(content: bytes) -> bool:
    """Returns whether every decoder makes the same of a file's bytes, by its header and its end.

    Such a file is a whole JPEG, gray or in color, to be shown as it lies, and large enough.
    """
    if not content.startswith(START) or not content.rstrip(b"\0").endswith(END):
        return False
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
            upright = image.getexif().get(ORIENTATION, 1) == 1
            return image.mode in ("L", "RGB") and upright and min(image.size) >= SMALLEST
    except Exception:  # Pillow raises errors of every type on damaged bytes; decode_image names the file
        return False


def encoded_or_pixels(content: bytes, name: str, image_size: tuple[int, int]) -> Tensor:
    """Returns what ``decode_batch`` takes for a file: a plain JPEG's bytes, uint8 (N,), or another file's pixels.

    Raises: InputError if another file is no image.
    """
    if is_plain_jpeg(content):
        return torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return as_tensor(decode_image(content, name), image_size)


def decode_batch(
    images: Sequence[Tensor], names: Sequence[str], image_size: tuple[int, int], device: torch.device
) -> tuple[Tensor, dict[int, InputError]]:
    """Decodes images on ``device``, each of which ``encoded_or_pixels`` made.

    Returns float32 (B, 3, H, W) in [0, 1] on ``device``, without the images that cannot be decoded, and the errors of
    these, by their index in ``images``. ``names``: the names in errors.

    TorchCodec decodes JPEG files on the device, and antialiased bicubic interpolation resizes them there, as no Lanczos
    filter is to be had on a GPU; benchmarks/resize_filter.py measures how scores change. A file that TorchCodec refuses
    is decoded by Pillow, as one that is no JPEG.
    """
    out = torch.empty((len(images), 3, *image_size), device=device)
    faults: dict[int, InputError] = {}
    by_shape: defaultdict[tuple[int, ...], list[tuple[int, Tensor]]] = defaultdict(list)
    encoded = [i for i, image in enumerate(images) if image.ndim == 1]
    for i, pixels in zip(encoded, _decode_jpegs([images[i] for i in encoded], device), strict=True):
        if pixels is not None:
            by_shape[tuple(pixels.shape)].append((i, pixels))
            continue
        try:
            out[i] = as_tensor(decode_image(images[i].numpy().tobytes(), names[i]), image_size)
        except InputError as error:
            faults[i] = error
    for i, image in enumerate(images):
        if image.ndim == 3:
            out[i] = image.to(device, non_blocking=True)
    for some in by_shape.values():
        batch = torch.stack([pixels for _, pixels in some]).float()
        if batch.shape[2:] != image_size:
            batch = interpolate(batch, image_size, mode="bicubic", antialias=True).round().clamp(0, 255)
        out[[i for i, _ in some]] = batch / 255
    return (out[[i for i in range(len(images)) if i not in faults]] if faults else out), faults


def _decode_jpegs(files: list[Tensor], device: torch.device) -> Sequence[Tensor | None]:
    """Returns uint8 (3, H, W) for each file, None for one that is refused: the decoder does not say which one it
    was."""
    try:
        return _decode(files, device) if files else []
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return [None] if len(files) == 1 else [_decode_jpegs([file], device)[0] for file in files]


def _decode(files: list[Tensor], device: torch.device) -> Sequence[Tensor]:
    from torchcodec.decoders import decode_jpeg  # pyright: ignore[reportPrivateImportUsage]

    return cast(list[Tensor], decode_jpeg(files, mode="RGB", device=device))
