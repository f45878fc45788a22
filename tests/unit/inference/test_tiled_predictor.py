"""Tests TiledPredictor and the blending of tiles, against the formulas written out."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmsflow import InputError, MSFlow
from fastmsflow.data.image_views import scaled_image
from fastmsflow.inference import TiledPredictor
from fastmsflow.inference.tiled_predictor import blended_scores
from fastmsflow.reference.image_score import image_scores as reference
from fastmsflow.scoring import Scores
from fastmsflow.tiling import Tiling
from tests.helpers.tiny_model import tiny_model
from tests.helpers.tolerances import BLENDED

GRIDS = (8, 4, 2)


class TilesOfOneColor:
    """A model whose log-likelihoods are ``of_mean`` of the tile's mean; it records what it is given."""

    device = torch.device("cpu")

    def __init__(self, of_mean: Any) -> None:
        self.of_mean = of_mean
        self.batches: list[int] = []
        self.offsets: list[Tensor] = []

    def features(self, images: Tensor) -> list[Tensor]:
        self.batches.append(len(images))
        return [images]

    def log_likelihoods(self, features: Sequence[Tensor], offsets: Tensor | None) -> list[Tensor]:
        if offsets is not None:
            self.offsets.append(offsets)
        mean = features[0].mean(dim=(1, 2, 3))
        return [self.of_mean(mean)[:, None, None].expand(-1, side, side).contiguous() for side in GRIDS]


def images_of(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, *size, generator=generator) for size in sizes]


def scored(images: Sequence[Tensor], tiling: Tiling, model: Any, batch_size: int = 4) -> list[Scores]:
    given = (scaled_image(image, tiling, "x") for image in images)
    return [scores for (scores,) in blended_scores(given, tiling, [model], batch_size=batch_size)]


@pytest.mark.parametrize("inference", [False, True])
def test_images_of_one_tile_have_exactly_the_models_prediction(inference: bool) -> None:
    model = tiny_model().eval()
    model = model.for_inference() if inference else model
    images = torch.stack(images_of((32, 32), (32, 32), (32, 32)))
    for given, expected in zip(TiledPredictor(model, 32).predict(images), model.predict(images), strict=True):
        assert torch.equal(given, expected)


@pytest.mark.parametrize("size", [(32, 32), (40, 50)])
def test_the_models_backend_scores_the_blended_map(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    backends: list[str] = []

    def recorded(log_likelihood: Tensor, fraction: float, backend: str = "auto") -> tuple[Tensor, Tensor]:
        backends.append(backend)
        return reference(log_likelihood, fraction)

    for module in ("fastmsflow.scoring", "fastmsflow.inference.blended_maps"):
        monkeypatch.setattr(f"{module}.image_scores", recorded)
    TiledPredictor(tiny_model(backend="torch").eval(), 32).predict(torch.stack(images_of(size)))
    assert backends == ["torch"]


@pytest.mark.parametrize("size", [(40, 70), (32, 33), (20, 90), (45, 45)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.7])
def test_a_constant_map_stays_constant(size: tuple[int, int], overlap: float) -> None:
    model = TilesOfOneColor(lambda mean: torch.full_like(mean, -2.5))
    (scores,) = scored([torch.rand(3, *size)], Tiling(32, overlap, scale=1.0 if min(size) >= 32 else 2.0), model)
    for found, constant in ((scores.absolute_map, 7.5), (scores.likelihood_add, 3.0), (scores.log_likelihood, 0.0)):
        assert found.shape == (1, *size)
        assert (found - constant).abs().max() <= BLENDED * 7.5
    assert scores.absolute_score.item() == pytest.approx(7.5, rel=BLENDED)


@pytest.mark.parametrize("top_share", [0.03, 0.5])
def test_scores_are_the_formulas_of_the_blended_map(top_share: float) -> None:
    tiling = Tiling(32, 0.25, top_share=top_share)
    model, (image,) = tiny_model().eval(), images_of((50, 77))
    (scores,) = scored([image], tiling, model)
    with torch.no_grad():
        tiles = [image[None, :, top : top + 32, left : left + 32] for top, left in tiling.places((50, 77))]
        logp = [model.flow.log_likelihoods(model.features(tile)) for tile in tiles]

    def up(level: Tensor) -> Tensor:
        return F.interpolate(level[:, None], size=(32, 32), mode="bilinear", align_corners=True)[0, 0].double()

    # The windows, from their definition: a squared sine that rises over the widest overlap, divided by the sum.
    def windows(length: int) -> np.ndarray:
        starts = sorted({place[length == 77] for place in tiling.places((50, 77))})
        ramp = max(a + 32 - b for a, b in pairwise(starts))
        one = np.array([math.sin(math.pi / 2 * min(1, (i + 0.5) / ramp)) ** 2 for i in range(32)])
        shares = np.zeros((len(starts), length))
        for share, start in zip(shares, starts, strict=True):
            share[start : start + 32] = one * one[::-1]
        return shares / shares.sum(axis=0)

    rows, columns = windows(50), windows(77)
    tops = [max(level.max() for level in levels) for levels in zip(*logp, strict=True)]
    total, additive = torch.zeros(50, 77).double(), torch.zeros(50, 77).double()
    for number, ((top, left), levels) in enumerate(zip(tiling.places((50, 77)), logp, strict=True)):
        row, column = divmod(number, len(columns))
        weight = torch.from_numpy(np.outer(rows[row], columns[column]))[top : top + 32, left : left + 32]
        total[top : top + 32, left : left + 32] += weight * sum(map(up, levels))
        likelihoods = [up((level - highest).exp()) for level, highest in zip(levels, tops, strict=True)]
        additive[top : top + 32, left : left + 32] += weight * sum(likelihoods)
    lowest = (-(total - total.max())).flatten().sort(descending=True).values[: int(50 * 77 * top_share)]
    expected = {
        "log_likelihood": total - total.max(),
        "likelihood_add": additive,
        "peak": total.max(),
        "absolute_map": -total,
        "log_score": lowest.mean(),
        "score": (1 - (-lowest).exp()).mean(),
        "absolute_score": lowest.mean() - total.max(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(scores, name)[0].double(), value, rtol=2e-5, atol=2e-5)


def test_no_maximum_is_taken_of_a_tile() -> None:
    # A whole tile of lower likelihood stays lower in every map.
    image = torch.zeros(3, 32, 96)
    image[:, :, 64:] = 1
    (scores,) = scored([image], Tiling(32, 0.0), TilesOfOneColor(lambda mean: -mean))
    assert scores.absolute_map[0, :, 70:].min() > 2.9
    assert scores.absolute_map[0, :, :60].max() < 0.1
    assert scores.score_map_add[0, :, 70:].min() > 1.8
    assert scores.absolute_score.item() == pytest.approx(3, rel=BLENDED)


def test_tiles_of_several_images_share_batches_and_results_do_not_depend_on_them() -> None:
    images = images_of((32, 50), (90, 70), (32, 32), (33, 40))
    tiling = Tiling(32)
    model = TilesOfOneColor(lambda mean: -mean)
    scored(images, tiling, model, batch_size=5)
    count = sum(len(tiling.places(image.shape[1:])) for image in images)
    assert model.batches == [5] * (count // 5) + [count % 5] * bool(count % 5)
    real = tiny_model().eval()
    alone = [next(TiledPredictor(real, 32, batch_size=1).scores([image])) for image in images]
    for given, expected in zip(TiledPredictor(real, 32, batch_size=5).scores(images), alone, strict=True):
        for one, other in zip(given, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [0.5, 1.3, 2.0])
def test_maps_have_the_images_size_at_any_scale(scale: float) -> None:
    prediction = TiledPredictor(tiny_model().eval(), 32, scale=scale).predict(
        torch.stack(images_of((70, 99), (70, 99)))
    )
    assert prediction.score_map_add.shape == prediction.score_map_mul.shape == (2, 70, 99)
    assert prediction.absolute_score.shape == (2,)
    assert all(value.isfinite().all() for value in prediction)


def test_images_of_uint8_have_the_scores_of_floats() -> None:
    image = (images_of((40, 70))[0] * 255).round().to(torch.uint8)
    predictor = TiledPredictor(tiny_model().eval(), 32)
    for one, other in zip(predictor.scores([image]), predictor.scores([image / 255]), strict=True):
        torch.testing.assert_close(one.absolute_map, other.absolute_map)


@pytest.mark.parametrize("position", ["tile", "image"])
def test_a_model_is_given_the_places_of_its_tiles_if_it_is_to_have_them(position: Any) -> None:
    tiling = Tiling(32, 0.5, position=position)
    model = TilesOfOneColor(lambda mean: -mean)
    scored(images_of((32, 50), (40, 32)), tiling, model)
    given = torch.cat(model.offsets).tolist() if model.offsets else None
    expected = [[0, 0], [0, 0.5], [0, 18 / 32], [0, 0], [8 / 32, 0]]
    assert given == (expected if position == "image" else None)


def test_a_place_in_the_image_changes_what_a_tile_scores() -> None:
    model, (image,) = tiny_model().eval(), images_of((32, 64))
    image[:, :, 32:] = image[:, :, :32]
    model.tiling = Tiling(32, 0.0, position="image")
    (scores,) = TiledPredictor(model, 32, 0.0).scores([image])
    left, right = scores.absolute_map[0].split(32, dim=1)
    assert (left - right).abs().max() > 1e-3
    model.tiling = None
    (scores,) = TiledPredictor(model, 32, 0.0).scores([image])
    left, right = scores.absolute_map[0].split(32, dim=1)
    torch.testing.assert_close(left, right)


def test_a_tile_of_another_size_than_the_models_images_is_computed_by_a_copy() -> None:
    model = tiny_model().eval()
    predictor = TiledPredictor(model, 64)
    assert (model.image_size, predictor.model.image_size) == ((32, 32), (64, 64))
    assert predictor.predict(torch.rand(1, 3, 64, 80)).score_map_add.shape == (1, 64, 80)
    for name, value in model.state_dict().items():
        assert torch.equal(value, predictor.model.state_dict()[name])
    with pytest.raises(
        InputError, match=r"for_inference made this model for images of .* give the one that it was made"
    ):
        TiledPredictor(model.for_inference(), 64)


def test_a_tile_that_the_backbone_does_not_take_is_one_line() -> None:
    model = MSFlow("maxvit_tiny_tf_224", pretrained=False, image_size=(224, 224), blocks=(1, 1, 1))
    with pytest.raises(InputError, match=r"^maxvit_tiny_tf_224 takes no images of 100x100 .*sizes that work: "):
        TiledPredictor(model, 100)


def test_an_image_with_nan_has_scores_of_nan_and_leaves_the_others() -> None:
    images = torch.stack(images_of((40, 50), (40, 50)))
    expected = TiledPredictor(tiny_model().eval(), 32).predict(images)
    images[0, 0, 5, 5] = float("nan")
    with pytest.warns(Warning, match="NaN or infinite"):
        found = TiledPredictor(tiny_model().eval(), 32).predict(images)
    assert found.absolute_score[0].isnan()
    torch.testing.assert_close(found.absolute_score[1], expected.absolute_score[1])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 40, 40, dtype=torch.int64), "floating ones in"),
        (torch.zeros(3, 40, 40), r"give \(B, 3, H, W\)"),
        (torch.zeros(0, 3, 40, 40), "at least one image"),
        (torch.full((1, 3, 40, 40), 100.0), "give .0, 1."),
        (torch.zeros(1, 3, 20, 40), "image 0: 40x20 pixels, times a scale of 1, are 40x20, less than 32 on a side"),
    ],
)
def test_images_that_cannot_be_predicted_are_refused(images: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TiledPredictor(tiny_model().eval(), 32).predict(images)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(1, 3, 40, 40), r"image 1 has shape \(1, 3, 40, 40\); give a tensor \(3, H, W\), floating in "),
        (torch.zeros(40, 40), r"image 1 has shape \(40, 40\); give a tensor \(3, H, W\), floating in "),
        (np.zeros((3, 40, 40), np.float32), r"image 1 is a ndarray; give a tensor \(3, H, W\), floating in "),
        (torch.zeros(3, 40, 40, dtype=torch.int64), r"image 1 has dtype torch.int64; give floating pixels in "),
    ],
)
def test_an_image_of_a_row_that_cannot_be_scored_is_named(image: Any, message: str) -> None:
    images = iter([torch.zeros(3, 32, 32), image])
    with pytest.raises(InputError, match=f"^{message}"):
        list(TiledPredictor(tiny_model().eval(), 32).scores(images))


def test_the_callers_model_stays_in_the_mode_of_training() -> None:
    model = tiny_model().train()
    TiledPredictor(model, 32).predict(torch.rand(1, 3, 40, 40))
    assert model.training
