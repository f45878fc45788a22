"""Compares results of the benchmark suite with earlier ones, as a guard against getting slower.

``pytest benchmarks --benchmark-json FILE`` writes the results.
"""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

from ..errors import InputError, UnavailableError
from ..files import written_aside
from ..readable_file import check_file
from ..schema import Within, read_json_file

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


def compare(baseline: Path, results: Path) -> tuple[list[Ratio], list[str]]:
    """Returns ratios of the rows that both files have, slowest first, and warnings.

    A warning tells that the files are of two machines, or which rows of the baseline the results have not.

    Raises: InputError if a file cannot be read, is a rehearsal, or shares no row with the other.
    """
    before, now = _read(baseline), _read(results)
    shared = before["rows"].keys() & now["rows"].keys()
    if not shared:
        raise InputError(f"{baseline} and {results} have no benchmark in common; run the same ones")
    ratios = [Ratio(name, before["rows"][name], now["rows"][name]) for name in sorted(shared)]
    warnings = []
    if before["device"] != now["device"]:
        machines = f"the baseline is of {before['device']}, the results of {now['device']}"
        warnings.append(f"{machines}: ratios mix two machines")
    missing = [name.rpartition("::")[2] for name in before["rows"] if name not in shared]
    if missing:
        count = f"{len(missing)} of {len(before['rows'])}"
        warnings.append(f"{count} benchmarks of the baseline are not in the results: {', '.join(missing)}")
    return sorted(ratios, key=lambda ratio: -ratio.value), warnings


class _Stats(TypedDict):
    """The part of a benchmark's statistics that is read."""

    median: Annotated[float, Within(1e-12)]


class _Row(TypedDict):
    """The part of a benchmark that is read."""

    fullname: str
    stats: _Stats


class _Machine(TypedDict):
    """The part of a suite's results on its machine that is read."""

    device: str


class _Results(TypedDict):
    """The part of a suite's results that is read."""

    machine_info: _Machine
    benchmarks: list[_Row]


def _read(path: Path) -> dict[str, Any]:
    what, remedy = f"{path}: not a result of the suite", "`fastmsflow benchmark` writes one"
    check_file(path, f"`fastmsflow benchmark --out {path}` writes one")
    content = read_json_file(path, _Results, what, remedy)
    machine: Mapping[str, Any] = content["machine_info"]
    if machine.get("rehearsal"):
        raise InputError(f"{path}: a rehearsal, whose times mean nothing; run the suite without --rehearse")
    rows = {row["fullname"]: row["stats"]["median"] for row in content["benchmarks"]}
    return {"rows": rows, "device": machine["device"]}
