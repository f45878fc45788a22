"""The 3x3 convolution of stride 1 by Winograd's algorithm, in plain PyTorch.

F(m x m, 3 x 3) computes m x m outputs of a channel from a tile of (m + 2) x (m + 2) inputs d and a filter g as

    Y = A^T [(G g G^T) * (B^T d B)] A                     (* multiplies element by element)

which takes (m + 2)^2 multiplications in place of 9 m^2: 36 for 144 with m = 4, 16 for 36 with m = 2. Behind it is the
algorithm of Toom and Cook for the product of two polynomials, here of degrees 2 (the filter) and m - 1: both are
evaluated at m + 1 points and at infinity, the values are multiplied, and the product's coefficients are interpolated.
To slide a filter of 3 over m + 2 inputs is the transpose of that product, as a linear map of the other polynomial. So
A^T is the transpose of its evaluation, B^T that of the interpolation, whose denominators go into G, and G evaluates
the filter. The points are 0, 1, -1 for m = 2, and 0, 3/4, -3/4, 3/2, -3/2 for m = 4.

Over all channels the middle step is a matrix product for each of the (m + 2)^2 places of a tile: tiles by input
channels, times input channels by output channels. One grouped 1x1 convolution computes all of them, in channels-last
memory without a transpose. Filters are transformed once for given weights, and grow to (m + 2)^2 / 9 of their size.

Source: Lavin and Gray, "Fast algorithms for convolutional neural networks" (arXiv 1509.09308).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""Multiplies tiles (T, places * I) by the filters, place by place: (T, places * O)."""
Transform = Callable[[Sequence[Tensor], Sequence[Tensor]], None]

# The points of m = 4, exact in binary with their powers. The usual 1 and 2 make four times larger errors, because A^T
# then magnifies rounding by 8 in each direction: 1.1e-5 in place of 2.5e-6 of the largest output, with 576 channels.
NEAR, FAR = 3 / 4, 3 / 2

# The largest buffer of transformed inputs or products, in bytes. glibc maps larger ones anew in each call, and the
# system then clears their pages, which takes longer than the arithmetic.
CHUNK_BYTES = 16 << 20
# The part of the filters, in bytes, that is transformed at a time.
PART_BYTES = 1 << 19
# Tiles with which a product no longer waits for its filters from memory.
ENOUGH_TILES = 64


def _input_2(d: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """Computes the rows of B^T d for m = 2."""
    torch.sub(d[2], d[0], out=out[0])
    torch.add(d[2], d[1], out=out[1])
    torch.sub(d[2], d[1], out=out[2])
    torch.sub(d[3], d[1], out=out[3])


def _output_2(products: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """Computes the rows of A^T products for m = 2."""
    torch.add(products[1], products[0], out=out[0]).add_(products[2])
    torch.sub(products[1], products[2], out=out[1]).add_(products[3])


def _input_4(d: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """Computes the rows of B^T d for m = 4; those of a point and of its negative have the same two terms."""
    even, odd = torch.sub(d[4], d[2], alpha=FAR**2), torch.sub(d[3], d[1], alpha=FAR**2)
    torch.add(even, odd, alpha=NEAR, out=out[1])
    torch.sub(even, odd, alpha=NEAR, out=out[2])
    torch.sub(d[4], d[2], alpha=NEAR**2, out=even)
    torch.sub(d[3], d[1], alpha=NEAR**2, out=odd)
    torch.add(even, odd, alpha=FAR, out=out[3])
    torch.sub(even, odd, alpha=FAR, out=out[4])
    torch.sub(d[2], d[0], alpha=NEAR**2, out=odd)
    torch.sub(even, odd, alpha=FAR**2, out=out[0])
    torch.sub(d[5], d[3], alpha=NEAR**2, out=even)
    torch.sub(d[3], d[1], alpha=NEAR**2, out=odd)
    torch.sub(even, odd, alpha=FAR**2, out=out[5])


def _output_4(products: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """Computes the rows of A^T products for m = 4."""
    near, far = products[1] + products[2], products[3] + products[4]
    torch.mul(near, NEAR**2, out=out[2]).add_(far, alpha=FAR**2)
    near += far
    torch.add(products[0], near, out=out[0])
    torch.sub(products[1], products[2], out=near)
    torch.sub(products[3], products[4], out=far)
    torch.mul(near, NEAR, out=out[1]).add_(far, alpha=FAR)
    torch.add(products[5], near, alpha=NEAR**3, out=out[3]).add_(far, alpha=FAR**3)


def _filter(g: Sequence[Tensor], out: Sequence[Tensor], points: Sequence[float]) -> None:
    """Computes the rows of G g for 0, pairs of ``points`` p and -p, and infinity."""
    torch.mul(g[0], 1 / _scale(0.0, points), out=out[0])
    out[-1].copy_(g[2])
    for row in range(1, len(points), 2):
        point = points[row]
        scale = _scale(point, points)
        torch.mul(g[0], 1 / scale, out=out[row]).add_(g[2], alpha=point**2 / scale)
        torch.sub(out[row], g[1], alpha=point / scale, out=out[row + 1])
        out[row].add_(g[1], alpha=point / scale)


def _scale(point: float, points: Sequence[float]) -> float:
    """Returns the product of the distances of ``point`` from the other points."""
    return math.prod(point - other for other in points if other != point)


class Tile(NamedTuple):
    """Describes F(m x m, 3 x 3)."""

    outputs: int
    """The m outputs in each direction."""
    points: Sequence[float]
    """The finite points: 0 and pairs of a positive one and its negative."""
    transform_input: Transform
    """Computes B^T d, row by row, into its second argument."""
    transform_output: Transform
    """Computes A^T of products, row by row, into its second argument."""

    @property
    def inputs(self) -> int:
        """The m + 2 inputs in each direction."""
        return self.outputs + 2

    @property
    def places(self) -> int:
        """The products of a tile."""
        return self.inputs**2


F2 = Tile(2, (0.0, 1.0, -1.0), _input_2, _output_2)
F4 = Tile(4, (0.0, NEAR, -NEAR, FAR, -FAR), _input_4, _output_4)


def transform_filters(weight: Tensor, tile: Tile) -> Tensor:
    """Computes G g G^T of weight (O, I, 3, 3): (places * O, I, 1, 1)."""
    outputs, inputs = weight.shape[:2]
    n = tile.inputs
    result = weight.new_empty(n, n, outputs, inputs)
    taps = weight.permute(2, 3, 0, 1)
    # A part at a time, which stays in the cache.
    step = max(1, PART_BYTES // (weight.element_size() * n * n * inputs))
    for first in range(0, outputs, step):
        part = taps[:, :, first : first + step]
        rows = weight.new_empty(n, *part.shape[1:])
        _filter(part.unbind(0), rows.unbind(0), tile.points)
        _filter(rows.unbind(1), result[:, :, first : first + step].unbind(1), tile.points)
    return result.view(-1, inputs, 1, 1)


def transform_bias(bias: Tensor, tile: Tile) -> Tensor:
    """Returns what the product adds so that bias (O,) comes out of A^T: (places * O,).

    A^T applied to values v evaluates the sum of v_p p^i for each i, which is 1 for Lagrange's coefficients at 1.
    """
    points = tile.points
    lagrange = [math.prod(1 - other for other in points if other != point) / _scale(point, points) for point in points]
    values = torch.tensor([*lagrange, 0.0], dtype=torch.float64, device=bias.device)
    return torch.einsum("i,j,o->ijo", values, values, bias.double()).flatten().to(bias.dtype)


class Chunk(NamedTuple):
    """Says which tiles go through the transforms and the product together."""

    images: int
    rows: int
    """Rows of tiles."""
    columns: int
    """Tiles in a row; all of them."""

    @property
    def tiles(self) -> int:
        """The number of tiles."""
        return self.images * self.rows * self.columns


def plan_chunk(shape: Sequence[int], outputs: int, tile: Tile) -> Chunk:
    """Returns the chunk for x of ``shape`` (B, I, H, W), with ``outputs`` channels of the result.

    Filters are packed for a number of tiles, so batches of all sizes share two: an image of a small grid alone, or
    several of them together.
    """
    batch, inputs, *grid = shape
    rows, columns = (math.ceil(side / tile.outputs) for side in grid)
    together = math.ceil(ENOUGH_TILES / (rows * columns))
    if together > 1:
        return Chunk(together if 2 * batch > together else 1, rows, columns)
    strips = math.ceil(4 * tile.places * rows * columns * max(inputs, outputs) / CHUNK_BYTES)
    return Chunk(1, math.ceil(rows / strips), columns)


def convolve(x: Tensor, product: Product, outputs: int, *, tile: Tile, chunk: Chunk, reflect: bool = False) -> Tensor:
    """Convolves x (B, I, H, W) with the filters of ``product``: (B, ``outputs``, H, W), in channels-last memory.

    ``reflect``: whether the border of one pixel reflects x; it is of zeros otherwise.
    """
    batch, inputs, height, width = x.shape
    m, n = tile.outputs, tile.inputs
    rows = math.ceil(math.ceil(height / m) / chunk.rows) * chunk.rows
    result = x.new_empty(batch, rows, m, chunk.columns, m, outputs)
    shape = chunk.images, chunk.rows, chunk.columns
    padded = x.new_empty(chunk.images, chunk.rows * m + 2, chunk.columns * m + 2, inputs)
    padded[:, :, 0] = 0
    padded[:, :, width + 1 :] = 0
    columns_done = x.new_empty(chunk.images, chunk.rows * m + 2, chunk.columns, n, inputs)
    tiles = x.new_empty(*shape, n, n * inputs)
    rows_done = x.new_empty(*shape, m, n, outputs)
    for first in range(0, batch, chunk.images):
        images = x[first : first + chunk.images].permute(0, 2, 3, 1)
        count = len(images)
        tiles[count:] = 0
        for row in range(0, rows, chunk.rows):
            strip = padded[:count]
            _cut(images, row * m - 1, strip, reflect)
            found = columns_done[:count]
            tile.transform_input(_taps(strip, 2, tile), found.unbind(3))
            tile.transform_input(_taps(found.flatten(3), 1, tile), tiles[:count].unbind(3))
            products = product(tiles.view(chunk.tiles, -1)).view(*shape, n, n * outputs)[:count]
            tile.transform_output(products.unbind(3), rows_done.flatten(4)[:count].unbind(3))
            done = result[first : first + count, row : row + chunk.rows]
            places = [done[..., i, :].transpose(2, 3) for i in range(m)]
            tile.transform_output(rows_done[:count].unbind(4), places)
    whole = result.view(batch, rows * m, chunk.columns * m, outputs)[:, :height, :width]
    return whole.contiguous().permute(0, 3, 1, 2)


def _cut(images: Tensor, top: int, strip: Tensor, reflect: bool) -> None:
    """Copies the rows of images (B, H, W, I) from ``top`` on, -1 being the border, into the padded ``strip``.

    Pixels of the strip that are beyond the border are 0, as its columns have to be beforehand.
    """
    height, width = images.shape[1:3]
    first, last = max(top, 0), min(top + strip.shape[1], height)
    inner = strip[:, :, 1 : width + 1]
    inner[:, first - top : last - top] = images[:, first:last]
    inner[:, last - top :] = 0
    if top < 0:
        inner[:, 0] = images[:, 1] if reflect else 0
    if reflect:
        if last == height and height - top < strip.shape[1]:
            inner[:, height - top] = images[:, height - 2]
        strip[:, :, 0] = strip[:, :, 2]
        strip[:, :, width + 1] = strip[:, :, width - 1]


def _taps(x: Tensor, dim: int, tile: Tile) -> list[Tensor]:
    """Returns what each of the m + 2 inputs of a row of overlapping tiles along ``dim`` is."""
    count = (x.shape[dim] - 2) // tile.outputs
    steps = [slice(i, i + (count - 1) * tile.outputs + 1, tile.outputs) for i in range(tile.inputs)]
    return [x[(slice(None),) * dim + (step,)] for step in steps]
