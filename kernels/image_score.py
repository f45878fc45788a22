"""Scores of an image from its log-likelihood map: means over its k least likely pixels.

The k-th largest v = -L is found digit by digit, 8 bits at a time from the highest: bit patterns of floats that are not
negative are ordered as the floats are. Every pass counts, among the values that share the digits settled so far, how
many have each next digit. NaN counts as the largest, as it does for torch.topk.

A program takes one tile of 1024 pixels: one image of 512x512 has 256 programs, more than a large chip has
multiprocessors. All of an image's programs add to one histogram, which is the same in whatever order they do. In a pass
they read the image's 1 MB and the histogram of the pass before, 0.25 MB together; had each a histogram of its own, as
few as 16 programs would read as much of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import tile
from .launch import launched, on

# Passes of 8 bits, the highest first; the sign bit is 0.
DIGITS = tl.constexpr(4)


@triton.jit
def _load(log_likelihood, image, pixels, BLOCK: tl.constexpr):
    """Returns the bits of v, and which elements of the program's tile are pixels."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = n < pixels
    # The sign of L = -0.0 and of NaN is dropped too.
    bits = tl.load(log_likelihood + image * pixels + n, mask=mask, other=0.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return bits, mask


@triton.jit
def _settled(counts, states, image, k, DIGIT: tl.constexpr):
    """Returns the bits of the k-th value that the passes before DIGIT settle, and its rank among equals."""
    bits = tl.zeros((), tl.int32)
    rank = bits + k
    if DIGIT > 0:
        if DIGIT > 1:
            state = states + (image * DIGITS + DIGIT - 1) * 2
            bits, rank = tl.load(state), tl.load(state + 1)
        digit = tl.arange(0, 256)
        count = tl.load(counts + (image * DIGITS + DIGIT - 1) * 256 + digit)
        # Values with this digit or a larger one.
        from_here = tl.sum(count, axis=0) - tl.cumsum(count, axis=0) + count
        chosen = tl.sum((from_here >= rank).to(tl.int32), axis=0) - 1
        rank -= tl.sum(tl.where(digit > chosen, count, 0), axis=0)
        bits = bits | (chosen << (32 - 8 * DIGIT))
        if (tl.program_id(0) == 0) & (DIGIT < DIGITS):
            state = states + (image * DIGITS + DIGIT) * 2
            tl.store(state, bits)
            tl.store(state + 1, rank)
    return bits, rank


@triton.jit
def count_digits_kernel(
    log_likelihood,  # (B, pixels) float32
    counts,  # (B, DIGITS, 256) int32, 0 before the first pass
    states,  # (B, DIGITS, 2) int32: what the passes before a digit settled; of the first two digits' not read
    pixels,
    k,
    DIGIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """counts[image, DIGIT, d] += how many values share the bits settled so far and have the next digit d."""
    image = tl.program_id(1).to(tl.int64)
    bits, _ = _settled(counts, states, image, k, DIGIT)
    SHIFT: tl.constexpr = 24 - 8 * DIGIT
    value, mask = _load(log_likelihood, image, pixels, BLOCK)
    if DIGIT > 0:
        mask = mask & ((value >> (SHIFT + 8)) == (bits >> (SHIFT + 8)))
    count = tl.histogram((value >> SHIFT) & 0xFF, 256, mask=mask)
    at = counts + (image * DIGITS + DIGIT) * 256 + tl.arange(0, 256)
    tl.atomic_add(at, count, mask=count > 0, sem="relaxed")


@triton.jit
def _scores(bits):
    """Returns 1 - exp(L) and -L."""
    v = bits.to(tl.float32, bitcast=True)
    return 1.0 - tl.exp(-v), v


@triton.jit
def sum_largest_kernel(
    log_likelihood,  # (B, pixels) float32
    counts,  # (B, DIGITS, 256) int32
    states,  # (B, DIGITS, 2) int32
    partial,  # (2, B, programs) float32: the program's share of both means
    pixels,
    k,
    BLOCK: tl.constexpr,
):
    """partial = sums of 1 - exp(L) and of -L over the k largest values -L, divided by k, program by program."""
    image = tl.program_id(1).to(tl.int64)
    bits, rank = _settled(counts, states, image, k, DIGITS)
    value, mask = _load(log_likelihood, image, pixels, BLOCK)
    mask = mask & (value > bits)
    score, log_score = _scores(value)
    total, log_total = tl.sum(tl.where(mask, score, 0.0), axis=0), tl.sum(tl.where(mask, log_score, 0.0), axis=0)
    if tl.program_id(0) == 0:
        # ``rank`` values equal the k-th and are among the k largest.
        one, log_one = _scores(bits)
        total += rank * one
        log_total += rank * log_one
    at = partial + image * tl.num_programs(0) + tl.program_id(0)
    tl.store(at, total / k)
    tl.store(at + tl.num_programs(0) * tl.num_programs(1), log_total / k)


def image_scores(log_likelihood: Tensor, k: int) -> Tensor:
    """Computes the means of 1 - exp(L) and of -L over each image's ``k`` least likely pixels, (2, B).

    ``log_likelihood``: L (B, H, W) float32, at most 0.
    """
    images, device = log_likelihood.shape[0], log_likelihood.device
    pixels = log_likelihood[0].numel()
    values = log_likelihood.contiguous()
    size = tile("image_score", device).within(pixels, 1)
    digits, programs = DIGITS.value, triton.cdiv(pixels, size.pixels)
    counts = torch.zeros((images, digits, 256), dtype=torch.int32, device=device)
    states = torch.empty((images, digits, 2), dtype=torch.int32, device=device)
    partial = torch.empty((2, images, programs), dtype=torch.float32, device=device)
    meta = {"BLOCK": size.pixels, **size.options}
    grid = (programs, images)
    with on(device):
        for digit in range(digits):
            launched(count_digits_kernel)[grid](values, counts, states, pixels, k, DIGIT=digit, **meta)
        launched(sum_largest_kernel)[grid](values, counts, states, partial, pixels, k, **meta)
    return partial.sum(dim=2)
