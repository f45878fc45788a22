"""The recorded outputs of the reference implementation, by plain PyTorch."""

from collections.abc import Iterator

import pytest
import torch

from fastmsflow import backend
from fastmsflow.metrics import aupro_published, auroc
from fastmsflow.scoring import score_log_likelihoods
from tests.helpers.error_log import assert_within
from tests.helpers.ops_parity import DEVICE
from tests.helpers.parity import (
    NAMES,
    allowed,
    golden_errors,
    golden_flow,
    golden_gradients,
    golden_inputs,
    golden_trajectory,
    relative_error,
)
from tests.helpers.paths import GOLDEN
from tests.helpers.tolerances import (
    GOLDEN_FLOAT32,
    GOLDEN_FLOAT64,
    GOLDEN_LOG_DET_PER_ELEMENT,
    GOLDEN_SCORES,
    GOLDEN_TRAJECTORY,
    ROUND_TRIP_FLOAT64,
)

TOLERANCE = {torch.float32: allowed(GOLDEN_FLOAT32), torch.float64: GOLDEN_FLOAT64}
each_recording = pytest.mark.parametrize("name", NAMES)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])


@pytest.fixture(autouse=True)
def plain_pytorch() -> Iterator[None]:
    with backend.use("torch"):
        yield


@each_recording
@each_dtype
def test_every_recorded_output_is_reproduced(name: str, dtype: torch.dtype) -> None:
    errors = golden_errors(name, dtype)
    per_element = "parallel log-det, nats an element"
    bounds = dict.fromkeys(errors, TOLERANCE[dtype]) | {per_element: allowed(GOLDEN_LOG_DET_PER_ELEMENT)}
    assert_within((what, error, bounds[what]) for what, error in errors.items())


@each_recording
@each_dtype
def test_every_recorded_gradient_is_reproduced(name: str, dtype: torch.dtype) -> None:
    assert_within((what, error, TOLERANCE[dtype]) for what, error in golden_gradients(name, dtype).items())


@each_recording
@each_dtype
def test_recorded_training_steps_are_reproduced(name: str, dtype: torch.dtype) -> None:
    for step, (loss_error, norm_error) in enumerate(golden_trajectory(name, dtype)):
        bound = allowed(GOLDEN_TRAJECTORY)
        assert_within([(f"loss, step {step}", loss_error, bound), (f"gradient norm, step {step}", norm_error, bound)])


@each_recording
def test_inverse_undoes_forward(name: str) -> None:
    flow, x = golden_flow(name, torch.float64), golden_inputs(name, torch.float64)
    z, log_det = flow(x)
    back, log_det_back = flow.inverse(z)
    assert max(relative_error(a, b) for a, b in zip(back, x, strict=True)) < ROUND_TRIP_FLOAT64
    torch.testing.assert_close(log_det_back, -log_det, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("part", ["a", "b"])
def test_the_recorded_evaluation_is_reproduced_maps_scores_and_metrics(part: str) -> None:
    """Images whose highest likelihoods differ, so that a maximum over the set shows; None where the script fails."""
    expected = torch.load(GOLDEN / "scores_expected.pt", weights_only=True)[part]
    logp = [level.to(DEVICE) for level in expected["logp"]]
    scores = score_log_likelihoods(logp, tuple(expected["image_size"]), expected["top_k"])
    highest = scores.likelihood_add.amax(dim=(1, 2))
    assert highest.max() - highest.min() > 0.1
    for name in ("score", "score_map_add", "score_map_mul"):
        torch.testing.assert_close(getattr(scores, name).cpu(), expected[name], rtol=0, atol=GOLDEN_SCORES, msg=name)
    masks = expected["masks"]
    metrics = {
        "image_auroc": auroc(masks.amax(dim=(1, 2)), scores.score),
        "pixel_auroc": auroc(masks, scores.score_map_add),
        "pro_add": aupro_published(masks, scores.score_map_add),
        "pro_mul": aupro_published(masks, scores.score_map_mul),
    }
    for name, value in metrics.items():
        recorded = expected[name]
        assert value == (None if recorded is None else pytest.approx(recorded, abs=GOLDEN_SCORES)), name
