"""Log-likelihood at the image's size -> scores of the image: means over its k least likely pixels.

The k-th largest v = -L is found digit by digit, 8 bits at a time from the highest: bit patterns of floats that are not
negative are ordered as the floats are. Every pass counts, among the values that share the digits settled so far, how
many have each next digit. NaN counts as the largest, as it does for torch.topk.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launched, on
from .tables import tile

# Passes of 8 bits, the highest first; the sign bit is 0.
DIGITS = tl.constexpr(4)
# Programs an image at most: each reads the counts of all, so more would read more than they save.
MOST_PROGRAMS = 16


@triton.jit
def _load(log_likelihood, image, start, pixels, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    """-> the bits of v, and which of them are pixels of the program's part."""
    part = tl.cdiv(pixels, PROGRAMS)
    n = start + tl.arange(0, BLOCK)
    mask = (n < part) & (tl.program_id(0) * part + n < pixels)
    at = log_likelihood + image * pixels + tl.program_id(0) * part + n
    # Of L = -0.0 and of NaN, too, the sign goes.
    return tl.load(at, mask=mask, other=0.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF, mask


@triton.jit
def _settled(counts, states, image, k, DIGIT: tl.constexpr, PROGRAMS: tl.constexpr):
    """-> the k-th value's bits as far as the passes before DIGIT settle them, and the rank of it among the values that
    share them."""
    bits = tl.zeros((), tl.int32)
    rank = bits + k
    if DIGIT > 0:
        if DIGIT > 1:
            state = states + (image * DIGITS + DIGIT - 1) * 2
            bits, rank = tl.load(state), tl.load(state + 1)
        digit = tl.arange(0, 256)
        program = tl.arange(0, PROGRAMS)
        at = counts + ((image * DIGITS + DIGIT - 1) * PROGRAMS + program[:, None]) * 256 + digit[None, :]
        count = tl.sum(tl.load(at), axis=0)
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
    counts,  # (B, DIGITS, PROGRAMS, 256) int32
    states,  # (B, DIGITS, 2) int32: what the passes before a digit settled; of the first two digits' not read
    pixels,
    k,
    DIGIT: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    bits, _ = _settled(counts, states, image, k, DIGIT, PROGRAMS)
    SHIFT: tl.constexpr = 24 - 8 * DIGIT
    count = tl.zeros((256,), tl.int32)
    for start in range(0, tl.cdiv(pixels, PROGRAMS), BLOCK):
        value, mask = _load(log_likelihood, image, start, pixels, PROGRAMS, BLOCK)
        if DIGIT > 0:
            mask = mask & ((value >> (SHIFT + 8)) == (bits >> (SHIFT + 8)))
        count += tl.histogram((value >> SHIFT) & 0xFF, 256, mask=mask)
    at = counts + ((image * DIGITS + DIGIT) * PROGRAMS + tl.program_id(0)) * 256 + tl.arange(0, 256)
    tl.store(at, count)


@triton.jit
def _scores(bits):
    """-> 1 - exp(L) and -L."""
    v = bits.to(tl.float32, bitcast=True)
    return 1.0 - tl.exp(-v), v


@triton.jit
def sum_largest_kernel(
    log_likelihood,  # (B, pixels) float32
    counts,  # as above
    states,  # as above
    partial,  # (B, PROGRAMS, 2) float32: the program's share of both means
    pixels,
    k,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    bits, rank = _settled(counts, states, image, k, DIGITS, PROGRAMS)
    score = tl.zeros((BLOCK,), tl.float32)
    log_score = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, tl.cdiv(pixels, PROGRAMS), BLOCK):
        value, mask = _load(log_likelihood, image, start, pixels, PROGRAMS, BLOCK)
        mask = mask & (value > bits)
        one, log_one = _scores(value)
        score += tl.where(mask, one, 0.0)
        log_score += tl.where(mask, log_one, 0.0)
    total, log_total = tl.sum(score, axis=0), tl.sum(log_score, axis=0)
    if tl.program_id(0) == 0:
        # ``rank`` values equal the k-th and are among the k largest.
        one, log_one = _scores(bits)
        total += rank * one
        log_total += rank * log_one
    at = partial + (image * PROGRAMS + tl.program_id(0)) * 2
    tl.store(at, total / k)
    tl.store(at + 1, log_total / k)


def image_scores(log_likelihood: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """L (B, H, W) float32, at most 0 -> means of 1 - exp(L) and of -L over each image's ``k`` least likely pixels."""
    images, device = log_likelihood.shape[0], log_likelihood.device
    pixels = log_likelihood[0].numel()
    values = log_likelihood.contiguous()
    size = tile("image_score", device)
    digits, programs = DIGITS.value, min(MOST_PROGRAMS, triton.next_power_of_2(triton.cdiv(pixels, size.pixels)))
    counts = torch.empty((images, digits, programs, 256), dtype=torch.int32, device=device)
    states = torch.empty((images, digits, 2), dtype=torch.int32, device=device)
    partial = torch.empty((images, programs, 2), dtype=torch.float32, device=device)
    size = size.within(triton.cdiv(pixels, programs), 1)
    meta = {"PROGRAMS": programs, "BLOCK": size.pixels, **size.options}
    grid = (programs, images)
    with on(device):
        for digit in range(digits):
            launched(count_digits_kernel)[grid](values, counts, states, pixels, k, DIGIT=digit, **meta)
        launched(sum_largest_kernel)[grid](values, counts, states, partial, pixels, k, **meta)
    return partial[:, :, 0].sum(dim=1), partial[:, :, 1].sum(dim=1)
