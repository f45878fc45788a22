"""Measures what surrounds the flows: scores and maps, metrics, the import."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from benchmarks import suite_settings
from benchmarks.parity_gate import Gate, error
from benchmarks.suite_settings import DEVICE, Size, measure, rotated
from fastmsflow.backend import Backend
from fastmsflow.metrics import aupro, auroc
from fastmsflow.scoring import Scores, score_log_likelihoods
from tests.helpers.tolerances import OPERATION

MAPS = 50


def rounds() -> int:
    return 1 if suite_settings.rehearsing else 3


@pytest.mark.benchmark(group="scoring")
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_scoring(benchmark, size: Size, backend: Backend) -> None:
    """Log-likelihood maps -> scores and maps at the image's size."""
    batch = size.batches[-1]
    benchmark.extra_info |= {"contestant": backend, "images": batch}

    def maps() -> list[torch.Tensor]:
        return [-torch.rand(batch, *grid, device=DEVICE) for grid in size.grids]

    def score(logp: list[torch.Tensor], backend: Backend = backend) -> Scores:
        return score_log_likelihoods(logp, (size.image, size.image), backend=backend)

    given = maps()
    pairs = zip(Scores._fields, score(given), score(given, "torch"), strict=True)
    gate = Gate({name: error(ours, theirs) for name, ours, theirs in pairs}, OPERATION["float32"])
    benchmark.extra_info["gate"] = gate.as_dict()
    measure(benchmark, score, rotated(maps))
    gate.require()


@pytest.mark.benchmark(group="metrics")
@pytest.mark.parametrize("metric", [auroc, aupro], ids=lambda metric: metric.__name__)
def test_metric(benchmark, size: Size, metric) -> None:
    generator = np.random.default_rng(0)
    maps = generator.random((MAPS, size.image, size.image), dtype=np.float32)
    masks = np.zeros(maps.shape, dtype=bool)
    masks[::2, : size.image // 4, : size.image // 3] = True
    benchmark.extra_info |= {"contestant": metric.__name__, "images": MAPS}
    given = (masks.ravel(), maps.ravel()) if metric is auroc else (masks, maps)
    benchmark.pedantic(metric, given, rounds=rounds())


@pytest.mark.benchmark(group="import")
@pytest.mark.parametrize("what", ["torch", "fastmsflow"])
def test_import(benchmark, what: str) -> None:
    code = "import torch" if what == "torch" else "import fastmsflow; fastmsflow.MSFlow"
    benchmark.extra_info |= {"contestant": what}
    benchmark.pedantic(subprocess.run, ([sys.executable, "-c", code],), {"check": True}, rounds=rounds())
