"""Scores and maps from latents."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from fastmsflow.ops.likelihood import log_likelihood_maps
from fastmsflow.reference.score_map import upsample
from fastmsflow.scoring import MAP_KINDS, Scores, additive_score_map, anomaly_scores, score_log_likelihoods

SIZE = (32, 48)


def scores_of(z: list[torch.Tensor], size: tuple[int, int]) -> Scores:
    return score_log_likelihoods(log_likelihood_maps(z), size)


def latents(batch: int = 3, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    grids = ((8, 8, 12), (6, 4, 6), (10, 2, 3))
    return [torch.randn(batch, *g, generator=generator, dtype=dtype) * scale for g in grids]


def test_image_score_is_the_mean_of_the_largest_pixels_of_the_multiplicative_map() -> None:
    score, _, mul = anomaly_scores(latents(), SIZE)
    k = int(SIZE[0] * SIZE[1] * 0.03)
    expected = mul.flatten(1).sort(dim=1, descending=True).values[:, :k].mean(dim=1)
    torch.testing.assert_close(score, expected)


def test_maps_follow_their_formulas_on_one_level_at_its_own_size() -> None:
    z = [latents()[0]]
    logp = -0.5 * z[0].square().mean(dim=1)
    _, add, mul = anomaly_scores(z, tuple(logp.shape[1:]))
    peak = logp.amax(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(mul, 1 - (logp - peak).exp())
    torch.testing.assert_close(add, 1 - (logp - peak).exp())


def test_additive_map_is_0_at_the_most_normal_pixel_of_each_image() -> None:
    scores = scores_of(latents(), SIZE)
    assert scores.score_map_add.amin(dim=(1, 2)).tolist() == [0, 0, 0]
    highest = scores.likelihood_add.amax(dim=(1, 2))
    assert len(highest.unique()) == 3
    for image, top in enumerate(highest):
        torch.testing.assert_close(scores.score_map_add[image], top - scores.likelihood_add[image])


def test_maps_and_scores_of_an_image_are_the_same_whatever_else_is_in_the_batch() -> None:
    z = latents()
    together, alone = anomaly_scores(z, SIZE), anomaly_scores([level[1:2] for level in z], SIZE)
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one[1:2], other)


def test_an_image_of_nan_spoils_no_map_and_no_score_but_its_own() -> None:
    z = latents()
    spoilt = [level.clone() for level in z]
    for level in spoilt:
        level[1] = float("nan")
    for one, other in zip(anomaly_scores(spoilt, SIZE), anomaly_scores(z, SIZE), strict=True):
        assert one[1].isnan().all()
        assert torch.equal(one[::2], other[::2])


def test_a_map_is_had_by_its_name() -> None:
    scores = scores_of(latents(), SIZE)
    maps = {kind: scores.score_map(kind) for kind in MAP_KINDS}
    assert torch.equal(maps["absolute"], -(scores.log_likelihood + scores.peak[:, None, None]))
    assert torch.equal(maps["additive"], additive_score_map(scores.likelihood_add))
    assert torch.equal(maps["multiplicative"], scores.score_map_mul)


def test_published_score_saturates_on_a_bad_fit_and_the_log_score_does_not() -> None:
    """Latents as a flow gives them that fits badly: thousands of nats from the mode, anomalies further out."""
    generator = torch.Generator().manual_seed(4)
    labels = np.repeat([0, 1], 20)
    z = []
    for channels, height, width in ((8, 8, 12), (6, 4, 6), (10, 2, 3)):
        level = 200 * torch.randn(40, channels, height, width, generator=generator)
        level[20:, :, : height // 2, : width // 2] *= 2
        z.append(level)
    scores = scores_of(z, SIZE)
    assert (scores.score == 1.0).all()
    assert roc_auc_score(labels, scores.score) == 0.5
    assert roc_auc_score(labels, scores.log_score) > 0.95
    assert scores.log_score.isfinite().all()


def test_log_score_orders_as_the_published_score_where_that_does_not_saturate() -> None:
    scores = scores_of(latents(batch=12, scale=0.05), SIZE)
    assert scores.score.argsort().tolist() == scores.log_score.argsort().tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_latents_are_scored_in_float32(dtype: torch.dtype) -> None:
    scores = scores_of(latents(dtype=torch.float32), SIZE)
    low = scores_of([level.to(dtype) for level in latents(dtype=torch.float32)], SIZE)
    assert {part.dtype for part in low} == {torch.float32}
    torch.testing.assert_close(low.score, scores.score, rtol=1e-2, atol=1e-2)


def test_top_share_of_a_tiny_map_is_at_least_one_pixel() -> None:
    score, _, mul = anomaly_scores([latents()[0]], (4, 4))
    torch.testing.assert_close(score, mul.flatten(1).amax(dim=1))


def test_the_log_map_ranks_pixels_where_the_published_map_has_only_ties() -> None:
    scores = scores_of(latents(scale=200), SIZE)
    least = scores.log_likelihood.flatten(1).topk(100, dim=1, largest=False).values
    assert (scores.score_map_mul.flatten(1).topk(100, dim=1).values == 1.0).all()
    assert all(len(row.unique()) == 100 for row in least)


def test_absolute_score_is_the_mean_of_the_least_likely_pixels_of_the_summed_levels() -> None:
    z = latents()
    total = sum(upsample(-0.5 * level.square().mean(dim=1), SIZE) for level in z)
    k = int(SIZE[0] * SIZE[1] * 0.03)
    expected = (-total).flatten(1).topk(k, dim=1).values.mean(dim=1)
    scores = scores_of(z, SIZE)
    torch.testing.assert_close(scores.absolute_score, expected)
    torch.testing.assert_close(scores.absolute_map, -total)


def test_absolute_score_sees_an_image_that_is_strange_all_over_and_the_published_one_does_not() -> None:
    z = [torch.ones_like(level) for level in latents(batch=2)]
    strange = [torch.cat([level[:1], 3 * level[1:]]) for level in z]
    scores = scores_of(strange, SIZE)
    torch.testing.assert_close(scores.log_score, torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(scores.absolute_score, torch.tensor([1.5, 13.5], dtype=torch.float64))
