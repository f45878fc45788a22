"""Winograd's algorithm against the direct convolution in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmsflow.cpu import winograd
from fastmsflow.cpu.winograd import F2, F4, Tile

TILES = pytest.mark.parametrize("tile", [F2, F4], ids=["F2", "F4"])


def by_winograd(x: Tensor, weight: Tensor, bias: Tensor | None, tile: Tile, reflect: bool = False) -> Tensor:
    filters = winograd.transform_filters(weight, tile)
    places = None if bias is None else winograd.transform_bias(bias, tile)

    def product(tiles: Tensor) -> Tensor:
        return F.conv2d(tiles[:, :, None, None], filters, places, groups=tile.places).flatten(1)

    chunk = winograd.plan_chunk(x.shape, len(weight), tile)
    return winograd.convolve(x, product, len(weight), tile=tile, chunk=chunk, reflect=reflect)


def operands(batch: int, inputs: int, outputs: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    shapes = ((batch, inputs, *grid), (outputs, inputs, 3, 3), (outputs,))
    x, weight, bias = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
    return x, weight, bias


@TILES
@pytest.mark.parametrize("reflect", [False, True], ids=["zeros", "reflected"])
@pytest.mark.parametrize(
    ("batch", "inputs", "outputs", "grid"),
    [(1, 24, 40, (3, 5)), (2, 40, 24, (7, 9)), (3, 5, 112, (16, 16)), (4, 3, 2, (2, 2)), (5, 8, 16, (12, 33))],
)
def test_the_algorithm_is_the_convolution(
    batch: int, inputs: int, outputs: int, grid: tuple[int, int], reflect: bool, tile: Tile
) -> None:
    x, weight, bias = operands(batch, inputs, outputs, grid)
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect" if reflect else "constant")
    expected = F.conv2d(padded, weight, bias)
    found = by_winograd(x, weight, bias, tile, reflect)
    # In float64 an error of a formula cannot hide in rounding.
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert found.is_contiguous(memory_format=torch.channels_last)


@TILES
def test_strips_of_a_large_grid_are_those_of_the_whole(tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = operands(2, 6, 7, (50, 41))
    whole = by_winograd(x, weight, bias, tile)
    monkeypatch.setattr(winograd, "CHUNK_BYTES", 20_000)
    chunk = winograd.plan_chunk(x.shape, 7, tile)
    assert 0 < chunk.rows < 50 / tile.outputs / 3
    torch.testing.assert_close(by_winograd(x, weight, bias, tile), whole, rtol=1e-13, atol=1e-13)


def test_filters_transformed_in_parts_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = operands(1, 20, 13, (1, 1))[1]
    whole = winograd.transform_filters(weight, F4)
    monkeypatch.setattr(winograd, "PART_BYTES", 10_000)
    assert torch.equal(winograd.transform_filters(weight, F4), whole)


def test_a_small_grid_s_images_share_a_product() -> None:
    one, some, many = (winograd.plan_chunk((batch, 64, 16, 16), 64, F4) for batch in (1, 3, 8))
    assert (one.images, one.tiles) == (1, 16)
    assert (some.images, some.tiles) == (many.images, many.tiles) == (4, 64)


def test_no_buffer_is_larger_than_a_chunk_may_be() -> None:
    chunk = winograd.plan_chunk((2, 128, 512, 512), 192, F4)
    assert 4 * F4.places * chunk.tiles * 192 <= winograd.CHUNK_BYTES * 1.2
