"""Converts official checkpoints into this library's format and back."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..models.checkpoint import (
    built_from,
    read_config,
    read_header,
    read_tensors,
    refuse_other_tensors,
    write_checkpoint,
)
from ..models.msflow import MSFlow, MultiScaleFlow
from ..nn.feature_pooling import check_pool
from .detect_clamp_formula import check_extractor
from .official_checkpoint import load_official, read_pickle, save_official
from .state_dict_keys import Variant


@dataclass(frozen=True, kw_only=True)
class OfficialSettings:
    """The settings of a model that its official file does not hold."""

    extractor: str = "wide_resnet50_2.tv_in1k"
    extractor_weights: str | Path | None = None
    """See fastmsflow.nn.feature_extractor.FeatureExtractor."""
    image_size: tuple[int, int] = (512, 512)
    pool: str = "avg"
    clamp: float = 1.9
    variant: Variant = "auto"
    """See ``load_official``."""


def official_to_own(source: str | Path, target: str | Path, settings: OfficialSettings) -> None:
    """Writes the flow of an official checkpoint as ``target``, which ``MSFlow.load`` reads.

    An official file has no extractor weights: ``target`` gets those that ``settings`` name, or none, and then
    ``MSFlow.load`` takes timm's.

    Raises: InputError if the file does not fit, or the extractor does not yield the flow's channels.
    """
    model = official_model(source, settings, pretrained=False)
    epoch = read_pickle(source).get("epoch")
    notes = {"converted_from": Path(source).name, "meta_epoch": epoch if isinstance(epoch, int) else 0}
    stored = "flow." if settings.extractor_weights is None else ""
    tensors = {key: value for key, value in model.state_dict().items() if key.startswith(stored)}
    write_checkpoint(target, tensors, {**model.config, "notes": notes})


def official_model(source: str | Path, settings: OfficialSettings, pretrained: bool = True) -> MSFlow:
    """Loads the model of an official checkpoint, in eval mode on the CPU.

    The extractor's weights are those that ``settings`` name, or timm's if ``pretrained``, or random.
    Raises: the errors of ``official_to_own``; UnavailableError if weights cannot be downloaded.
    """
    flow = load_official(source, settings.clamp, settings.variant)
    model = MSFlow(
        settings.extractor,
        pretrained,
        settings.image_size,
        check_pool(settings.pool),
        blocks=(1, 1, 1),
        extractor_weights=settings.extractor_weights,
    )
    check_extractor(flow, model.extractor, source)
    model.flow = flow
    return model.eval()


def own_flow(source: str | Path) -> MultiScaleFlow:
    """Loads the flow of a checkpoint of this library, in eval mode, without its extractor.

    Raises: InputError if the checkpoint does not fit its configuration.
    """
    held, config = read_header(source)
    with built_from(source):
        build = partial(MultiScaleFlow.from_config, config)
        refuse_other_tensors("the flow its configuration describes", source, build, _of_flow(held))
        flow = build()
    flow.load_state_dict(_of_flow(read_tensors(source)))
    return flow.eval()


def own_to_official(source: str | Path, target: str | Path) -> None:
    """Writes the flow of a checkpoint of this library in the official format, without the extractor.

    Raises: InputError if the model standardizes its features, which the official format cannot express.
    """
    config = read_config(source)
    refuse_standardised(source, config)
    epoch = config.get("notes", {}).get("meta_epoch")
    save_official(own_flow(source), target, epoch=epoch if isinstance(epoch, int) else 0)


def _of_flow(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("flow."): value for key, value in tensors.items() if key.startswith("flow.")}


def refuse_standardised(source: str | Path, config: Mapping[str, Any]) -> None:
    """Raises: InputError if the model of ``source`` standardizes its features, according to its ``config``."""
    if config["standardise"]:
        raise InputError(
            f"{source}: its features are standardised, which the official format cannot hold;"
            " train without --standardise"
        )
