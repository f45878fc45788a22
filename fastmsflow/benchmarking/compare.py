"""Compares results of the benchmark suite with earlier ones, as a guard against getting slower.

``pytest benchmarks --benchmark-json FILE`` writes the results.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError, UnavailableError
from ..files import written_aside

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ratio:
    """Holds one row's median seconds, before and now."""

    name: str
    before: float
    now: float

    @property
    def value(self) -> float:
        """The time now by the time before; above 1 means slower than before."""
        return self.now / self.before


def run_suite(out: Path, quiet: bool = False) -> None:
    """Runs the whole suite of the source tree and writes results to ``out``.

    ``quiet``: whether output is shown only if the suite fails.
    Raises: UnavailableError if this is not a source tree or a benchmark failed.
    """
    if not (ROOT / "benchmarks/conftest.py").exists():
        raise UnavailableError(f"the suite comes with the source tree, and {ROOT} is none; clone it and run there")
    with written_aside(out) as aside:
        json_option = f"--benchmark-json={aside.resolve()}"
        command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", json_option]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE if quiet else None, text=True)
        if done.returncode:
            sys.stderr.write(done.stdout or "")
            raise UnavailableError("a benchmark failed; what it says stands above")


def compare(baseline: Path, results: Path) -> tuple[list[Ratio], str | None]:
    """Returns ratios of the rows that both files have, slowest first, and a warning if they are of two machines.

    Raises: InputError if a file cannot be read, is a rehearsal, or shares no row with the other.
    """
    before, now = _read(baseline), _read(results)
    shared = before["rows"].keys() & now["rows"].keys()
    if not shared:
        raise InputError(f"{baseline} and {results} have no benchmark in common; run the same ones")
    ratios = [Ratio(name, before["rows"][name], now["rows"][name]) for name in sorted(shared)]
    warning = None
    if before["device"] != now["device"]:
        warning = f"the baseline is of {before['device']}, the results of {now['device']}: ratios mix two machines"
    return sorted(ratios, key=lambda ratio: -ratio.value), warning


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        machine = content["machine_info"]
        rows = {row["fullname"]: float(row["stats"]["median"]) for row in content["benchmarks"]}
        found = {"rows": rows, "device": machine["device"]}
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; `fastmsflow benchmark --out {path}` writes one") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a result of the suite ({error!r}); `fastmsflow benchmark` writes one") from error
    if machine.get("rehearsal"):
        raise InputError(f"{path}: a rehearsal, whose times mean nothing; run the suite without --rehearse")
    return found
