"""Every kernel compiles ahead of time for every target, within the chip's means."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

pytest.importorskip("triton")

pytestmark = pytest.mark.slow

# Registers spilled to memory would be slower than a smaller tile; no kernel needs any.
SPILLS = 0
BRIEF = ("sm_80", "sm_86", "sm_100", "gfx942")


def compiled(*options: str) -> list[dict]:
    script = ROOT / "benchmarks/kernel_resources.py"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, script, "--json", *options],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def brief() -> list[dict]:
    """The first case of each launcher, for all targets but the one that is compiled whole."""
    return compiled("--brief", *(word for target in BRIEF for word in ("--target", target)))


@pytest.mark.parametrize("target", ["sm_90", *BRIEF])
def test_kernels_compile_within_the_chips_means(target: str, request: pytest.FixtureRequest) -> None:
    from benchmarks.kernel_resources import SHARED_LIMIT

    results = compiled("--target", target) if target == "sm_90" else request.getfixturevalue("brief")
    results = [r for r in results if r["target"] == target]
    assert {r["kernel"] for r in results if r["spills"] > SPILLS} == set()
    assert {r["kernel"] for r in results if r["shared"] > SHARED_LIMIT[target]} == set()
    assert len({r["kernel"] for r in results}) == 19


def test_tiles_to_be_tried_on_a_hopper_compile_without_spills() -> None:
    from benchmarks.kernel_resources import SHARED_LIMIT

    results = compiled("--target", "sm_90", "--candidates")
    # See fastmsflow.kernels.configs.PRODUCT_CANDIDATES.
    spilling = {r["case"] for r in results if r["spills"] > SPILLS}
    assert spilling <= {"512 channels, 64x16x64, 4 warps"}
    assert max(r["shared"] for r in results) <= SHARED_LIMIT["sm_90"]
    assert {r["matrix"] for r in results} == {"wgmma.mma_async"}
