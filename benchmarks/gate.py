"""Nothing is timed whose numbers are wrong: every contestant first reproduces a recording of the reference
implementation."""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.contestants import Contestant
from benchmarks.setting import DEVICE
from fastmsflow.compat import load_official
from tests.tolerances import CONTESTANT

GOLDEN = Path(__file__).parents[1] / "tests/golden"
NAME = "odd"


@cache
def errors(kind: type[Contestant]) -> dict[str, float]:
    """Relative errors, in the norm, of what ``kind`` computes from a recorded checkpoint: inference and the first
    training step."""
    expected = torch.load(GOLDEN / f"{NAME}_expected.pt", weights_only=True)
    flow = load_official(GOLDEN / f"{NAME}.pt", clamp=expected["config"]["clamp_alpha"]).to(DEVICE)
    contestant = kind(flow, [tuple(level.shape[2:]) for level in expected["pooled"]])
    features = [contestant.adapt(level.to(DEVICE)) for level in expected["pooled"]]
    # More than once: later calls may take another way.
    for _ in range(3):
        logp, log_det = contestant.likelihoods(features)
    found = {
        f"log-likelihood, level {i}": _error(a, b) for i, (a, b) in enumerate(zip(logp, expected["logp"], strict=True))
    }
    found["log-det"] = _error(log_det, expected["logdet"])
    loss, norm = contestant.step(features)
    expected_loss, expected_norm = expected["trajectory"][0]
    found["first loss"] = _error(loss, torch.tensor(expected_loss))
    found["first gradient norm"] = _error(norm, torch.tensor(expected_norm))
    return found


def check(kind: type[Contestant]) -> None:
    """Errors: AssertionError naming what is off."""
    bound = CONTESTANT[kind.name if DEVICE.type == "cuda" else "cpu"]
    wrong = {name: error for name, error in errors(kind).items() if not error < bound}
    assert not wrong, f"{kind.name} is not timed: {wrong}, at most {bound} is allowed"


def _error(ours: Tensor, theirs: Tensor) -> float:
    theirs = theirs.to(DEVICE).double()
    return ((ours.double() - theirs).norm() / theirs.norm()).item()
