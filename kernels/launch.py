"""How kernels are launched: one configuration object per kernel, and the guards every launch needs."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import triton

# Triton decides this when a kernel is decorated, so a later change of TRITON_INTERPRET changes nothing.
INTERPRETED: bool = triton.knobs.runtime.interpret


@dataclass(frozen=True)
class Tile:
    """What one program computes: ``pixels`` rows by ``channels`` columns (both powers of 2), on ``warps`` warps."""

    pixels: int
    channels: int
    warps: int = 4

    @property
    def options(self) -> dict[str, int | bool]:
        """What the compiler is told. Triton 3.10 turns fused multiply-adds off unless they are asked for."""
        return {"num_warps": self.warps, "enable_fp_fusion": True}

    def within(self, pixels: int, channels: int) -> "Tile":
        """No larger than the data needs."""
        return Tile(
            min(self.pixels, triton.next_power_of_2(pixels)),
            min(self.channels, triton.next_power_of_2(channels)),
            self.warps,
        )

    def rows_of(self, channels: int) -> "Tile":
        """Whole rows: as many pixels as keep the program's size."""
        wide = triton.next_power_of_2(channels)
        return Tile(max(1, self.pixels * self.channels // wide), wide, self.warps)


@dataclass(frozen=True)
class ProductTile:
    """What one program of a matrix product computes: (m, k) by (k, n), powers of 2 from 16."""

    m: int
    n: int
    k: int
    warps: int = 4
    stages: int = 3

    @property
    def options(self) -> dict[str, int | bool]:
        sizes = {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k}
        return {**sizes, "num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    def within(self, m: int, n: int, k: int) -> "ProductTile":
        """No larger than the data needs, no smaller than a product's tile may be."""
        fitted = (
            max(16, min(size, triton.next_power_of_2(data))) for size, data in ((self.m, m), (self.n, n), (self.k, k))
        )
        return ProductTile(*fitted, self.warps, self.stages)


# By kernel: any chip's first, then those measured to want another. The interpreter pays for each program, not for its
# size.
TILES: dict[str, dict[str, Tile]] = {
    "coupling": {"any": Tile(32, 64), "interpreter": Tile(64, 128)},
    "coupling_backward": {"any": Tile(32, 32), "interpreter": Tile(64, 128)},
    "layer_norm": {"any": Tile(16, 256), "interpreter": Tile(64, 256)},
    "layer_norm_backward": {"any": Tile(8, 256), "interpreter": Tile(16, 256)},
    "pool": {"any": Tile(16, 128), "interpreter": Tile(64, 256)},
    "upsample": {"any": Tile(16, 128), "interpreter": Tile(64, 256)},
    "likelihood": {"any": Tile(16, 128), "interpreter": Tile(64, 256)},
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
    "conv3x3_coupling": {
        # Triton 3.6 spills at 128 by 128.
        "any": ProductTile(64, 128, 32, warps=8),
        "interpreter": ProductTile(256, 128, 128),
    },
    "conv3x3_weight": {"any": ProductTile(128, 128, 32, warps=8), "interpreter": ProductTile(128, 128, 256)},
}
# Chips that share another's tiles: the same registers, shared memory and matrix instructions.
ALIKE = {"sm_87": "sm_80", "sm_89": "sm_86", "sm_120": "sm_86", "sm_121": "sm_86", "sm_103": "sm_100"}


_chips: dict[torch.device, str] = {}


def product_tile(kernel: str, device: torch.device) -> ProductTile:
    """The launch configuration of ``kernel``, a matrix product, on ``device``'s chip."""
    by_chip = PRODUCT_TILES[kernel]
    return by_chip.get(_chip(device), by_chip["any"])


def tile(kernel: str, device: torch.device) -> Tile:
    """The launch configuration of ``kernel`` on ``device``'s chip."""
    by_chip = TILES[kernel]
    return by_chip.get(_chip(device), by_chip["any"])


def _chip(device: torch.device) -> str:
    """``sm_90``, ``gfx942``, ``interpreter``, or ``any`` where there is no chip to ask."""
    # Not functools.cache: torch.compile looks through that and warns.
    if device not in _chips:
        _chips[device] = _find_chip(device)
    return _chips[device]


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


# Chips on which the kernels' own convolutions compute rather than the vendor's: those where they were measured to be
# faster. None has been yet; the interpreter is here so that the tests run them.
CONVOLVING_CHIPS = {"interpreter"}


def convolves(device: torch.device) -> bool:
    """Whether the kernels' own convolutions compute on ``device``."""
    return _chip(device) in CONVOLVING_CHIPS


def on(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device: makes it the tensors' one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
