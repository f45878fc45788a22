"""OpenVINO's tests in a process of their own: after its conversions an interpreter ends now and then, much later."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.apart import FILES

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="without xdist these tests run where they stand")
@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_passes_in_a_process_of_its_own(name: str) -> None:
    (path,) = (ROOT / "tests").rglob(name)
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", str(path)]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    assert " passed" in result.stdout
