"""Tensors in channels-last memory, seen as rows: one row per pixel, its channels contiguous."""

import torch
from torch import Tensor

Rows = tuple[Tensor, int]
MaybeRows = tuple[Tensor | None, int]


def as_rows(x: Tensor) -> Rows:
    """Returns x (B, C, H, W) and a stride: pixel n = (b H + h) W + w has its channels at n * stride.

    The tensor is x itself if its memory is like that (channels-last, and channel slices of it), a copy otherwise.
    """
    b, c, h, w = x.shape
    sb, sc, sh, sw = x.stride()
    stride = sw if w > 1 else sh if h > 1 else sb if b > 1 else c
    fits = (c == 1 or sc == 1) and (w == 1 or sw == stride) and (h == 1 or sh == w * stride)
    if fits and (b == 1 or sb == h * w * stride) and stride >= c:
        return x, stride
    return x.contiguous(memory_format=torch.channels_last), c


def new_rows(like: Tensor, channels: int, dtype: torch.dtype | None = None) -> Tensor:
    """Makes an uninitialized (B, channels, H, W) on ``like``'s grid and device, in channels-last memory."""
    b, _, h, w = like.shape
    return torch.empty((b, h, w, channels), dtype=dtype or like.dtype, device=like.device).permute(0, 3, 1, 2)


def new_results(x1: Tensor | None, x2: Tensor, result: str) -> list[Tensor]:
    """Makes the tensors, uninitialized, for the results of a coupling of halves x1, x2 (B, C / 2, H, W), log_det apart.

    ``result``: see kernels.coupling.
    """
    b, half, h, w = x2.shape
    if result == "likelihood":
        return [torch.empty((b, h, w), dtype=torch.float32, device=x2.device)]
    if result == "halves":
        return [new_rows(x2, half), new_rows(x2, half)]
    return [new_rows(x2, half if x1 is None else 2 * half)]
