"""Tests where the kernels' last tiles lie in the largest tensors anyone will have, without having them.

Batch 64 at 1024x1024, no pool: 256x256 pixels at the finest level; 1024 channels make 2^32 elements, more than
32-bit offsets can tell apart.
"""

import pytest
import torch
import triton
import triton.language as tl

from fastmsflow.kernels import conv3x3, coupling, fusion, layer_norm, reflection_pad
from tests.helpers.ops_parity import DEVICE

BATCH, SIZE, CHANNELS, BLOCK = 64, 256, 1024, 16
HELPERS = ("coupling", "layer_norm", "conv3x3", "reflection_pad", "fusion")

_coupling_tile, _layer_norm_rows = coupling._tile, layer_norm._rows
_convolution_tile, _fusion_pixels = conv3x3.image_tile, fusion._pixels
_padding_tile = reflection_pad._tile


@triton.jit
def offset_kernel(out, program, images, size, channels, HELPER: tl.constexpr, BLOCK: tl.constexpr):
    """The first element of a program's tile, reckoned as the kernels of the file do."""
    if HELPER == "coupling":
        _, row, p, _, _, _ = _coupling_tile(program, size * size, channels, BLOCK, BLOCK)
        offset = row * channels + tl.min(p) * channels
    elif HELPER == "layer_norm":
        row, p, _, _, _ = _layer_norm_rows(program, images * size * size, channels, BLOCK, BLOCK)
        offset = row * channels + tl.min(p) * channels
    elif HELPER == "conv3x3":
        _, row, m, _, _, _ = _convolution_tile(program, size, size, BLOCK)
        offset = row * channels + tl.min(m) * channels
    elif HELPER == "reflection_pad":
        image, p, _ = _padding_tile(program, size * size, BLOCK)
        offset = image * size * size * channels + tl.min(p) * channels
    else:
        image, p, _, _, _ = _fusion_pixels(program, size, size, BLOCK)
        offset = image * size * size * channels + tl.min(p) * channels
    tl.store(out, offset)


@pytest.mark.parametrize("helper", HELPERS)
def test_offsets_do_not_overflow_32_bits(helper: str) -> None:
    out = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    program = BATCH * SIZE * SIZE // BLOCK - 1
    offset_kernel[(1,)](out, program, BATCH, SIZE, CHANNELS, HELPER=helper, BLOCK=BLOCK)
    assert out.item() == (BATCH * SIZE * SIZE - BLOCK) * CHANNELS
