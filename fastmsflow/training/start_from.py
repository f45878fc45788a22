"""Models that a new run starts from: the weights of a trained checkpoint, ours or an official one."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..compat.convert import OfficialSettings, official_model
from ..errors import InputError
from ..models.msflow import MSFlow
from ..nn.feature_extractor import resolve_name
from ..number_range import image_size_option
from ..readable_file import check_file
from ..tiling import Tiling

TILE_OPTIONS = tuple(field.name for field in fields(Tiling))
LEVEL_OPTIONS = ("layers", "level_strides")


def model_from_checkpoint(
    checkpoint: Path, options: Mapping[str, Any], chosen: set[str], image_size: tuple[int, int]
) -> MSFlow:
    """Returns the model of ``checkpoint``.

    ``options``: the model's options of `train`, which describe an official checkpoint together with ``image_size``;
    ``chosen``: those that the user gave, which must agree with a checkpoint of ours. Those of tiles are in ``options``
    only if they were given.

    Raises: InputError if the checkpoint is not there or does not fit, or an option contradicts one of ours.
    """
    if checkpoint.is_dir():
        raise InputError(f"{checkpoint}: a folder; give the checkpoint in it, e.g. best.safetensors of a run")
    check_file(checkpoint, "give one of our checkpoints (.safetensors) or an official one")
    tiles = {name: options[name] for name in TILE_OPTIONS if name in options}
    if checkpoint.suffix != ".safetensors":
        if options["standardise"]:
            raise InputError(
                f"{checkpoint}: an official model takes features as they are; leave --standardise out, or train without"
                " --start-from"
            )
        for key in LEVEL_OPTIONS:
            if key in options:
                raise InputError(
                    f"{checkpoint}: an official model has the published layers; leave {_as_options([key])} out"
                )
        named = {key: options[key] for key in ("extractor", "pool", "extractor_weights")}
        model = official_model(checkpoint, OfficialSettings(image_size=image_size, **named))
        model.tiling = tiling_of(tiles)
        return model
    model = MSFlow.load(checkpoint)
    if tiles and model.tiling is None:
        raise InputError(
            f"{checkpoint}: takes whole images; leave {_as_options(tiles)} out, or train without --start-from"
        )
    if "image_size" in chosen and model.tiling is not None:
        raise InputError(
            f"{checkpoint}: takes tiles of {model.tiling.tile}; leave --image-size out, or train without --start-from"
        )
    if "extractor_weights" in chosen:
        raise InputError(f"{checkpoint}: brings its extractor's weights; leave --extractor-weights out")
    own = {
        **model_options(model),
        "image_size": image_size_option(model.image_size),
        **(model.tiling.config if model.tiling else {}),
        "layers": model.extractor.outputs,
        "level_strides": model.extractor.level_strides or (1, 1, 1),
    }
    wanted = {
        **{key: own[key] for key in LEVEL_OPTIONS},
        **options,
        "extractor": resolve_name(options["extractor"]),
        "image_size": image_size_option(image_size),
    }
    if "layers" in options:
        wanted["layers"] = model.extractor.resolve_layers(options["layers"])
    for key in sorted((chosen - set(TILE_OPTIONS)) & own.keys() | tiles.keys()):
        if own[key] != wanted[key]:
            is_or_are = "are" if key in LEVEL_OPTIONS else "is"
            raise InputError(
                f"{checkpoint}: its {key.replace('_', ' ')} {is_or_are} {_as_value(own[key])}, not"
                f" {_as_value(wanted[key])}; leave {_as_options([key])} out, or train without --start-from"
            )
    return model


def model_options(model: MSFlow) -> dict[str, Any]:
    """Returns the options of `train` that ``model`` was made with."""
    tiling, size = model.tiling, model.image_size
    side = {"image-size": image_size_option(size)}
    return {
        "extractor": model.extractor.name,
        "pool": model.pool,
        "standardise": model.standardiser is not None,
        **{name.replace("_", "-"): _as_value(values) for name, values in model.extractor.level_config.items()},
        **({name.replace("_", "-"): value for name, value in tiling.config.items()} if tiling else side),
    }


def tiling_of(tiles: Mapping[str, Any]) -> Tiling | None:
    """Returns the tiling of ``tiles``, options of `train`; None if there are none.

    Raises: InputError if the side of a tile is missing, or a value is not one of its option.
    """
    if tiles and "tile" not in tiles:
        raise InputError(f"{_as_options(tiles)}: this is of tiles; give --tile too")
    return Tiling(**tiles) if tiles else None


def _as_options(names: Iterable[str]) -> str:
    return " and ".join(f"--{name.replace('_', '-')}" for name in names)


def _as_value(value: Any) -> Any:
    """Returns the value of an option as the command line has it."""
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value
