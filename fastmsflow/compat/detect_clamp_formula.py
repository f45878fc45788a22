"""Finds the formula of the soft clamp that an index file was trained with: it makes good images likelier."""

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ..errors import InputError, InputWarning
from ..models.msflow import MultiScaleFlow
from ..nn.coupling_block import CouplingBlock
from ..nn.feature_extractor import FeatureExtractor
from ..nn.feature_pooling import Pool, pool_features
from ..reference.clamp_forms import ClampForm
from ..reference.likelihood import negative_log_likelihood
from .state_dict_keys import Variant

Formula = Literal["0.2", "master"]
Images: TypeAlias = str | Path | Tensor | Iterable[str | Path] | Iterable[Tensor]

CLAMP_FORMS: dict[Formula, ClampForm] = {"0.2": "tanh", "master": "scaled_tanh"}
WRITTEN: dict[Formula, str] = {"0.2": "clamp tanh(r)", "master": "clamp tanh(r / clamp)"}
MOST_IMAGES, BATCH = 32, 4
# The images tell the formulas apart if the mean difference is at least so many of its standard errors.
SURE = 2.0
# The mean square of the latents is 1 where a flow fits. If it is larger than this, neither formula fits the images, say
# since the flow knows its training images by heart and these are others. Then the likelier formula need not be its own.
FITS = 4.0
# If it is smaller than this, the flow is far from the end of its training, and larger log-scales make any image
# likelier: 0.2's are up to clamp times as large, so that it seems the better one whichever was trained with.
TRAINED = 0.5


@dataclass(frozen=True)
class FormulaFit:
    """Tells how well each formula fits good images."""

    nll: dict[Formula, float]
    """The mean over the images, in nats."""
    images: int
    trained_with: Formula | None
    """The formula of the lower mean, None where the images do not tell the two apart."""
    square: float
    """The mean square of the latents under the formula of the lower mean: about 1 where the flow fits the images."""

    @property
    def text(self) -> str:
        """The finding in one line."""
        if self.trained_with is None:
            means = " and ".join(f"{self.nll[name]:.1f} by {WRITTEN[name]}" for name in self.nll)
            count = "1 image" if self.images == 1 else f"{self.images} images"
            ill = f"; neither fits them (mean z^2 {self.square:.1f}), so give images that it was trained on"
            return f"the formulas are not told apart by {count}: mean nll {means}{ill if self.square > FITS else ''}"
        other = _other(self.trained_with)
        doubt = (
            f"; no proof, since mean z^2 is {self.square:.2f}: it has hardly been trained" if self.is_doubtful else ""
        )
        return (
            f"trained with {WRITTEN[self.trained_with]}: mean nll {self.nll[self.trained_with]:.1f} over {self.images}"
            f" images, {self.nll[other]:.1f} by {WRITTEN[other]}{doubt}"
        )

    @property
    def is_doubtful(self) -> bool:
        """Tells whether the finding is 0.2's formula of a flow that has hardly been trained."""
        return self.trained_with == "0.2" and self.square < TRAINED

    def settle(self, variant: Variant) -> tuple[Formula, str]:
        """Returns the formula to take and the line that says why; ``variant``: as asked for."""
        if variant == "auto":
            taken = self.trained_with or "0.2"
            return taken, self.text if self.trained_with else f"{self.text}; {WRITTEN[taken]} is taken"
        advice = f"; variant {variant!r} was asked for: leave it out" if self.contradicts(variant) else ""
        return variant, self.text + advice

    def contradicts(self, variant: Variant) -> bool:
        """Tells whether the images contradict ``variant``: the other formula fits them better."""
        return variant != "auto" and self.trained_with == _other(variant)

    def as_dict(self) -> dict[str, Any]:
        """Returns JSON-able values, with None for a mean that is not finite."""
        nll = {name: value if math.isfinite(value) else None for name, value in self.nll.items()}
        square = self.square if math.isfinite(self.square) else None
        found = {"nll": nll, "images": self.images, "mean_square": square, "trained_with": self.trained_with}
        return {**found, "text": self.text}


@torch.no_grad()
def compare_formulas(flow: MultiScaleFlow, batches: Iterable[Sequence[Tensor]]) -> FormulaFit:
    """Compares the nll of good images, preferably those that the flow was trained on, under both formulas.

    ``batches``: pooled features, (B, C_l, H_l, W_l) per level, on the flow's device. The flow keeps its own formula.
    Raises: InputError if there is no image.
    """
    own = flow.clamp_form
    found: dict[Formula, list[Tensor]] = {name: [] for name in CLAMP_FORMS}
    squares: dict[Formula, list[Tensor]] = {name: [] for name in CLAMP_FORMS}
    try:
        for levels in batches:
            for name, form in CLAMP_FORMS.items():
                use_clamp_form(flow, form)
                maps, log_det = flow.log_likelihood_maps(levels)
                nll = negative_log_likelihood(maps, flow.channels, log_det)
                found[name].append(nll.double().cpu())
                elements = sum(level[0].numel() for level in levels)
                squares[name].append(2 * (nll + log_det).double().cpu() / elements)
    finally:
        use_clamp_form(flow, own)
    if not sum(map(len, found["0.2"])):
        raise InputError("no image to compare the formulas on; give good images that can be read")
    of_images: dict[Formula, Tensor] = {name: torch.cat(values) for name, values in found.items()}
    difference = of_images["0.2"] - of_images["master"]
    mean, images = difference.mean().item(), len(difference)
    # A single image has no standard error: NaN, which tells nothing apart.
    error = difference.std().item() / math.sqrt(images) if images > 1 else math.nan
    better: Formula = "master" if mean > 0 else "0.2"
    square = torch.cat(squares[better]).mean().item()
    sure = mean != 0 and abs(mean) >= SURE * error and square <= FITS
    means: dict[Formula, float] = {name: values.mean().item() for name, values in of_images.items()}
    return FormulaFit(means, images, better if sure else None, square)


def has_one_formula(flow: MultiScaleFlow) -> bool:
    """Tells whether the formula is certain: all but official files with index permutations say it."""
    return flow.official_layout is None or flow.official_layout.dense


def use_clamp_form(flow: MultiScaleFlow, form: ClampForm) -> None:
    """Makes ``flow`` compute this form of the soft clamp."""
    flow.clamp_form = form
    for block in flow.modules():
        if isinstance(block, CouplingBlock):
            block.clamp_form = form


def either_formula(what: str, command: str) -> str:
    """The line for an index file whose formula nobody has named. ``what``: what has the permutations; ``command``: the
    file as `fastmsflow verify` takes it."""
    return (
        f"{what} has index permutations, so either formula may be its own: {WRITTEN['0.2']} is taken; if it comes from"
        " a script that was patched for FrEIA's git master, give variant='master' (or `fastmsflow convert --variant"
        " master`, for a file that all commands take); `fastmsflow"
        f" verify {command} TRAINING_IMAGES` tells which"
    )


def warn_of_either_formula(what: str, command: str) -> None:
    """Warns with that line, on behalf of the caller's caller."""
    warnings.warn(either_formula(what, command), InputWarning, stacklevel=3)


def pooled_batches(
    images: Images,
    flow: MultiScaleFlow,
    *,
    extractor: str,
    weights: str | Path | None,
    size: tuple[int, int],
    pool: Pool,
) -> Iterator[list[Tensor]]:
    """Yields the features that ``flow`` takes, of at most MOST_IMAGES images, on its device.

    The arguments are those of ``load_official``.
    Raises: InputError if an image cannot be read, or a level does not fit the flow.
    """
    device = next(flow.parameters()).device
    listed = [images] if isinstance(images, (str, Path, Tensor)) else list(images)
    tensors = [each[:MOST_IMAGES] for each in listed if isinstance(each, Tensor)]
    paths = [Path(each) for each in listed if not isinstance(each, Tensor)]
    if tensors and paths:
        raise InputError("images holds tensors and files; give either pooled features or files")
    if tensors and not isinstance(images, Tensor):
        for start in range(0, len(tensors[0]), BATCH):
            yield [level[start : start + BATCH].to(device, flow.dtype) for level in tensors]
        return
    # Before weights are downloaded.
    check_extractor(flow, FeatureExtractor(extractor, pretrained=False, image_size=size), "the checkpoint")
    backbone = FeatureExtractor(extractor, weights=weights, image_size=size).to(device)
    for pixels in tensors[0].split(BATCH) if tensors else _read(paths, size):
        yield pool_features(backbone(pixels.to(device)), pool)


def check_extractor(flow: MultiScaleFlow, backbone: FeatureExtractor, source: str | Path) -> None:
    """Raises: InputError if ``backbone`` does not yield the channels that the flow of ``source`` takes."""
    if backbone.channels != flow.channels:
        raise InputError(
            f"{source}: its flow takes channels {flow.channels}, {backbone.name} yields {backbone.channels};"
            " name the extractor it was trained with (--extractor)"
        )


def _read(paths: Sequence[Path], size: tuple[int, int]) -> Iterator[Tensor]:
    """Yields batches (B, 3, H, W) in [0, 1] of the first MOST_IMAGES images of files and folders."""
    # Pillow comes with the train extra, and tensors do without it.
    from ..data.datasets import ImageFileDataset
    from ..data.file_search import files_of
    from ..data.reader_pool import batched, read_images

    files = files_of(paths)[:MOST_IMAGES]
    yield from read_images(ImageFileDataset(files, size), batched(range(len(files)), BATCH))


def _other(formula: Formula) -> Formula:
    return "master" if formula == "0.2" else "0.2"
