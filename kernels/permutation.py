"""Device function that permutes the channels of whole rows in shared memory.

A program holds whole rows, so they are read and written as they lie, 16 bytes at a time. Sorting the channels inside a
half, which would be allowed, gains nothing: a random half of the input leaves runs of two channels on average, and a
longer run at one coupling breaks up at the next.
"""

import triton
import triton.language as tl


@triton.jit
def _slots(index, c, half):
    """Returns the positions of the channels ``index`` among interleaved halves."""
    j = tl.load(index + c, mask=c < half, other=0).to(tl.int32)
    return tl.where(j < half, 2 * j, 2 * (j - half) + 1)[None, :]


@triton.jit
def permuted(first, second, index, c, half, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Returns the halves of rows whose channel i is channel index[i] of (first, second)."""
    # Two values of half precision, of two rows, move as one word.
    PAIRED: tl.constexpr = (first.dtype.primitive_bitwidth == 16) and (BLOCK_P > 1)
    ROWS: tl.constexpr = BLOCK_P // 2 if PAIRED else BLOCK_P
    if PAIRED:
        a, b = _paired(first, BLOCK_P, BLOCK_C), _paired(second, BLOCK_P, BLOCK_C)
    else:
        a, b = first, second
    # A gather along one of two axes would be by shuffles, as many as a row has channels for every 32 of them; along
    # the only axis it goes through shared memory.
    words = tl.reshape(tl.join(a, b), (ROWS * 2 * BLOCK_C,))
    slots = tl.join(_slots(index, c, half), _slots(index + half, c, half))
    slots += tl.arange(0, ROWS)[:, None, None] * 2 * BLOCK_C
    found = tl.gather(words, tl.reshape(slots, (ROWS * 2 * BLOCK_C,)), 0)
    a, b = tl.split(tl.reshape(found, (ROWS, BLOCK_C, 2)))
    if PAIRED:
        a, b = _unpaired(a, first.dtype, BLOCK_P, BLOCK_C), _unpaired(b, second.dtype, BLOCK_P, BLOCK_C)
    return a, b


@triton.jit
def _paired(x, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Packs each value of the upper half of the tile's rows and the one below it, in the lower half, into a word."""
    bits = tl.reshape(x.to(tl.uint16, bitcast=True), (2, BLOCK_P // 2, BLOCK_C))
    low, high = tl.split(tl.permute(bits, (1, 2, 0)))
    return low.to(tl.uint32) | (high.to(tl.uint32) << 16)


@triton.jit
def _unpaired(words, dtype: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Unpacks the words of ``_paired``."""
    low, high = (words & 0xFFFF).to(tl.uint16), (words >> 16).to(tl.uint16)
    bits = tl.permute(tl.join(low, high), (2, 0, 1))
    return tl.reshape(bits, (BLOCK_P, BLOCK_C)).to(dtype, bitcast=True)
