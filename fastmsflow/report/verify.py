"""What `verify` compares on: a checkpoint's flow, and features of images or noise."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..compat.certificate import Batches, noise
from ..compat.convert import official_to_own, own_flow
from ..compat.official import load_official
from ..data.images import load_image
from ..data.listing import list_images
from ..errors import InputError
from ..model import MSFlow, MultiScaleFlow

NOISE_SIZE, NOISE_IMAGES, BATCH = 128, 8, 4


def to_verify(
    checkpoint: Path, images: Sequence[Path], most: int, image_size: int | None, **official: Any
) -> tuple[MultiScaleFlow, Batches, tuple[int, int], list[str]]:
    """-> (flow, features in batches, (H, W) of the score maps, faults: one line for each image that cannot be read,
    complete when the batches are through).

    ``images``: files and folders, of which ``most`` are taken; noise if none. ``official``: what an official file does
    not hold, see fastmsflow.compat.convert.official_to_own. Errors: InputError where the checkpoint does not fit.
    """
    own = checkpoint.suffix == ".safetensors"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    faults: list[str] = []
    if not images:
        flow = own_flow(checkpoint) if own else load_official(checkpoint, official["clamp"], official["variant"])
        side = image_size or NOISE_SIZE
        flow = flow.to(device)
        return flow, noise(flow, side, NOISE_IMAGES), (side, side), faults
    model = (MSFlow.load(checkpoint) if own else _official_model(checkpoint, image_size or 512, official)).to(device)
    if own and image_size is not None and model.image_size != (image_size, image_size):
        raise InputError(f"{checkpoint} is a model of {model.image_size}; --image-size is for official checkpoints")
    files = [file for path in images for file in (list_images(path) if path.is_dir() else [path])][:most]
    return model.flow, _features(model, files, faults), model.image_size, faults


def _official_model(checkpoint: Path, side: int, official: dict[str, Any]) -> MSFlow:
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "model.safetensors"
        official_to_own(checkpoint, whole, image_size=(side, side), **official)
        return MSFlow.load(whole)


@torch.no_grad()
def _features(model: MSFlow, files: Sequence[Path], faults: list[str]) -> Iterator[list[Tensor]]:
    device = next(model.parameters()).device
    for start in range(0, len(files), BATCH):
        pixels = []
        for file in files[start : start + BATCH]:
            try:
                pixels.append(load_image(file, model.image_size))
            except InputError as error:
                faults.append(str(error))
        if pixels:
            yield model.features(torch.stack(pixels).to(device, memory_format=torch.channels_last))
