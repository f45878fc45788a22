"""Metrics of pixels beside those of ADEval, where both have the same definition."""

from collections.abc import Iterator

import adeval
import numpy as np
import pytest
from adeval.au_pro import calculate_au_pro
from adeval.metrics import compute_pixelwise_retrieval_metrics
from scipy import ndimage

from fastmsflow.metrics import Bins, PixelHistogram, aupro, auroc, f1_at, f1_max
from tests.helpers.tolerances import ADEVAL_POINTS, ADEVAL_STRIPS


@pytest.fixture(autouse=True)
def trapz(monkeypatch: pytest.MonkeyPatch) -> None:
    """ADEval calls a function of numpy by the name that numpy 2.4 has removed."""
    if not hasattr(np, "trapz"):
        monkeypatch.setattr(np, "trapz", np.trapezoid, raising=False)


def images() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Masks, with regions that touch at corners only, and maps that find most of them."""
    generator = np.random.default_rng(5)
    for _ in range(6):
        mask = ndimage.binary_dilation(generator.random((96, 128)) < 0.002, iterations=3)
        mask[:4, :4] = mask[4:9, 4:9] = True
        noise = ndimage.gaussian_filter(generator.normal(size=mask.shape), 1.5) * 4
        yield mask, (noise + 2.5 * ndimage.gaussian_filter(mask.astype(float), 1)).astype(np.float32)


@pytest.fixture(scope="module")
def masks() -> np.ndarray:
    return np.stack([mask for mask, _ in images()])


@pytest.fixture(scope="module")
def maps() -> np.ndarray:
    return np.stack([score_map for _, score_map in images()])


def test_auroc_and_aupro_to_30_percent_are_adevals(masks: np.ndarray, maps: np.ndarray) -> None:
    their_auroc, _, their_aupro = adeval.auroc_aupr_aupro(list(maps), list(masks.astype(np.uint8)))
    assert auroc(masks, maps) == pytest.approx(their_auroc, abs=ADEVAL_STRIPS)
    assert aupro(masks, maps) == pytest.approx(their_aupro, abs=ADEVAL_STRIPS)


def test_adeval_with_more_strips_comes_closer(masks: np.ndarray, maps: np.ndarray) -> None:
    errors = []
    for strips in (100, 10_000):
        theirs = adeval.auroc_aupr_aupro(list(maps), list(masks.astype(np.uint8)), nstrips=strips)
        errors.append(abs(aupro(masks, maps) - theirs[2]))
    assert errors[1] < errors[0]
    assert errors[1] <= ADEVAL_STRIPS / 10


@pytest.mark.parametrize("limit", [0.05, 0.3])
def test_aupro_is_that_of_the_reference_that_adeval_keeps(limit: float, masks: np.ndarray, maps: np.ndarray) -> None:
    theirs, _ = calculate_au_pro(list(masks.astype(int)), list(maps), integration_limit=limit, num_thresholds=5000)
    assert aupro(masks, maps, limit) == pytest.approx(theirs, abs=ADEVAL_POINTS)
    histogram = PixelHistogram(Bins.from_sample(masks, maps))
    histogram.update(masks, maps)
    found = histogram.aupro(limit)
    assert found.low - ADEVAL_POINTS <= theirs <= found.high + ADEVAL_POINTS


def test_the_best_seg_f1_is_at_the_threshold_that_adeval_finds_best(masks: np.ndarray, maps: np.ndarray) -> None:
    theirs = compute_pixelwise_retrieval_metrics(list(maps), list(masks))
    at = theirs["optimal_threshold"]
    # A pixel at the threshold itself is defective for ADEval.
    assert f1_at(masks, maps, float(np.nextafter(at, np.float32(-np.inf)))) == pytest.approx(
        f1_max(masks, maps), abs=1e-12
    )
    above = maps >= at
    assert (theirs["optimal_fpr"], theirs["optimal_fnr"]) == ((above & ~masks).mean(), (~above & masks).mean())
    assert auroc(masks, maps) == pytest.approx(theirs["auroc"], abs=1e-12)
