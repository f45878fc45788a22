"""How kernels are launched: one configuration object per kernel, and the guards every launch needs."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

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


# By kernel: any chip's first, then those measured to want another. The interpreter pays for each program, not for its
# size.
TILES: dict[str, dict[str, Tile]] = {
    "coupling": {"any": Tile(32, 64), "interpreter": Tile(64, 128)},
    "coupling_backward": {"any": Tile(32, 32), "interpreter": Tile(64, 128)},
    "layer_norm": {"any": Tile(16, 256), "interpreter": Tile(64, 256)},
    "layer_norm_backward": {"any": Tile(8, 256), "interpreter": Tile(16, 256)},
    "likelihood": {"any": Tile(16, 128), "interpreter": Tile(64, 256)},
    "score_map": {"any": Tile(1024, 1)},
}


def tile(kernel: str, device: torch.device) -> Tile:
    """The launch configuration of ``kernel`` on ``device``'s chip."""
    by_chip = TILES[kernel]
    return by_chip.get(_chip(device), by_chip["any"])


@cache
def _chip(device: torch.device) -> str:
    """``sm_90``, ``gfx942``, ``interpreter``, or ``any`` where there is no chip to ask."""
    if INTERPRETED:
        return "interpreter"
    if device.type != "cuda":
        return "any"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def on(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device: makes it the tensors' one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
