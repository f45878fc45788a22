"""Models that take tiles: with the size of a tile in place of the one that they were trained on."""

import warnings
from typing import NamedTuple

from ..errors import InputError, InputWarning
from ..models.msflow import MSFlow
from ..tiling import Tiling


def tiled_model(model: MSFlow, tiling: Tiling) -> MSFlow:
    """Returns ``model``, or if it takes images of another size than a tile's, a copy that takes these.

    Raises: InputError if the backbone takes no images of this size, or ``for_inference`` made the model.
    """
    size = (tiling.tile, tiling.tile)
    if model.image_size == size:
        return model
    if model.made_for_inference:
        raise InputError(
            f"for_inference made this model for images of {model.image_size}, not for tiles of {tiling.tile}; give the"
            " one that it was made from"
        )
    parameter = next(model.parameters())
    config = {**model.config, "image_size": list(size)}
    copy = MSFlow.from_config(config, pretrained=False, backend=model.flow.backend)
    # A transformer's position embeddings are those of an image size.
    copy.extractor.load_weights_of(model.extractor)
    own = {key: value for key, value in copy.state_dict().items() if key.startswith("extractor.")}
    copy.load_state_dict({**model.state_dict(), **own})
    return copy.to(parameter.device, parameter.dtype).train(model.training)


class TileOptions(NamedTuple):
    """The tiling that a user asks for; None: as the model's is or, if it has none, as Tiling's default."""

    tile: int | None = None
    overlap: float | None = None
    scale: float | None = None
    top_share: float | None = None

    @property
    def command(self) -> str:
        """The options that are given, as a command has them, each after a space."""
        given = ((name, value) for name, value in self._asdict().items() if value is not None)
        return "".join(f" --{name.replace('_', '-')} {value:g}" for name, value in given)


AS_TRAINED = TileOptions()


def retile(model: MSFlow, options: TileOptions) -> MSFlow:
    """Returns ``model`` with another tiling, or itself if ``options`` ask for none.

    A copy is returned if its tiles are of another size than the model's images; else the model itself is changed.

    Thresholds hold for the tiling that they were calibrated with, so the model has none then; an InputWarning says so.

    Raises: InputError if the model takes whole images and something is given without ``tile``; the errors of Tiling and
    of ``tiled_model``.
    """
    given = {name: value for name, value in options._asdict().items() if value is not None}
    if given and options.tile is None and model.tiling is None:
        raise InputError(f"{' and '.join(given)}: this is of tiles, and the model takes whole images; give tile too")
    tiling = Tiling(**{**(model.tiling.config if model.tiling else {}), **given}) if given else model.tiling
    if tiling is None or tiling == model.tiling:
        return model
    before = model.tiling or "images resized to {}x{}".format(*model.image_size)
    changed = tiled_model(model, tiling)
    if model.calibration is not None:
        warnings.warn(
            f"the model's thresholds are of {before}, not of {tiling}, and are not used; `fastmsflow calibrate` with"
            " the same options sets others",
            InputWarning,
            stacklevel=2,
        )
    changed.tiling, changed.calibration = tiling, None
    return changed
