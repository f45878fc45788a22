"""AUPRO against brute force and an 800-threshold sweep, the published PRO against its definition, the curve, errors,
speed."""

import itertools
import time
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage
from skimage.measure import label
from sklearn.metrics import auc

from fastmsflow.errors import InputError
from fastmsflow.metrics import aupro, aupro_published, pro_curve


def regions_by_flood(masks: np.ndarray) -> list[list[tuple[int, int, int]]]:
    """8-connected components, pixel by pixel."""
    left = {tuple(map(int, p)) for p in np.argwhere(masks)}
    regions = []
    while left:
        region, front = [], [left.pop()]
        while front:
            n, y, x = front.pop()
            region.append((n, y, x))
            near = {(n, y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            front += near
        regions.append(region)
    return regions


def area_up_to(points: list[tuple[float, float]], limit: float) -> float:
    """Trapezoids, the last one cut at ``limit``, divided by ``limit``."""
    area = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 >= limit:
            break
        if x1 > limit:
            x1, y1 = limit, y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
        area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


def aupro_by_hand(masks: np.ndarray, maps: np.ndarray, limit: float) -> float:
    regions = regions_by_flood(masks)
    points = [(0.0, 0.0)]
    for threshold in np.unique(maps)[::-1]:
        pro = np.mean([np.mean([maps[p] >= threshold for p in region]) for region in regions])
        points.append((float(np.mean(maps[~masks] >= threshold)), float(pro)))
    return area_up_to(points, limit)


def aupro_by_sweep(masks: np.ndarray, maps: np.ndarray, limit: float, steps: int = 800) -> float:
    """Evenly spaced thresholds from the maximum to the minimum."""
    structure = np.zeros((3, 3, 3))
    structure[1] = 1
    numbered, count = ndimage.label(masks, structure)
    points = [(0.0, 0.0)]
    for threshold in np.linspace(maps.max(), maps.min(), steps):
        above = maps >= threshold
        pro = ndimage.mean(above, numbered, range(1, count + 1)).mean()
        points.append((float(above[~masks].mean()), float(pro)))
    return area_up_to(points, limit)


SHAPE = (2, 4, 5)
MASKS = arrays(bool, SHAPE)
MAPS = arrays(np.float32, SHAPE, elements=st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]))


@given(MASKS, MAPS, st.sampled_from([0.05, 0.3, 0.5, 1.0]))
@settings(max_examples=150, deadline=None)
def test_equals_brute_force_with_many_ties(masks: np.ndarray, maps: np.ndarray, limit: float) -> None:
    assume(masks.any() and not masks.all())
    assert aupro(masks, maps, limit) == pytest.approx(aupro_by_hand(masks, maps, limit), abs=1e-12)


@given(st.integers(0, 10_000), st.sampled_from([0.1, 0.3, 1.0]))
@settings(max_examples=30, deadline=None)
def test_equals_brute_force_without_ties(seed: int, limit: float) -> None:
    rng = np.random.default_rng(seed)
    masks = rng.random((2, 6, 7)) < 0.3
    maps = rng.normal(size=masks.shape) + masks
    assert aupro(masks, maps, limit) == pytest.approx(aupro_by_hand(masks, maps, limit), abs=1e-12)


def blobs(regions: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Smooth noise in [0, 1) that is higher in ``regions`` squares, of one size or many."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((4, 64, 64), dtype=bool)
    for i in range(regions):
        n, cell = i % 4, i // 4
        y, x, side = 16 * (cell // 4), 16 * (cell % 4), 2 + i % 11
        masks[n, y : y + side, x : x + side] = True
    maps = ndimage.gaussian_filter(rng.normal(size=masks.shape) + 1.5 * masks, (0, 1, 1))
    return masks, maps.astype(np.float32)


@pytest.mark.parametrize("regions", [1, 5, 64])
@pytest.mark.parametrize("limit", [0.3, 1.0])
def test_close_to_a_sweep_of_800_thresholds(regions: int, limit: float) -> None:
    masks, maps = blobs(regions)
    assert aupro(masks, maps, limit) == pytest.approx(aupro_by_sweep(masks, maps, limit), abs=1e-3)


def published_by_hand(masks: np.ndarray, maps: np.ndarray, limit: float, steps: int) -> float | None:
    """The published script's PRO as its definition says it, threshold by threshold."""
    low, high = maps.min(), maps.max()
    if low == high:
        return None
    regions = [(n, numbered == r) for n, numbered in enumerate(map(label, masks)) for r in range(1, numbered.max() + 1)]
    points = []
    for threshold in np.arange(low, high, (high - low) / steps):
        if threshold < high:
            above = maps > threshold
            points.append((above[~masks].mean(), np.mean([above[n][region].mean() for n, region in regions])))
    below_limit = np.array([point for point in points if point[0] < limit]).reshape(-1, 2)
    if len(below_limit) < 2 or below_limit[0, 0] == below_limit[-1, 0]:
        return None
    rates = (below_limit[:, 0] - below_limit[:, 0].min()) / (below_limit[:, 0].max() - below_limit[:, 0].min())
    return auc(rates, below_limit[:, 1])


# Maps as models may make them: name -> noise in 0 to 1 that is higher in defects -> map.
PUBLISHED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "continuous": lambda x: x,
    "below 0 and above": lambda x: 3 * x - 1,
    "20 levels": lambda x: (20 * x).round() / 20,
    "saturated": lambda x: 1 - np.exp(-200 * x),
    "one value": np.zeros_like,
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("limit", "steps"), [(0.3, 800), (0.1, 800), (1.0, 100), (0.3, 4)])
def test_the_published_pro_is_that_of_its_definition(name: str, dtype: type, limit: float, steps: int) -> None:
    masks, noise = blobs(5)
    maps = PUBLISHED[name]((noise - noise.min()) / np.ptp(noise)).astype(dtype)
    expected = published_by_hand(masks, maps, limit, steps)
    assert aupro_published(masks, maps, limit, steps) == (
        None if expected is None else pytest.approx(expected, abs=1e-12)
    )


@given(MASKS, MAPS, st.sampled_from([0.05, 0.3, 1.0]), st.sampled_from([1, 2, 7, 800]))
@settings(max_examples=150, deadline=None)
def test_the_published_pro_of_few_pixels_is_that_of_its_definition(
    masks: np.ndarray, maps: np.ndarray, limit: float, steps: int
) -> None:
    assume(masks.any() and not masks.all())
    expected, found = published_by_hand(masks, maps, limit, steps), aupro_published(masks, maps, limit, steps)
    assert found == (None if expected is None else pytest.approx(expected, abs=1e-12))


def test_the_published_pro_is_not_defined_where_too_few_points_are_left() -> None:
    masks, maps = blobs(5)
    assert aupro_published(masks, np.ones_like(maps)) is None
    # More than 0.3 of the good pixels hold the highest value, so no threshold below it leaves fewer.
    assert aupro_published(masks, (maps > np.quantile(maps, 0.5)).astype(np.float32)) is None
    # Two values, so every threshold finds the same pixels: many points, all in one place.
    assert aupro_published(masks, masks.astype(np.float32)) is None
    assert aupro_published(masks, np.where(masks, np.inf, maps)) is None


def test_the_published_pro_needs_a_threshold() -> None:
    masks, maps = blobs(5)
    for thresholds in (0, -1):
        with pytest.raises(InputError, match=f"thresholds is {thresholds}; it must be a whole number, 1 or more"):
            aupro_published(masks, maps, thresholds=thresholds)


def test_the_published_pro_is_close_to_the_exact_area_where_maps_spread_well_and_not_where_they_saturate() -> None:
    masks, maps = blobs(5)
    assert aupro_published(masks, maps) == pytest.approx(aupro(masks, maps), abs=0.01)
    saturated = PUBLISHED["saturated"]((maps - maps.min()) / np.ptp(maps))
    assert abs((aupro_published(masks, saturated) or 0) - aupro(masks, saturated)) > 0.05


def test_areas_are_plain_numbers_which_the_state_of_a_run_can_hold() -> None:
    masks = np.zeros((1, 4, 4), bool)
    masks[0, 0] = True
    maps = np.linspace(0, 1, 16).reshape(1, 4, 4)
    assert {type(area(masks, maps, 0.5)) for area in (aupro, aupro_published)} == {float}


def test_perfect_inverted_constant() -> None:
    masks, _ = blobs(7)
    assert aupro(masks, masks.astype(np.float32)) == pytest.approx(1.0, abs=1e-12)
    assert aupro(masks, -masks.astype(np.float32)) == 0.0
    # One threshold, so the curve is the diagonal: its area up to the limit is limit**2 / 2.
    assert aupro(masks, np.zeros(masks.shape), 0.3) == pytest.approx(0.15, abs=1e-12)
    assert aupro(masks, np.zeros(masks.shape), 1.0) == pytest.approx(0.5, abs=1e-12)


def test_each_region_counts_the_same() -> None:
    masks = np.zeros((1, 8, 8), dtype=bool)
    masks[0, 0, 0] = True
    masks[0, 4:, 4:] = True
    maps = np.zeros((1, 8, 8))
    maps[0, 0, 0] = 2.0
    maps[0, :4, 4:] = 1.0  # false positives; the large region is never told from the rest
    good = 64 - 17
    x1 = 16 / good
    expected = (0.5 * 0.3 if x1 > 0.3 else x1 * 0.5) / 0.3
    assert aupro(masks, maps, 0.3) == pytest.approx(expected, abs=1e-12)


def test_diagonal_neighbours_are_one_region_images_are_apart() -> None:
    masks = np.zeros((2, 4, 4), dtype=bool)
    masks[0, 0, 0] = masks[0, 1, 1] = True  # one region by its corner
    masks[1, 0, 0] = True  # the next image, so another one
    maps = np.zeros((2, 4, 4))
    maps[0, 0, 0] = 1.0
    maps[masks] += 1.0
    maps[0, 0, 0] = -1.0
    # PRO is 3/4 before the first false positive, and until the lowest value (FPR 1) is passed.
    assert aupro(masks, maps, 0.5) == pytest.approx(0.75, abs=1e-12)


def test_strictly_increasing_transform_changes_nothing() -> None:
    masks, maps = blobs(9)
    maps = maps.round(1).astype(np.float64)
    assert aupro(masks, np.exp(maps) * 5 + 1) == aupro(masks, maps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_takes_torch_tensors(dtype: torch.dtype) -> None:
    masks, maps = blobs(5)
    tensor = torch.from_numpy(maps).to(dtype)
    assert aupro(torch.from_numpy(masks), tensor) == aupro(masks, tensor.float().numpy())


def test_leaves_its_arguments_alone() -> None:
    masks, maps = blobs(5)
    before = maps.copy()
    aupro(masks, maps)
    assert np.array_equal(maps, before)


@given(MASKS, MAPS, st.sampled_from([0.05, 0.3, 1.0]), st.sampled_from([2, 20, 200]))
@settings(max_examples=100, deadline=None)
def test_curve_encloses_the_area(masks: np.ndarray, maps: np.ndarray, limit: float, points: int) -> None:
    assume(masks.any() and not masks.all())
    fpr, pro = pro_curve(masks, maps, limit, points)
    assert fpr.shape == pro.shape == (points,)
    assert (np.diff(fpr) >= 0).all() and (np.diff(pro) >= 0).all()
    assert (fpr[0], pro[0]) == (0, 0) and fpr[-1] == pytest.approx(limit)
    area = area_up_to([*zip(fpr, pro, strict=True)], limit)
    assert area == pytest.approx(aupro(masks, maps, limit), abs=0.5 / (points - 1) + 1e-12)


@pytest.mark.parametrize("limit", [0.3, 1.0])
def test_curve_of_many_thresholds_is_close(limit: float) -> None:
    masks, maps = blobs(64)
    assert area_up_to([*zip(*pro_curve(masks, maps, limit), strict=True)], limit) == pytest.approx(
        aupro(masks, maps, limit), abs=1e-4
    )


def test_curve_passes_through_each_threshold() -> None:
    masks, maps = blobs(5)
    above = maps >= np.quantile(maps, 0.9)
    structure = np.zeros((3, 3, 3))
    structure[1] = 1
    numbered, count = ndimage.label(masks, structure)
    fpr, pro = pro_curve(masks, maps, points=2000)
    expected = ndimage.mean(above, numbered, range(1, count + 1)).mean()
    assert np.interp(above[~masks].mean(), fpr, pro) == pytest.approx(expected, abs=1e-3)


def test_curve_needs_two_points() -> None:
    with pytest.raises(InputError, match="points is 1"):
        pro_curve(MASK, np.zeros((1, 4, 4)), points=1)


MASK = np.eye(4, dtype=bool)[None]


@pytest.mark.parametrize(
    ("masks", "maps", "limit", "says"),
    [
        (np.zeros((1, 4, 4), bool), np.zeros((1, 4, 4)), 0.3, "16 and 0"),
        (np.ones((1, 4, 4), bool), np.zeros((1, 4, 4)), 0.3, "0 and 16"),
        (MASK, np.zeros((1, 4, 5)), 0.3, "shape"),
        (MASK[0], np.zeros((4, 4)), 0.3, r"\(N, H, W\)"),
        (MASK, np.where(MASK, np.nan, 0), 0.3, "NaN"),
        (MASK, np.where(MASK, 0, np.nan), 0.3, "NaN"),
        (MASK * 255, np.zeros((1, 4, 4)), 0.3, "0 and 1"),
        (MASK, np.zeros((1, 4, 4)), 0.0, "fpr_limit"),
        (MASK, np.zeros((1, 4, 4)), 1.5, "fpr_limit"),
        (MASK, np.zeros((1, 4, 4)), float("nan"), "fpr_limit"),
    ],
)
def test_errors(masks: np.ndarray, maps: np.ndarray, limit: float, says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        aupro(masks, maps, limit)
    assert "\n" not in str(error.value)


def test_200_maps_of_512_in_time_and_memory() -> None:
    rng = np.random.default_rng(3)
    maps = rng.random((200, 512, 512), dtype=np.float32)
    masks = np.zeros(maps.shape, dtype=bool)
    masks[100:, 100:200, 200:280] = True
    masks[100:, 300:310, 300:310] = True
    maps[masks] += 0.5
    tracemalloc.start()
    started = time.perf_counter()
    value = aupro(masks, maps)
    seconds = time.perf_counter() - started
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Uniform against uniform + 0.5: at rate x, PRO is 0.5 + x; its mean over [0, 0.3] is 0.65.
    assert value == pytest.approx(0.65, abs=2e-3)
    assert seconds <= 10
    assert peak <= 2 * maps.nbytes
