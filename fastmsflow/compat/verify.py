"""Loads what `verify` compares: a checkpoint's flow, and features of images or noise."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor

from ..data.file_search import files_of
from ..data.image_batches import BatchReader, file_batches
from ..errors import InputError, first_few
from ..models.msflow import MSFlow, MultiScaleFlow
from ..number_range import COUNT, check_image_size
from .convert import OfficialSettings, official_model, own_flow
from .detect_clamp_formula import (
    BATCH,
    CLAMP_FORMS,
    MOST_IMAGES,
    FormulaFit,
    compare_formulas,
    either_formula,
    has_one_formula,
    use_clamp_form,
)
from .numerical_check import Batches, noise
from .official_checkpoint import read_official

NOISE_SIZE, NOISE_IMAGES = 128, 8


@dataclass(frozen=True, kw_only=True)
class ToVerify:
    """A flow to verify, and the features on which it is verified."""

    flow: MultiScaleFlow
    batches: Batches
    """Features, (B, C_l, H_l, W_l) per level."""
    image_size: tuple[int, int]
    """(H, W) of the score maps."""
    faults: list[str] = field(default_factory=list[str])
    """A line for each image that cannot be read, complete when the batches are through."""
    fit: FormulaFit | None = None
    """The comparison of both formulas on the images, where the file has index permutations."""
    formula_line: str | None = None
    """A line about the formula of such a file."""
    formula_in_doubt: bool = False
    """True where that line is a warning."""


def to_verify(
    checkpoint: Path,
    images: Sequence[Path],
    official: OfficialSettings,
    *,
    max_images: int,
    image_size: tuple[int, int] | None,
) -> ToVerify:
    """Loads the checkpoint, and computes features of images.

    ``images``: files and folders, of which at most ``max_images`` are used; without images, noise is used. For an
    official file with index permutations the formula that fits the first images better is verified, unless ``official``
    names one.

    Raises: InputError if the checkpoint does not fit, or ``image_size`` is not that of a checkpoint of this library.
    """
    COUNT.check("max_images", max_images)
    if image_size is not None:
        image_size = check_image_size(image_size)
    own = checkpoint.suffix == ".safetensors"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not images:
        flow = own_flow(checkpoint) if own else read_official(checkpoint, official.clamp, official.variant)
        flow, size = flow.to(device), image_size or (NOISE_SIZE, NOISE_SIZE)
        told = own or has_one_formula(flow) or official.variant != "auto"
        line = None if told else either_formula(f"{checkpoint}:", str(checkpoint))
        batches = noise(flow, size, NOISE_IMAGES)
        return ToVerify(flow=flow, batches=batches, image_size=size, formula_line=line, formula_in_doubt=True)
    if own:
        model = MSFlow.load(checkpoint)
        if image_size not in (None, model.image_size):
            raise InputError(
                f"{checkpoint} is a model of {'{}x{}'.format(*model.image_size)}; --image-size is for official"
                " checkpoints"
            )
    else:
        # The formula that is compared is told below, and one that is named needs no warning.
        formula = "0.2" if official.variant == "auto" else official.variant
        model = official_model(checkpoint, replace(official, variant=formula, image_size=image_size or (512, 512)))
    files = files_of(images)[:max_images]
    faults: list[str] = []
    batches = _features(model.to(device), files, faults)
    loaded = ToVerify(flow=model.flow, batches=batches, image_size=model.image_size, faults=faults)
    if own or has_one_formula(model.flow):
        return loaded
    # A list, so that each image goes through the extractor once.
    first = list(islice(batches, MOST_IMAGES // BATCH))
    if not first:
        raise InputError(f"no image to compare the formulas on: {first_few(faults)}")
    fit = compare_formulas(model.flow, first)
    formula, line = fit.settle(official.variant)
    use_clamp_form(model.flow, CLAMP_FORMS[formula])
    doubt = fit.contradicts(official.variant) or (official.variant == "auto" and fit.trained_with is None)
    line = f"{checkpoint}: {line}"
    return replace(loaded, batches=chain(first, batches), fit=fit, formula_line=line, formula_in_doubt=doubt)


@torch.no_grad()
def _features(model: MSFlow, files: Sequence[Path], faults: list[str]) -> Iterator[list[Tensor]]:
    device = next(model.parameters()).device
    reader = BatchReader(model.image_size)
    for batch in file_batches([str(file) for file in files], BATCH):
        read = reader[batch]
        faults += [item.fault for item in read.items if item.fault is not None]
        if read.pixels is not None:
            yield model.features(read.pixels.to(device, memory_format=torch.channels_last))
