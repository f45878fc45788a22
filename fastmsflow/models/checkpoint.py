"""The checkpoint format: one safetensors file whose header carries the configuration as JSON.

One file keeps weights and configuration together; nothing in a safetensors file can run.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import InputError, UnavailableError
from ..files import written_aside

FORMAT = "fastmsflow-1"


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

    Raises: InputError if the file is missing, damaged or of another kind.
    """
    return _read(path, with_tensors=True)


def read_config(path: str | Path) -> dict[str, Any]:
    """Reads the configuration alone, which takes no time.

    Raises: InputError if the file is missing, damaged or of another kind.
    """
    return _read(path, with_tensors=False)[1]


def _read(path: str | Path, with_tensors: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if Path(path).is_dir():
        raise InputError(f"{path}: a folder; give the checkpoint in it, e.g. best.safetensors of a run")
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; give the path of a fastmsflow checkpoint (.safetensors)")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in (file.keys() if with_tensors else ())}
    except SafetensorError as error:
        raise InputError(
            f"{path}: not a whole safetensors file ({error}); an official MSFlow file needs `fastmsflow convert` first"
        ) from error
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path}: a safetensors file, but not a fastmsflow checkpoint (no '{FORMAT}' in its header)")
    return tensors, json.loads(metadata["config"])


@contextmanager
def built_from(path: str | Path) -> Iterator[None]:
    """Names the checkpoint ``path`` in errors of the block, which builds a model from the checkpoint's configuration.

    Raises: InputError if the configuration is damaged; UnavailableError, with the remedy, if the checkpoint lacks its
    extractor's weights and they cannot be downloaded.
    """
    try:
        yield
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: its configuration is damaged ({error!r}); write the checkpoint again") from error
    except UnavailableError as error:
        # The remedies behind the semicolon are for those who make a model.
        fact = str(error).partition("; ")[0]
        raise UnavailableError(
            f"{path}: does not hold its extractor's weights ({fact}); convert the official file again with"
            " --extractor-weights FILE"
        ) from error
