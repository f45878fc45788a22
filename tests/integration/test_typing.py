"""Tests what a user's type checker sees of the package: its types, and wrong uses of it as errors."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastmsflow

pytest.importorskip("mypy", reason="needs mypy")

pytestmark = pytest.mark.slow

RIGHT = """\
from pathlib import Path

import torch
from typing_extensions import assert_type

import fastmsflow
from fastmsflow import InputError, MSFlow, MultiScaleFlow, Prediction, metrics, scoring
from fastmsflow.compat import build_msflow_model, load_official, save_official


class Config:
    c_conds = [64, 64, 64]
    parallel_blocks = [2, 5, 8]
    clamp_alpha = 1.9


def scores(path: Path, images: torch.Tensor) -> torch.Tensor:
    model = MSFlow.load(path, backend="torch").for_inference()
    assert_type(MSFlow.from_pretrained("owner/name"), MSFlow)
    with fastmsflow.backend.use("auto"):
        prediction = model.predict(images, top_k=0.05)
    assert_type(prediction, Prediction)
    assert_type(metrics.auroc([0, 1], prediction.score), float)
    assert_type(model.standardiser is None, bool)
    assert_type(model.flow.parallel_flows[0], torch.nn.Module)
    assert_type(scoring.anomaly_scores(model.flow(model.features(images))[0], (512, 512))[0], torch.Tensor)
    return prediction.score


try:
    flow = load_official("last.pt", variant="0.2", device="cpu")
except InputError:
    flow = MultiScaleFlow((256, 512, 1024), clamp_form="scaled_tanh")
assert_type(flow, MultiScaleFlow)
assert_type(flow.nll([torch.rand(1, 256, 64, 64)]), torch.Tensor)
save_official(flow, Path("again.pt"))
parallel, fusion = build_msflow_model(Config(), [256, 512, 1024])
assert_type(parallel[0].forward(torch.rand(1, 256, 64, 64), [torch.rand(1, 64, 64, 64)])[1], torch.Tensor)
"""

# mypy takes half a minute to read all of PyTorch. These modules give tensors, modules and torch.no_grad() their types;
# stubs are followed in any case.
CONFIG = """\
[mypy]
follow_imports = skip
[mypy-fastmsflow.*,torch,torch._tensor,torch.nn.*,torch.autograd,torch.autograd.grad_mode,torch.utils._contextlib]
follow_imports = normal
"""

# Each line ends with the code of its error.
WRONG = """\
import fastmsflow
from fastmsflow import metrics
from fastmsflow import MSFLow  # attr-defined
from fastmsflow.compat import build_msflow_model, load_official
model = fastmsflow.MSFlow.load("model.safetensors", backend="cuda")  # arg-type
prediction = model.predict("image.png")  # arg-type
prediction.scores  # attr-defined
len(metrics.auroc([0, 1], [0.1, 0.2]))  # arg-type
load_official("last.pt", variant="0.3")  # arg-type
build_msflow_model(object(), [256, 512, 1024])  # arg-type
fastmsflow.metric  # attr-defined
"""


def test_a_users_script_is_checked_by_our_types(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """One run of ``mypy --strict`` checks the right and the wrong script, since PyTorch's types take long to read."""
    (tmp_path / "mypy.ini").write_text(CONFIG)
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "wrong.py").write_text(WRONG)
    # On the path of imports, not among the checked sources: there it depends on py.typed whether types are read.
    package = Path(fastmsflow.__file__).parents[1]
    cache = f"--cache-dir={pytestconfig.cache.mkdir('mypy')}"
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=mypy.ini", cache, "right.py", "wrong.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
    )
    found = re.findall(r"^(\w+)\.py:(\d+): error: .*\[([\w-]+)\]$", run.stdout, re.MULTILINE)
    lines = enumerate(WRONG.splitlines(), start=1)
    expected = [("wrong", str(number), line.partition("  # ")[2]) for number, line in lines if "  # " in line]
    assert found == expected, run.stdout + run.stderr
