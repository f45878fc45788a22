"""Launch configurations: the tile that a kernel takes on a chip, and whether its own convolution or the vendor's runs.

The user's own table lies over the committed one. ``fastmsflow benchmark --tune`` writes it: a JSON file at the path in
FASTMSFLOW_TABLE, or fastmsflow/table.json in the user's folder of configurations. It is read once, at the import.
"""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from .launch import INTERPRETED, ProductTile, Tile

# A kernel's tile on any chip, then on chips known to want another. The interpreter pays for each program.
TILES: dict[str, dict[str, Tile]] = {
    "coupling": {"any": Tile(16, 256), "interpreter": Tile(64, 128)},
    # Five sums a channel stay in registers: larger tiles spill.
    "coupling_backward": {"any": Tile(4, 256), "interpreter": Tile(64, 128)},
    "layer_norm": {"any": Tile(16, 256), "interpreter": Tile(64, 256)},
    "layer_norm_backward": {"any": Tile(8, 256), "interpreter": Tile(16, 256)},
    "pool": {"any": Tile(16, 128), "interpreter": Tile(64, 256)},
    "upsample": {"any": Tile(16, 128, warps=8), "interpreter": Tile(64, 256)},
    "likelihood": {"any": Tile(16, 128), "interpreter": Tile(64, 256)},
    "reflection_pad": {"any": Tile(16, 128), "interpreter": Tile(64, 256)},
    "score_map": {"any": Tile(1024, 1), "interpreter": Tile(16384, 1)},
    "image_score": {"any": Tile(1024, 1), "interpreter": Tile(16384, 1)},
}

_NARROW = ProductTile(32, 16, 32, warps=8)
PRODUCT_TILES: dict[str, dict[str, ProductTile]] = {
    "conv3x3": {"any": ProductTile(128, 128, 32, warps=8), "interpreter": ProductTile(256, 128, 128)},
    "conv3x3_layer_norm": {
        "any": ProductTile(64, 16, 32, warps=8),
        "sm_80": _NARROW,
        "sm_86": _NARROW,
        "gfx942": ProductTile(64, 16, 32, warps=8, stages=2),
        "interpreter": ProductTile(256, 16, 128),
    },
    # A tile of 128 by 128 spills on some chips where operands are float32.
    "conv3x3_coupling": {"any": ProductTile(64, 128, 32, warps=8), "interpreter": ProductTile(256, 128, 128)},
    "conv3x3_weight": {"any": ProductTile(128, 128, 32, warps=8), "interpreter": ProductTile(128, 128, 256)},
}
# No matrix instruction multiplies float32 exactly; where a thread would hold more than its registers, smaller tiles.
EXACT_TILES: dict[str, dict[str, ProductTile]] = {
    "conv3x3_layer_norm": {"sm_90": _NARROW, "sm_100": _NARROW},
    "conv3x3_weight": {"sm_80": ProductTile(64, 64, 32, warps=8)},
}
# Tiles that are timed beside a convolution's own on a chip's first visit (benchmarks/test_speed_kernels.py): of those
# tried for sm_90 they compile best, without spills but where noted: most tensor-core work for each other instruction.
PRODUCT_CANDIDATES: dict[str, tuple[ProductTile, ...]] = {
    "conv3x3": (ProductTile(128, 256, 64, warps=8), ProductTile(128, 128, 64, warps=8)),
    # With 4 warps 320 outputs spill; 192 do not.
    "conv3x3_layer_norm": (ProductTile(64, 16, 64, warps=8), ProductTile(64, 16, 64, warps=4)),
    "conv3x3_coupling": (ProductTile(128, 128, 64, warps=8), ProductTile(64, 128, 64, warps=8)),
    "conv3x3_weight": (ProductTile(128, 128, 64, warps=8), ProductTile(128, 256, 64, warps=8)),
}
# More tiles that `benchmark --tune` times: smaller ones, and deeper pipelines.
_PRODUCTS = (
    ProductTile(64, 64, 32),
    ProductTile(128, 64, 32, stages=4),
    ProductTile(64, 128, 32, stages=4),
    ProductTile(128, 128, 32, warps=8, stages=4),
)
_WIDE_PRODUCTS = (ProductTile(32, 16, 32), _NARROW, ProductTile(64, 16, 32, warps=8, stages=4))
_ROWS = tuple(Tile(pixels, 256, warps) for pixels in (4, 8, 16) for warps in (2, 4, 8))
_BLOCKS = tuple(Tile(pixels, 128, warps) for pixels in (8, 16, 32) for warps in (4, 8))
_FLAT = tuple(Tile(pixels, 1, warps) for pixels in (512, 1024, 2048) for warps in (4, 8))
TUNING_CANDIDATES: dict[str, tuple[Tile, ...] | tuple[ProductTile, ...]] = {
    **dict.fromkeys(("coupling", "coupling_backward", "layer_norm", "layer_norm_backward"), _ROWS),
    **dict.fromkeys(("pool", "upsample", "likelihood", "reflection_pad"), _BLOCKS),
    **dict.fromkeys(("score_map", "image_score"), _FLAT),
    **{
        kernel: (*tiles, *(_WIDE_PRODUCTS if kernel == "conv3x3_layer_norm" else _PRODUCTS))
        for kernel, tiles in PRODUCT_CANDIDATES.items()
    },
}
# Chips that share another's tiles: the same registers, shared memory and matrix instructions.
ALIKE = {"sm_87": "sm_80", "sm_89": "sm_86", "sm_120": "sm_86", "sm_121": "sm_86", "sm_103": "sm_100"}

# For a chip and a convolution, the shapes (pixels of the batch, outputs) at which it was timed, and if the kernels'
# own was faster than the vendor's with the other kernels around it. None has been timed: the vendor's always runs.
CONVOLUTIONS: dict[str, dict[str, list[tuple[int, int, bool]]]] = {}
KINDS = ("conv3x3", "conv3x3_layer_norm", "conv3x3_coupling", "conv3x3_input_gradient", "conv3x3_weight_gradient")

# Bounds on the user's table: its size in bytes, and a tile's sides.
MAX_BYTES, LARGEST = 2**24, 2**16

_chips: dict[torch.device, str] = {}


def tile(kernel: str, device: torch.device) -> Tile:
    """Returns the launch configuration of ``kernel`` on ``device``'s chip."""
    by_chip = TILES[kernel]
    return by_chip.get(chip(device), by_chip["any"])


def product_tile(kernel: str, device: torch.device, exact: bool = False) -> ProductTile:
    """Returns the launch configuration of ``kernel``, a matrix product, on ``device``'s chip.

    ``exact``: whether the operands are float32 and not rounded to TF32.
    """
    name, by_chip = chip(device), PRODUCT_TILES[kernel]
    smaller = EXACT_TILES.get(kernel, {}).get(name) if exact else None
    return smaller or by_chip.get(name, by_chip["any"])


@contextmanager
def force_tile(kernel: str, size: ProductTile, device: torch.device) -> Iterator[None]:
    """Has ``kernel`` take ``size`` on ``device``'s chip in the block, exact products too."""
    name = chip(device)
    before = [(table, table.get(kernel, {}).get(name)) for table in (PRODUCT_TILES, EXACT_TILES)]
    for table, _ in before:
        table.setdefault(kernel, {})[name] = size
    try:
        yield
    finally:
        for table, old in before:
            if old is None:
                del table[kernel][name]
            else:
                table[kernel][name] = old


def own_convolution_is_faster(kind: str, pixels: int, outputs: int, device: torch.device) -> bool:
    """Tells whether the kernels' own convolution beat the vendor's at the nearest shape timed on ``device``'s chip.

    ``kind``: one of KINDS. ``pixels``: those of the whole batch.
    """
    name = chip(device)
    if name == "interpreter":  # the tests need the kernels' own
        return True
    timed = CONVOLUTIONS.get(name, {}).get(kind, [])
    distances = [abs(math.log(pixels / p)) + abs(math.log(outputs / o)) for p, o, _ in timed]
    return bool(timed) and timed[distances.index(min(distances))][2]


@contextmanager
def force_convolution(kind: str, own: bool, device: torch.device) -> Iterator[None]:
    """Has the convolution of ``kind`` be, or not be, the kernels' own on ``device``'s chip in the block.

    This changes nothing in the interpreter, where it always is.
    """
    by_kind = CONVOLUTIONS.setdefault(chip(device), {})
    before = by_kind.get(kind, [])
    by_kind[kind] = [(1, 1, own)]
    try:
        yield
    finally:
        by_kind[kind] = before


def chip(device: torch.device) -> str:
    """Returns the chip's name: ``sm_90``, ``gfx942``, ``interpreter``, or ``any`` if there is no chip to ask."""
    # Not functools.cache: torch.compile looks through that and warns.
    if device not in _chips:
        _chips[device] = _find_chip(device)
    return _chips[device]


# Compiled functions take it as a constant: see fastmsflow.backend.
chip._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _find_chip(device: torch.device) -> str:
    if INTERPRETED:
        return "interpreter"
    if device.type != "cuda":
        return "any"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    name = f"sm_{properties.major}{properties.minor}"
    return ALIKE.get(name, name)


def user_table() -> Path | None:
    """Returns the path of the user's own table, which need not exist; None for a user without a home directory."""
    if given := os.environ.get("FASTMSFLOW_TABLE"):
        return Path(given)
    try:
        folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    except RuntimeError:
        # A container's user of any number, which no passwd file knows.
        return None
    return folder / "fastmsflow" / "table.json"


def read_user_table() -> dict[str, Any]:
    """Reads {chip: {"tiles": {kernel: {field: value}}, "convolutions": {kind: [[pixels, outputs, own], ...]}}}.

    Raises: ValueError if the file cannot be read as that.
    """
    path = user_table()
    # os.access is False, and no error, also below a folder that may not be read.
    if path is None or not os.access(path, os.F_OK):
        return {}
    try:
        with path.open("rb") as file:
            table = json.loads(file.read(MAX_BYTES))
        for rows in table.values():
            _parse_tiles(rows), _parse_convolutions(rows)
    # Values of another type than is written there err in any way.
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        why = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path}: not a table of tiles ({why}); delete it, then `fastmsflow benchmark --tune` writes a new one"
        ) from error
    return table


def apply(table: dict[str, Any]) -> None:
    """Lays ``table``, as ``read_user_table`` returns it, over the tables of this process."""
    for name, rows in table.items():
        for kernel, size in _parse_tiles(rows).items():
            if isinstance(size, Tile):
                TILES[kernel][name] = size
            else:
                PRODUCT_TILES[kernel][name] = size
        CONVOLUTIONS[name] = CONVOLUTIONS.get(name, {}) | _parse_convolutions(rows)


def _parse_tiles(rows: dict[str, Any]) -> dict[str, Tile | ProductTile]:
    sizes: dict[str, Tile | ProductTile] = {}
    for kernel, size in rows.get("tiles", {}).items():
        kind = Tile if kernel in TILES else ProductTile
        if kernel not in TILES | PRODUCT_TILES or {field.name for field in fields(kind)} != size.keys():
            raise ValueError(f"{kernel!r} has no tile {size}")
        if any(not _is_count(n) or n > LARGEST or (n & (n - 1) and key != "stages") for key, n in size.items()):
            raise ValueError(f"the tile of {kernel!r} is {size}; powers of 2 up to {LARGEST} are needed")
        sizes[kernel] = kind(**size)
    return sizes


def _parse_convolutions(rows: dict[str, Any]) -> dict[str, list[tuple[int, int, bool]]]:
    convolutions = rows.get("convolutions", {})
    if not convolutions.keys() <= set(KINDS):
        raise ValueError(f"no such convolution: {', '.join(convolutions.keys() - set(KINDS))}")
    for kind, timed in convolutions.items():
        if any(not (_is_count(p) and _is_count(o) and isinstance(own, bool)) for p, o, own in timed):
            raise ValueError(f"a timing of {kind} is no (pixels, outputs, true or false)")
    return {kind: [(p, o, own) for p, o, own in timed] for kind, timed in convolutions.items()}


def _is_count(value: object) -> bool:
    # True is an int in Python.
    return type(value) is int and 1 <= value < 2**63


apply(read_user_table())
