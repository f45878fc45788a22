"""What `train` takes to go on from a trained model, and to train parts of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from .options import warnings_in_yellow

if TYPE_CHECKING:
    from ..models.msflow import MSFlow

StartFrom = Annotated[
    Path | None,
    typer.Option(
        help="Go on from the weights of this checkpoint: one of ours (.safetensors), whose extractor, image size, pool"
        " and standardisation are taken as well, or an official one (.pt), which --extractor, --image-size and --pool"
        " describe.",
        metavar="CHECKPOINT",
    ),
]
Freeze = Annotated[
    list[str],
    typer.Option(
        help="Part that is not trained: level0, level1, level2 (a parallel flow), parallel (all of them) or fusion; may"
        " be given again.",
        metavar="PART",
    ),
]
LrOf = Annotated[
    list[str],
    typer.Option(
        help="Learning rate of one of these parts, e.g. fusion=1e-5; may be given again.", metavar="PART=RATE"
    ),
]
Accumulate = Annotated[
    int, typer.Option(help="Batches to a step: as one batch so many times as large, in less memory.")
]
LowMemory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        help="recompute or invertible: activations are computed again in the backward pass instead of kept; invertible"
        " keeps less, and checks its error. Default: all are kept.",
    ),
]
Ema = Annotated[
    float | None,
    typer.Option(
        help="Decay, each step, of a moving average of the weights, e.g. 0.999, that is evaluated and saved in their"
        " place. Default: none."
    ),
]


def rates(given: Sequence[str]) -> dict[str, float]:
    """``PART=RATE`` each -> part: rate. Errors: InputError where one is not that, or a part comes twice."""
    found: dict[str, float] = {}
    for text in given:
        part, _, rate = text.partition("=")
        if part in found:
            raise InputError(f"--lr-of {text}: {part} has the rate {found[part]} already; give one of the two")
        try:
            found[part] = float(rate)
        except ValueError as error:
            raise InputError(f"--lr-of {text}: give PART=RATE, e.g. fusion=1e-5") from error
    return found


def started_model(checkpoint: Path, options: Mapping[str, Any], given: set[str], size: tuple[int, int]) -> "MSFlow":
    """The model of ``checkpoint``. ``options``: of the model, by the parameters' names, of which those in ``given``
    were chosen and not left alone; an official checkpoint is described by all of them and ``size``.

    Errors: InputError where a checkpoint is not there or does not fit, or one of ours is contradicted.
    """
    from ..compat.convert import official_model
    from ..models.msflow import MSFlow
    from ..nn.feature_extractor import resolve_name

    if checkpoint.is_dir():
        raise InputError(f"{checkpoint}: a folder; give the checkpoint in it, e.g. best.safetensors of a run")
    if not checkpoint.is_file():
        raise InputError(f"{checkpoint}: no such file; give one of our checkpoints (.safetensors) or an official one")
    if checkpoint.suffix != ".safetensors":
        if options["standardise"]:
            raise InputError(
                f"{checkpoint}: an official model takes features as they are; leave --standardise out, or train without"
                " --start-from"
            )
        described = {key: options[key] for key in ("extractor", "pool", "extractor_weights")}
        with warnings_in_yellow():
            return official_model(checkpoint, image_size=size, **described)
    model = MSFlow.load(checkpoint)
    if "extractor_weights" in given:
        raise InputError(f"{checkpoint}: brings its extractor's weights; leave --extractor-weights out")
    own = {**described_by(model), "image_size": model.image_size}
    wanted = {**options, "extractor": resolve_name(options["extractor"]), "image_size": size}
    for key in sorted(given & own.keys()):
        if own[key] != wanted[key]:
            raise InputError(
                f"{checkpoint}: its {key.replace('_', ' ')} is {own[key]}, not {wanted[key]}; leave"
                f" --{key.replace('_', '-')} out, or train without --start-from"
            )
    return model


def described_by(model: "MSFlow") -> dict[str, Any]:
    """The options that ``model`` was made with, as `train` names them."""
    return {
        "extractor": model.extractor.name,
        "pool": model.pool,
        "standardise": model.standardiser is not None,
        **({"image-size": model.image_size[0]} if len(set(model.image_size)) == 1 else {}),
    }
