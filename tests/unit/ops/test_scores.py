"""Likelihood and score maps by the kernels against their twins in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmsflow import InputError
from fastmsflow.kernels import configs
from fastmsflow.kernels.launch import Tile
from fastmsflow.ops import likelihood as ops
from fastmsflow.ops.image_score import image_scores
from fastmsflow.ops.score_map import score_maps
from fastmsflow.reference import likelihood as reference
from fastmsflow.reference.image_score import image_scores as image_scores_twin
from fastmsflow.reference.score_map import score_maps as score_maps_twin
from tests.helpers.ops_parity import DEVICE, LAYOUTS, assert_not_finite_alike, assert_twins, examples, tensor
from tests.helpers.tolerances import OPERATION_CLOSE

LEVELS = [
    [(2, 16, 8, 8), (2, 32, 4, 4), (2, 64, 2, 2)],
    [(3, 24, 12, 20), (3, 40, 6, 10), (3, 112, 3, 5)],
    [(1, 2, 1, 1)],
    [(2, 130, 7, 3), (2, 6, 5, 5)],
]
pytestmark = pytest.mark.usefixtures("poisoned")


def levels(shapes, dtype=torch.float32, layout="channels_last") -> list:
    torch.manual_seed(0)
    return [tensor(shape, dtype, layout) for shape in shapes]


def maps(*z, backend="auto"):
    return ops.log_likelihood_maps(z, backend)


def maps_twin(*z):
    return reference.log_likelihood_maps(z)


@pytest.mark.parametrize("shapes", LEVELS, ids=str)
def test_log_likelihood_maps_equal_float64(shapes) -> None:
    assert_twins(maps, maps_twin, levels(shapes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_only_what_is_stored(dtype: torch.dtype) -> None:
    assert_twins(maps, maps_twin, levels(LEVELS[1], dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout(layout: str) -> None:
    assert_twins(maps, maps_twin, levels(LEVELS[1], layout=layout))


@pytest.mark.parametrize("size", [(48, 80), (7, 5), (1, 1), (33, 130)], ids=str)
@pytest.mark.parametrize("shapes", LEVELS, ids=str)
def test_score_maps_equal_float64(shapes, size: tuple[int, int]) -> None:
    logp = [3 * level for level in reference.log_likelihood_maps(levels(shapes))]

    def ours(*logp, backend):
        return score_maps(logp, size, backend)

    assert_twins(ours, lambda *logp: score_maps_twin(logp, size), logp, gradients=False)


@examples(20)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20), st.integers(1, 70), st.integers(1, 70))
def test_score_maps_of_any_size_equal_float64(batch: int, h: int, w: int, height: int, width: int) -> None:
    torch.manual_seed(0)
    logp = [-torch.rand(batch, h, w, device=DEVICE), -torch.rand(batch, w, h, device=DEVICE)]
    ours, twin = score_maps(logp, (height, width), "triton"), score_maps_twin(logp, (height, width))
    torch.testing.assert_close(ours, twin, **OPERATION_CLOSE)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_nan_and_inf_come_out_where_the_reference_has_them(bad: float) -> None:
    z = levels(LEVELS[1])
    z[1][2, 3, 4, 5] = bad
    assert_not_finite_alike(maps, maps_twin, z)

    def at_image_size(*logp, backend):
        return score_maps(logp, (24, 40), backend)

    assert_not_finite_alike(at_image_size, lambda *logp: score_maps_twin(logp, (24, 40)), maps_twin(*z))


def log_likelihoods(shape, spread: float = 50.0) -> torch.Tensor:
    torch.manual_seed(0)
    level = -spread * torch.rand(shape, device=DEVICE).pow(3)
    return level - level.amax(dim=(1, 2), keepdim=True)


@pytest.mark.parametrize("fraction", [0.03, 0.5, 1.0], ids=str)
@pytest.mark.parametrize("shape", [(2, 48, 80), (3, 7, 5), (1, 1, 1), (1, 200, 210)], ids=str)
def test_image_scores_equal_float64(shape, fraction: float) -> None:
    logp = log_likelihoods(shape)
    for values in (logp, logp.round(), 1e4 * logp, torch.full_like(logp, -0.0)):
        assert_twins(image_scores, image_scores_twin, [values, fraction], gradients=False)


@examples(20)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.floats(1e-30, 1e30))
def test_image_scores_of_any_size_and_scale_equal_pytorchs(
    batch: int, height: int, width: int, fraction: float, spread: float
) -> None:
    logp = log_likelihoods((batch, height, width), spread)
    ours, twin = image_scores(logp, fraction, "triton"), image_scores_twin(logp, fraction)
    torch.testing.assert_close(ours, twin, **OPERATION_CLOSE)


@pytest.mark.slow
def test_an_image_of_many_tiles_is_scored_the_same_whatever_else_is_in_the_batch(monkeypatch) -> None:
    logp = log_likelihoods((3, 48, 80))
    for kernel in ("image_score", "score_map"):
        monkeypatch.setitem(configs.TILES, kernel, {"any": Tile(64, 1)})
    assert_twins(image_scores, image_scores_twin, [logp, 0.03], gradients=False)
    together, alone = image_scores(logp, 0.03, "triton"), image_scores(logp[1:2], 0.03, "triton")
    maps_together, maps_alone = (score_maps([x[:, ::2], x], (48, 80), "triton") for x in (logp, logp[1:2]))
    for all_images, one in zip((*together, *maps_together), (*alone, *maps_alone), strict=True):
        assert torch.equal(all_images[1:2], one)


@pytest.mark.parametrize("bad", [float("nan"), -float("inf")], ids=str)
def test_nan_and_inf_count_among_the_least_likely_pixels(bad: float) -> None:
    logp = log_likelihoods((2, 9, 11))
    logp[1, 3, 4] = bad
    assert_not_finite_alike(image_scores, image_scores_twin, [logp, 0.03])


def test_a_share_above_one_is_refused() -> None:
    for backend in ("triton", "torch"):
        with pytest.raises(InputError, match="at most 1"):
            image_scores(log_likelihoods((1, 3, 5)), 1.5, backend)
