"""The recorded outputs of the reference implementation."""

import pytest
import torch
from parity import NAMES, golden_errors, golden_flow, golden_gradients, golden_inputs, golden_trajectory, relative_error
from tolerances import (
    GOLDEN_FLOAT32,
    GOLDEN_FLOAT64,
    GOLDEN_LOG_DET_PER_ELEMENT,
    GOLDEN_TRAJECTORY,
    ROUND_TRIP_FLOAT64,
)

TOLERANCE = {torch.float32: GOLDEN_FLOAT32, torch.float64: GOLDEN_FLOAT64}
each_recording = pytest.mark.parametrize("name", NAMES)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])


@each_recording
@each_dtype
def test_every_recorded_output_is_reproduced(name: str, dtype: torch.dtype) -> None:
    errors = golden_errors(name, dtype)
    per_element = errors.pop("parallel log-det, nats an element")
    assert per_element < GOLDEN_LOG_DET_PER_ELEMENT
    assert {k: v for k, v in errors.items() if not v < TOLERANCE[dtype]} == {}


@each_recording
@each_dtype
def test_every_recorded_gradient_is_reproduced(name: str, dtype: torch.dtype) -> None:
    assert {k: v for k, v in golden_gradients(name, dtype).items() if not v < TOLERANCE[dtype]} == {}


@each_recording
@each_dtype
def test_recorded_training_steps_are_reproduced(name: str, dtype: torch.dtype) -> None:
    for loss_error, norm_error in golden_trajectory(name, dtype):
        assert loss_error < GOLDEN_TRAJECTORY
        assert norm_error < GOLDEN_TRAJECTORY


@each_recording
def test_inverse_undoes_forward(name: str) -> None:
    flow, x = golden_flow(name, torch.float64), golden_inputs(name, torch.float64)
    z, log_det = flow(x)
    back, log_det_back = flow.inverse(z)
    assert max(relative_error(a, b) for a, b in zip(back, x, strict=True)) < ROUND_TRIP_FLOAT64
    torch.testing.assert_close(log_det_back, -log_det, rtol=1e-12, atol=1e-9)
