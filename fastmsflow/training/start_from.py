"""Models that a new run starts from: the weights of a trained checkpoint, ours or an official one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..compat.convert import OfficialSettings, official_model
from ..errors import InputError
from ..models.msflow import MSFlow
from ..nn.feature_extractor import resolve_name
from ..readable_file import check_file


def model_from_checkpoint(
    checkpoint: Path, options: Mapping[str, Any], chosen: set[str], image_size: tuple[int, int]
) -> MSFlow:
    """Returns the model of ``checkpoint``.

    ``options``: the model's options of `train`, which describe an official checkpoint together with ``image_size``;
    ``chosen``: those that the user gave, which must agree with a checkpoint of ours.

    Raises: InputError if the checkpoint is not there or does not fit, or an option contradicts one of ours.
    """
    if checkpoint.is_dir():
        raise InputError(f"{checkpoint}: a folder; give the checkpoint in it, e.g. best.safetensors of a run")
    check_file(checkpoint, "give one of our checkpoints (.safetensors) or an official one")
    if checkpoint.suffix != ".safetensors":
        if options["standardise"]:
            raise InputError(
                f"{checkpoint}: an official model takes features as they are; leave --standardise out, or train without"
                " --start-from"
            )
        named = {key: options[key] for key in ("extractor", "pool", "extractor_weights")}
        return official_model(checkpoint, OfficialSettings(image_size=image_size, **named))
    model = MSFlow.load(checkpoint)
    if "extractor_weights" in chosen:
        raise InputError(f"{checkpoint}: brings its extractor's weights; leave --extractor-weights out")
    own = {**model_options(model), "image_size": model.image_size}
    wanted = {**options, "extractor": resolve_name(options["extractor"]), "image_size": image_size}
    for key in sorted(chosen & own.keys()):
        if own[key] != wanted[key]:
            raise InputError(
                f"{checkpoint}: its {key.replace('_', ' ')} is {own[key]}, not {wanted[key]}; leave"
                f" --{key.replace('_', '-')} out, or train without --start-from"
            )
    return model


def model_options(model: MSFlow) -> dict[str, Any]:
    """Returns the options of `train` that ``model`` was made with."""
    return {
        "extractor": model.extractor.name,
        "pool": model.pool,
        "standardise": model.standardiser is not None,
        **({"image-size": model.image_size[0]} if len(set(model.image_size)) == 1 else {}),
    }
