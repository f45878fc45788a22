"""Nothing is timed whose numbers are wrong: every contestant first reproduces a recording of the reference
implementation."""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.contestants import Contestant
from benchmarks.setting import DEVICE
from fastmsflow import MSFlow, backend
from fastmsflow.compat import load_official
from tests.tolerances import CONTESTANT, PREDICTION

GOLDEN = Path(__file__).parents[1] / "tests/golden"
NAME = "odd"


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
    loss, norm = contestant.step([contestant.adapt_training(level.to(DEVICE)) for level in expected["pooled"]])
    expected_loss, expected_norm = expected["trajectory"][0]
    found["first loss"] = _error(loss, torch.tensor(expected_loss))
    found["first gradient norm"] = _error(norm, torch.tensor(expected_norm))
    return found


def check(kind: type[Contestant]) -> None:
    """Errors: AssertionError naming what is off."""
    fault = _fault(kind)
    assert fault is None, f"{kind.name} is not timed: {fault}"


@cache
def _fault(kind: type[Contestant]) -> str | None:
    """Found once: a contestant that cannot be compiled is not compiled again for every row."""
    bound = CONTESTANT[kind.name if DEVICE.type == "cuda" else "cpu"]
    try:
        wrong = {name: error for name, error in errors(kind).items() if not error < bound}
    except Exception as error:
        return repr(error)
    return f"{wrong}, at most {bound} is allowed" if wrong else None


@torch.no_grad()
def check_predictions(contestant: Contestant, model: MSFlow, images: Tensor) -> None:
    """The same for what it makes of images, against the model in eager float32.

    Errors: AssertionError naming what is off.
    """
    with torch.backends.cudnn.flags(allow_tf32=False), backend.use("torch"):
        truth = model.scores(images.float())
    # More than once: later calls may take another way.
    for _ in range(3):
        _, log_score, _, score_map_mul, _ = contestant.predict(images)
    bound = PREDICTION["half" if DEVICE.type == "cuda" or contestant.gpu_only else "float32"]
    found = {
        "log score": _error(log_score, truth.log_score),
        "map": _error(score_map_mul, truth.score_map_mul),
    }
    assert max(found.values()) < bound, f"{contestant.name} is not timed: {found}, at most {bound} is allowed"


def _error(ours: Tensor, theirs: Tensor) -> float:
    theirs = theirs.to(ours.device).double()
    return ((ours.double() - theirs).norm() / theirs.norm()).item()
