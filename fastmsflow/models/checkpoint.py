"""Own checkpoint format: one safetensors file whose header carries the configuration as JSON.

One file, so that weights and configuration cannot part; safetensors, so that nothing in it can run.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError, UnavailableError
from ..files import written_aside

FORMAT = "fastmsflow-1"


class OfficialLayout(NamedTuple):
    """Keeps how an official file lays out permutations, so that a flow that was read from it is written like that."""

    order: tuple[int, ...]
    """The levels in the order in which their permutations stand in the fusion flow."""
    dense: bool
    """True where the blocks' permutations are matrices, as FrEIA 0.2 has them; False for its git master's indices."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "OfficialLayout | None":
        """Reads what a checkpoint's ``config`` has of it: None for a model that was not read from an official file.

        Errors: TypeError or KeyError where it is damaged.
        """
        kept = config.get("official_layout")
        if kept is None:
            return None
        order, dense = kept["order"], kept["dense"]
        if sorted(order) != list(range(len(config["flow"]["channels"]))) or not isinstance(dense, bool):
            raise TypeError(f"official_layout is {kept}")
        return cls(tuple(order), dense)


def write_checkpoint(path: str | Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Writes ``tensors`` and the JSON-able ``config``; an earlier file stays until the new one is whole."""
    contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    with written_aside(path) as aside:
        save_file(contiguous, aside, metadata={"format": FORMAT, "config": json.dumps(dict(config))})


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """-> (tensors on the CPU, config). Errors: InputError where the file is missing, damaged or of another kind."""
    return _read(path, whole=True)


def read_config(path: str | Path) -> dict[str, Any]:
    """The configuration alone, which takes no time. Errors: as ``read_checkpoint``'s."""
    return _read(path, whole=False)[1]


def _read(path: str | Path, whole: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if Path(path).is_dir():
        raise InputError(f"{path}: a folder; give the checkpoint in it, e.g. best.safetensors of a run")
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; give the path of a fastmsflow checkpoint (.safetensors)")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in (file.keys() if whole else ())}
    except SafetensorError as error:
        raise InputError(
            f"{path}: not a whole safetensors file ({error}); an official MSFlow file needs `fastmsflow convert` first"
        ) from error
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path}: a safetensors file, but not a fastmsflow checkpoint (no '{FORMAT}' in its header)")
    return tensors, json.loads(metadata["config"])


@contextmanager
def built_from(path: str | Path) -> Iterator[None]:
    """Names the checkpoint ``path`` in errors of the block, which builds a model as its configuration describes it.

    Errors: InputError where its configuration is damaged; UnavailableError where it lacks its extractor's weights and
    they cannot be downloaded, naming what brings them in.
    """
    try:
        yield
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: its configuration is damaged ({error!r}); write the checkpoint again") from error
    except UnavailableError as error:
        # Behind the semicolon are the remedies of those who make a model.
        fact = str(error).partition("; ")[0]
        raise UnavailableError(
            f"{path}: does not hold its extractor's weights ({fact}); convert the official file again with"
            " --extractor-weights FILE"
        ) from error
