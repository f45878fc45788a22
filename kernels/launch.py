"""Launch configurations of kernels, and the guards that every launch needs."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton

# Triton decides this when a kernel is decorated, so a later change of TRITON_INTERPRET changes nothing.
INTERPRETED: bool = triton.knobs.runtime.interpret
# See ``recording``.
_recording = False


@dataclass(frozen=True)
class Tile:
    """Configures a program that computes ``pixels`` rows by ``channels`` columns, powers of 2, on ``warps`` warps."""

    pixels: int
    channels: int
    warps: int = 4

    @property
    def options(self) -> dict[str, int | bool]:
        """The compiler's options."""
        # Triton 3.10 turns fused multiply-adds off unless they are asked for.
        return {"num_warps": self.warps, "enable_fp_fusion": True}

    def within(self, pixels: int, channels: int) -> "Tile":
        """Returns a tile that is no larger than the data needs."""
        return Tile(
            min(self.pixels, triton.next_power_of_2(pixels)),
            min(self.channels, triton.next_power_of_2(channels)),
            self.warps,
        )

    def rows_of(self, channels: int) -> "Tile":
        """Returns a tile of whole rows: as many pixels as keep the program's size, and more warps for a wider row."""
        wide, size = triton.next_power_of_2(channels), self.pixels * self.channels
        return Tile(max(1, size // wide), wide, min(16, self.warps * max(1, wide // size)))


@dataclass(frozen=True)
class ProductTile:
    """Configures a program that computes a matrix product (m, k) by (k, n), powers of 2 from 16."""

    m: int
    n: int
    k: int
    warps: int = 4
    stages: int = 3

    @property
    def options(self) -> dict[str, int | bool]:
        """The compiler's options and the block sizes."""
        sizes = {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k}
        return {**sizes, "num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    def within(self, m: int, n: int, k: int) -> "ProductTile":
        """Returns a tile that is no larger than the data needs, and no smaller than a product's may be."""

        def fit(size: int, data: int) -> int:
            return max(16, min(size, triton.next_power_of_2(data)))

        return ProductTile(fit(self.m, m), fit(self.n, n), fit(self.k, k), self.warps, self.stages)


@contextmanager
def recording() -> Iterator[None]:
    """Turns launches in the block into nodes of the graph that PyTorch is tracing."""
    global _recording
    before, _recording = _recording, True
    try:
        yield
    finally:
        _recording = before


def launched(kernel: Any) -> Any:
    """Returns ``kernel`` to be launched; inside ``recording``, to be recorded."""
    return torch.library.wrap_triton(kernel) if _recording else kernel


def on(device: torch.device) -> AbstractContextManager[object]:
    """Makes the tensors' device the current one, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" and not _recording else nullcontext()
