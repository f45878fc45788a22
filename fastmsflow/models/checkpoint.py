"""The checkpoint format: one safetensors file whose header carries the configuration as JSON.

One file keeps weights and configuration together; nothing in a safetensors file can run.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor, nn

from ..errors import InputError, UnavailableError
from ..files import written_aside
from ..nn.feature_pooling import Pool
from ..number_range import CLAMP, SIDE
from ..readable_file import check_file
from ..reference.clamp_forms import ClampForm
from ..schema import Within, read_json
from ..state_dicts import number_of_blocks, refuse_misfit, refuse_other_permutations
from ..tiling import Position

FORMAT = "fastmsflow-1"
AGAIN = "write the checkpoint again"

Levels = Within(1, 16)
Side = Annotated[int, Within(SIDE.low, SIDE.high)]
Channels = Annotated[int, Within(1, 2**20)]


class FlowDescription(TypedDict):
    """The arguments of a MultiScaleFlow, as ``MultiScaleFlow.config`` gives them."""

    channels: Annotated[list[Channels], Levels]
    condition_channels: Annotated[list[Channels], Levels]
    blocks: Annotated[list[Annotated[int, Within(1)]], Levels]
    clamp: Annotated[float, Within(CLAMP.low, CLAMP.high)]
    clamp_form: ClampForm


class LayoutDescription(TypedDict):
    """An OfficialLayout."""

    order: Annotated[list[int], Levels]
    dense: bool


class PixelsDescription(TypedDict):
    """A PixelThresholds, as its ``as_dict`` gives it."""

    rates: Annotated[list[float], Within(1)]
    values: Annotated[list[float], Within(1)]
    low: Annotated[list[float], Within(1)]
    high: Annotated[list[float], Within(1)]


class _OptionalInCalibration(TypedDict, total=False):
    # Earlier versions kept neither.
    pixels: PixelsDescription | None
    false_pixels: float


class CalibrationDescription(_OptionalInCalibration):
    """A Calibration, as its ``as_dict`` gives it."""

    scores: Annotated[list[float], Within(1)]
    peaks: Annotated[list[float], Within(1)]
    typical: float
    false_alarms: float


class TilingDescription(TypedDict):
    """A Tiling, as its ``config`` gives it."""

    tile: Side
    overlap: float
    scale: float
    position: Position
    top_share: float


class _Optional(TypedDict, total=False):
    tiling: TilingDescription | None
    official_layout: LayoutDescription | None
    calibration: CalibrationDescription | None
    notes: dict[str, Any]
    layers: Annotated[list[Annotated[int, Within(0, 1000)]], Within(3, 3)] | None
    level_strides: Annotated[list[Channels], Within(3, 3)] | None


class ModelDescription(_Optional):
    """The configuration of a checkpoint, as ``MSFlow.config`` gives it, and notes."""

    extractor: Annotated[str, Within(1, 200)]
    image_size: Annotated[list[Side], Within(2, 2)]
    pool: Pool
    standardise: bool
    flow: FlowDescription


class OfficialLayout(NamedTuple):
    """Stores how an official file lays out permutations, so that a flow read from it is written the same way."""

    order: tuple[int, ...]
    """The levels in the order in which their permutations stand in the fusion flow."""
    dense: bool
    """True if the blocks' permutations are matrices, as FrEIA 0.2 has them; False for its git master's indices."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "OfficialLayout | None":
        """Reads the layout from a checkpoint's ``config``: None for a model that was not read from an official file.

        Raises: TypeError or KeyError if the layout is damaged.
        """
        layout = config.get("official_layout")
        if layout is None:
            return None
        order, dense = layout["order"], layout["dense"]
        if sorted(order) != list(range(len(config["flow"]["channels"]))) or not isinstance(dense, bool):
            raise TypeError(f"official_layout is {layout}")
        return cls(tuple(order), dense)


def write_checkpoint(path: str | Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Writes ``tensors`` and ``config``, fit for JSON; an earlier file stays until the new one is complete.

    Raises: InputError if the file cannot be written.
    """
    contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    content = save(contiguous, metadata={"format": FORMAT, "config": json.dumps(dict(config))})
    with written_aside(path) as aside:
        aside.write_bytes(content)


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads tensors, onto the CPU, and configuration.

    Raises: InputError if the file is missing, damaged or of another kind, or changes while it is read.
    """
    config = read_config(path)
    return read_tensors(path), config


def read_config(path: str | Path) -> dict[str, Any]:
    """Reads the configuration alone, which takes no time.

    Raises: InputError if the file is missing, damaged or of another kind.
    """
    return read_header(path)[1]


def read_header(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads names, shapes and dtypes of the tensors, as tensors without values (on "meta"), and the configuration.

    Raises: InputError if the file is missing, damaged or of another kind, or has other blocks than its configuration.
    """
    if Path(path).is_dir():
        raise InputError(f"{path}: a folder; give the checkpoint in it, e.g. best.safetensors of a run")
    check_file(path, "give the path of a fastmsflow checkpoint (.safetensors)")
    try:
        # Nothing but the header is read: safetensors finds that the tensors fill the file, and not more than it.
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - no mapping
            held = {key: _outline(part) for key, part in slices.items()}
    except (SafetensorError, RuntimeError) as error:
        raise InputError(
            f"{path}: not a whole safetensors file ({error}); an official MSFlow file needs `fastmsflow convert` first"
        ) from error
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path}: a safetensors file, but not a fastmsflow checkpoint (no '{FORMAT}' in its header)")
    damaged = f"{path}: its configuration is damaged"
    config = read_json(metadata.get("config", ""), ModelDescription, damaged, AGAIN)
    # This comes before anything is built: a number that nothing in the file bears out would fill the memory.
    for level, blocks in enumerate(config["flow"]["blocks"]):
        found = number_of_blocks(held, f"flow.parallel_flows.{level}.blocks.")
        if found != blocks:
            raise InputError(f"{damaged} (flow.blocks[{level}] is {blocks}, the file holds {found}); {AGAIN}")
    tiling, image_size = config.get("tiling"), config["image_size"]
    if tiling is not None and image_size != [tiling["tile"]] * 2:
        raise InputError(f"{damaged} (tiling.tile is {tiling['tile']}, image_size {image_size}); {AGAIN}")
    return held, dict(config)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Reads the tensors of a checkpoint whose header has been checked, onto the CPU.

    The file is read whole, not mapped: a process that had mapped a file which is cut short would be killed (SIGBUS).
    Raises: InputError if the file changes while it is read, or a permutation is none.
    """
    try:
        with Path(path).open("rb") as file:
            before = os.fstat(file.fileno())
            content = file.read(before.st_size)
            after = os.fstat(file.fileno())
        tensors = load(content)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read ({error}); copy it again") from error
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns) or len(content) != before.st_size:
        raise InputError(
            f"{path}: changed while it was read; write a new checkpoint under another name, then rename it"
        )
    refuse_other_permutations(path, tensors)
    return tensors


def refuse_other_tensors(
    what: str, path: str | Path, build: Callable[[], nn.Module], held: Mapping[str, Tensor], *, without: str = "\0"
) -> None:
    """Checks that ``held`` has the keys and shapes of the module that ``build`` makes, before it takes any memory.

    ``what``: see ``refuse_misfit``; ``without``: the beginning of keys that are not asked for.
    Raises: InputError, naming the keys, if it has not; the errors of ``build``.
    """
    with torch.device("meta"):
        expected = build().state_dict()
    refuse_misfit(what, path, {key: t for key, t in expected.items() if not key.startswith(without)}, held)


def _outline(part: Any) -> Tensor:
    """Returns a tensor without values of the shape and kind of numbers of a slice of a safetensors file."""
    kind = part.get_dtype()
    dtype = torch.bool if kind == "BOOL" else torch.float32 if "F" in kind else torch.int64
    return torch.empty(part.get_shape(), dtype=dtype, device="meta")


@contextmanager
def built_from(path: str | Path) -> Iterator[None]:
    """Names the checkpoint ``path`` in errors of the block, which builds a model from the checkpoint's configuration.

    Raises: InputError if the configuration is damaged; UnavailableError, with the remedy, if the checkpoint lacks its
    extractor's weights and they cannot be downloaded.
    """
    try:
        yield
    except InputError as error:
        raise InputError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: its configuration is damaged ({error!r}); {AGAIN}") from error
    except UnavailableError as error:
        # The remedies behind the semicolon are for those who make a model.
        fact = str(error).partition("; ")[0]
        raise UnavailableError(
            f"{path}: does not hold its extractor's weights ({fact}); convert the official file again with"
            " --extractor-weights FILE"
        ) from error
