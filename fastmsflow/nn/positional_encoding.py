"""The condition of the parallel flows: a fixed two-dimensional sinusoidal positional encoding."""

import math

import torch
from torch import Tensor, nn

from ..errors import InputError


def positional_encoding_2d(
    channels: int,
    height: int,
    width: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    offsets: Tensor | None = None,
) -> Tensor:
    """Computes the encoding (1 or B, channels, height, width), in float64, then rounded to ``dtype``.

    With d = channels / 2 and f_k = exp(-2k ln(10^4) / d): channel 2k is sin(x f_k), 2k + 1 cos(x f_k), d + 2k
    sin(y f_k), d + 2k + 1 cos(y f_k) (Vaswani et al. 2017, one half of the channels for each axis). ``offsets``: (B, 2)
    on ``device``, the y and x of each grid's first row and column, in heights and widths of the grid; None: (0, 0).
    Raises: InputError if ``channels`` is not a positive multiple of 4.
    """
    half = check_condition_channels(channels) // 2
    # A CUDA graph cannot record a copy from the CPU.
    place = torch.device("cpu") if offsets is None else offsets.device
    frequency = torch.exp(torch.arange(0, half, 2, dtype=torch.float64, device=place) * (-math.log(1e4) / half))

    def axis(length: int, number: int) -> Tensor:
        position = torch.arange(length, dtype=torch.float64, device=place)[None]
        if offsets is not None:
            position = position + length * offsets[:, number, None].double()
        angle = frequency[:, None] * position[:, None]
        # (b, k, sin and cos, length) -> (b, channels, length); in torch's own terms, for exports with any batch.
        return torch.stack((angle.sin(), angle.cos()), dim=2).flatten(1, 2)

    across = axis(width, 1)[:, :, None, :].expand(-1, -1, height, -1)
    down = axis(height, 0)[:, :, :, None].expand(-1, -1, -1, width)
    return torch.cat((across, down), dim=1).to(device=device, dtype=dtype)


def check_condition_channels(channels: int) -> int:
    """Returns ``channels``. Raises: InputError if they are not a positive multiple of 4."""
    if channels <= 0 or channels % 4:
        raise InputError(f"condition channels must be a positive multiple of 4, not {channels}")
    return channels


class PositionalEncoding2d(nn.Module):
    """Returns the positional encoding of a grid, the same tensor for the same grid, dtype and device.

    So values that are computed from the encoding can be cached.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = check_condition_channels(channels)
        # It is of no grid: nothing is computed before there is one.
        self._last: Tensor = torch.empty(1, channels, 0, 0)

    def forward(self, like: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Returns (1, channels, H, W) for ``like`` (B, C, H, W), in its dtype and on its device.

        With ``offsets`` (B, 2), see ``positional_encoding_2d``, it is (B, channels, H, W), computed anew in each call.
        """
        if offsets is not None:
            height, width = like.shape[2:]
            return positional_encoding_2d(
                self.channels, height, width, dtype=like.dtype, device=like.device, offsets=offsets
            )
        last = self._last
        if last.shape[2:] != like.shape[2:] or last.dtype != like.dtype or last.device != like.device:
            height, width = like.shape[2:]
            if torch.compiler.is_exporting():
                return positional_encoding_2d(self.channels, height, width, dtype=like.dtype, device=like.device)
            # A tensor made in inference mode could not enter a later training step.
            with torch.inference_mode(False):
                self._last = positional_encoding_2d(self.channels, height, width, dtype=like.dtype, device=like.device)
        return self._last
