"""Which tile a kernel takes on which chip, and where the kernels' own convolutions compute.

The committed table, and over it the user's own, which ``fastmsflow benchmark --tune`` writes: a JSON file at the path
in FASTMSFLOW_TABLE, or fastmsflow/table.json in the user's folder of configurations. Read once, at the import.
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

# By kernel: any chip's first, then those known to want another. The interpreter pays for each program, not for its
# size.
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
CANDIDATES: dict[str, tuple[ProductTile, ...]] = {
    "conv3x3": (ProductTile(128, 256, 64, warps=8), ProductTile(128, 128, 64, warps=8)),
    # With 4 warps 320 outputs spill; 192 do not.
    "conv3x3_layer_norm": (ProductTile(64, 16, 64, warps=8), ProductTile(64, 16, 64, warps=4)),
    "conv3x3_coupling": (ProductTile(128, 128, 64, warps=8), ProductTile(64, 128, 64, warps=8)),
    "conv3x3_weight": (ProductTile(128, 128, 64, warps=8), ProductTile(128, 256, 64, warps=8)),
}
# Chips that share another's tiles: the same registers, shared memory and matrix instructions.
ALIKE = {"sm_87": "sm_80", "sm_89": "sm_86", "sm_120": "sm_86", "sm_121": "sm_86", "sm_103": "sm_100"}

# By chip and convolution: shapes (pixels of the batch, outputs) at which it was timed, and whether the kernels' own was
# faster than the vendor's with the other kernels around it. None has been timed yet: the vendor's computes everywhere.
CONVOLUTIONS: dict[str, dict[str, list[tuple[int, int, bool]]]] = {}
KINDS = ("conv3x3", "conv3x3_layer_norm", "conv3x3_coupling", "conv3x3_input_gradient", "conv3x3_weight_gradient")

_chips: dict[torch.device, str] = {}


def tile(kernel: str, device: torch.device) -> Tile:
    """The launch configuration of ``kernel`` on ``device``'s chip."""
    by_chip = TILES[kernel]
    return by_chip.get(chip(device), by_chip["any"])


def product_tile(kernel: str, device: torch.device, exact: bool = False) -> ProductTile:
    """The launch configuration of ``kernel``, a matrix product, on ``device``'s chip.

    ``exact``: of float32 operands, not rounded to TF32.
    """
    name, by_chip = chip(device), PRODUCT_TILES[kernel]
    smaller = EXACT_TILES.get(kernel, {}).get(name) if exact else None
    return smaller or by_chip.get(name, by_chip["any"])


@contextmanager
def trying(kernel: str, size: ProductTile, device: torch.device) -> Iterator[None]:
    """In the block ``kernel`` takes ``size`` on ``device``'s chip, exact products too."""
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


def convolves(kind: str, pixels: int, outputs: int, device: torch.device) -> bool:
    """Whether the kernels' own convolution computes: whether it won at the nearest shape timed on ``device``'s chip.

    ``kind``: one of KINDS. ``pixels``: of the whole batch. In the interpreter it always does: the tests need it to.
    """
    name = chip(device)
    if name == "interpreter":
        return True
    timed = CONVOLUTIONS.get(name, {}).get(kind, [])
    distances = [abs(math.log(pixels / p)) + abs(math.log(outputs / o)) for p, o, _ in timed]
    return bool(timed) and timed[distances.index(min(distances))][2]


@contextmanager
def deciding(kind: str, own: bool, device: torch.device) -> Iterator[None]:
    """In the block the convolution of ``kind`` is, or is not, the kernels' own on ``device``'s chip.

    Not in the interpreter, where it always is.
    """
    by_kind = CONVOLUTIONS.setdefault(chip(device), {})
    before = by_kind.get(kind, [])
    by_kind[kind] = [(1, 1, own)]
    try:
        yield
    finally:
        by_kind[kind] = before


def chip(device: torch.device) -> str:
    """``sm_90``, ``gfx942``, ``interpreter``, or ``any`` where there is no chip to ask."""
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


def user_table() -> Path:
    """Where the user's own table is, or would be."""
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return Path(os.environ.get("FASTMSFLOW_TABLE") or folder / "fastmsflow" / "table.json")


def read_user_table() -> dict[str, Any]:
    """{chip: {"tiles": {kernel: {field: value}}, "convolutions": {kind: [[pixels, outputs, own], ...]}}}.

    Errors: ValueError where the file cannot be read as that.
    """
    path = user_table()
    if not path.exists():
        return {}
    try:
        table = json.loads(path.read_text())
        for rows in table.values():
            _tiles_of(rows), _convolutions_of(rows)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path}: not a table of tiles ({error}); delete it, then `fastmsflow benchmark --tune` writes a new one"
        ) from error
    return table


def apply(table: dict[str, Any]) -> None:
    """Lays ``table``, as ``read_user_table`` returns it, over what holds."""
    for name, rows in table.items():
        for kernel, size in _tiles_of(rows).items():
            if isinstance(size, Tile):
                TILES[kernel][name] = size
            else:
                PRODUCT_TILES[kernel][name] = size
        CONVOLUTIONS[name] = CONVOLUTIONS.get(name, {}) | _convolutions_of(rows)


def _tiles_of(rows: dict[str, Any]) -> dict[str, Tile | ProductTile]:
    sizes: dict[str, Tile | ProductTile] = {}
    for kernel, size in rows.get("tiles", {}).items():
        kind = Tile if kernel in TILES else ProductTile
        if kernel not in TILES | PRODUCT_TILES or {field.name for field in fields(kind)} != size.keys():
            raise ValueError(f"{kernel!r} has no tile {size}")
        if any(not isinstance(n, int) or n < 1 or (n & (n - 1) and key != "stages") for key, n in size.items()):
            raise ValueError(f"the tile of {kernel!r} is {size}; powers of 2 are needed")
        sizes[kernel] = kind(**size)
    return sizes


def _convolutions_of(rows: dict[str, Any]) -> dict[str, list[tuple[int, int, bool]]]:
    convolutions = rows.get("convolutions", {})
    if not convolutions.keys() <= set(KINDS):
        raise ValueError(f"no such convolution: {', '.join(convolutions.keys() - set(KINDS))}")
    return {kind: [(int(p), int(o), bool(own)) for p, o, own in timed] for kind, timed in convolutions.items()}


apply(read_user_table())
