"""The steps of a visit to a GPU, most telling first, and the record of them: ``bash benchmarks/gpu.sh``.

A step that meets its limit is interrupted as by Ctrl-C and keeps what it had; one that fails leaves the others alone.
Logs and results go to a folder of their own; ``record.tgz`` and ``summary.txt`` in $OUT hold them as they are
(``record-more.tgz`` and ``summary-more.txt`` of the second visit).
"""

import argparse
import contextlib
import importlib.util
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import report
from fastmsflow.files import written_aside

TOTAL = 540.0  # seconds that a visit takes at most
RESERVE = 30.0  # seconds that are kept for the report
LEAST = 5.0  # a step is not begun with fewer seconds left
GRACE = 20.0  # seconds that an interrupted step has to stop: xdist's workers finish their tests first
PACKED_EVERY = 5.0  # seconds
SLOWER = 20.0  # how many times longer a rehearsal on a CPU may take
OURS, COMPILED, AUTOTUNED = "fastmsflow", "compiled bf16", "compiled bf16, autotuned"
SHIPPED = ("as shipped", "as shipped, autocast fp16")
FLOWS = ("benchmarks/test_speed_flow.py", "benchmarks/test_speed_end_to_end.py")
KERNELS = ("benchmarks/test_speed_kernels.py",)
# The first visit times the kernels of inference, the second those that training has besides.
INFERENCE_KERNELS = "not gradient and not bfloat16"
# Plugins of pytest that timing has no use for, and whose import takes a second.
WITHOUT_PLUGINS = ("-p", "no:hypothesispytest", "-p", "no:xdist", "-p", "no:anyio")
LIMITS, NO_LIMITS = "matrix_product or copy", "not matrix_product and not copy"


@dataclass(frozen=True)
class Step:
    """One command of a visit, with a log and a line in the summary."""

    name: str
    limit: float
    """Seconds; less where the visit has less left."""
    command: list[str]
    missing: str | None = None
    """Why it cannot run, if it cannot."""
    environment: dict[str, str] = field(default_factory=dict)


class Steps:
    """The commands of each visit. ``rehearse``: at small sizes, without a GPU; ``folder``: where results go."""

    def __init__(self, folder: Path, rehearse: bool) -> None:
        self._folder = folder
        self._rehearse = rehearse
        self._size = ["--size", "small"] if rehearse else []
        self._batches = ("2", "1") if rehearse else ("8", "1,32")

    def first(self) -> list[Step]:
        """Nine minutes."""
        first, rest = self._batches
        shipped = self._timed("as-shipped", 40, FLOWS, SHIPPED, "inference")
        training = self._timed("training", 50, FLOWS, (OURS, *SHIPPED), "training_step")
        return [
            self._smoke(),
            self._timed("kernels", 60, KERNELS, (), INFERENCE_KERNELS, first),
            self._timed("ours", 60, (*FLOWS, "benchmarks/test_speed_scoring.py"), (OURS,), "inference or test_scoring"),
            self._timed("compiled", 240, FLOWS, (COMPILED,), "inference or training_step", first),
            shipped,
            training,
            self._timed("kernels-other-batches", 60, KERNELS, (), f"{NO_LIMITS} and {INFERENCE_KERNELS}", rest),
        ]

    def more(self) -> list[Step]:
        """The same once more: whole parity, what the first visit had no time for, a profile, the sanitizer."""
        first, rest = self._batches
        tests = os.environ.get("PARITY", "").split() or parity_tests()
        parity = [*self._pytest(), *tests, "--errors", self._path("parity.json")]
        if importlib.util.find_spec("xdist") and not self._rehearse:
            parity += ["-n", "6"]
        sanitizer = shutil.which("compute-sanitizer")
        guard = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9"] if sanitizer else []
        table = {"FASTMSFLOW_TABLE": self._path("tuned-table.json")}
        return [
            Step("parity", 140, parity),
            self._smoke(),
            self._timed("training-kernels", 60, KERNELS, (), f"{LIMITS} or gradient or bfloat16", first),
            self._timed("compiled-other-batches", 70, FLOWS, (COMPILED,), "inference", rest),
            self._timed("autotuned", 80, FLOWS, (AUTOTUNED,), "inference", first),
            Step("profile", 30, self._python("benchmarks/profile_model.py", *self._size)),
            Step(
                "tune",
                40,
                self._python("-m", "fastmsflow", "benchmark", "--tune"),
                "it times kernels on a GPU" if self._rehearse else None,
                table,
            ),
            Step("sanitizer", 30, [*guard, *self._python("benchmarks/few_launches.py")]),
        ]

    def _smoke(self) -> Step:
        """The gate of every single kernel that is timed after it."""
        return Step("smoke", 60, self._python("benchmarks/smoke.py", *self._size, "--json", self._path("smoke.json")))

    def _timed(
        self,
        name: str,
        limit: float,
        files: tuple[str, ...],
        contestants: tuple[str, ...],
        which: str,
        batches: str = "",
    ) -> Step:
        command = [*self._pytest(), *WITHOUT_PLUGINS, *files, "--benchmark-only", "--benchmark-disable-gc", *self._size]
        command += ["-k", which]
        command += ["--rows", self._path(f"{name}.json"), *(["--rehearse"] if self._rehearse else [])]
        command += ["--batches", batches] if batches else []
        for contestant in contestants:
            command += ["--contestant", contestant]
        missing = None
        if contestants == SHIPPED and not importlib.util.find_spec("FrEIA"):
            missing = "FrEIA 0.2 is not there: run benchmarks/peers/fetch.sh where there is a network"
        return Step(name, limit, command, missing)

    def _pytest(self) -> list[str]:
        return self._python("-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=10")

    def _python(self, *arguments: str) -> list[str]:
        return [sys.executable, *arguments]

    def _path(self, name: str) -> str:
        return str(self._folder / name)


def parity_tests() -> list[str]:
    """Names the parity tests whose packages are installed."""
    files = ["tests/gpu/test_gpu.py"]
    if importlib.util.find_spec("hypothesis"):
        files += sorted(str(path) for path in Path("tests/unit/ops").glob("test_*.py"))
    if importlib.util.find_spec("FrEIA"):
        files += ["tests/unit/test_backend.py"]
        files += [f"tests/unit/reference/test_{name}.py" for name in ("golden", "freia")]
    return files


class Visit:
    """Runs steps within ``seconds``, and keeps the record of them in ``out`` up to date.

    ``slower``: how much longer all may take. ``suffix``: of the two files' names.
    """

    def __init__(self, out: Path, folder: Path, seconds: float, slower: float = 1.0, suffix: str = "") -> None:
        self._record = out / f"record{suffix}.tgz"
        self._summary = out / f"summary{suffix}.txt"
        self._folder = folder
        self._slower = slower
        self._end = time.monotonic() + slower * seconds
        self._lines: list[str] = []

    def run(self, step: Step, sure: bool = False) -> None:
        """``sure``: the step has its whole limit, whatever time is left."""
        left = math.inf if sure else self._end - RESERVE - time.monotonic()
        limit = min(self._slower * step.limit, left)
        if step.missing is not None:
            self.say(f"{step.name}: not run, {step.missing}")
        elif limit < LEAST:
            self.say(f"{step.name}: not run, no time was left")
        else:
            begin = time.monotonic()
            self.say(f"{step.name}: running, at most {limit:.0f} s")
            end = self._run(step, limit)
            self._lines.pop()
            self.say(f"{step.name}: {end} after {time.monotonic() - begin:.0f} s")

    def _run(self, step: Step, limit: float) -> str:
        """Runs the step and says how it ended."""
        with (self._folder / f"{step.name}.log").open("wb") as log:
            process = subprocess.Popen(
                step.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | step.environment,
                start_new_session=True,
            )
            try:
                status = self._wait(process, limit)
            except BaseException:
                self._stop(process)
                raise
            if status is None:
                self._stop(process)
                return f"interrupted at its limit of {limit:.0f} s"
        # pytest exits with 2 for more than an interruption.
        if status < 0 or b"KeyboardInterrupt" in tail(self._folder / f"{step.name}.log"):
            return f"interrupted (exit {status})"
        return "done" if status == 0 else f"failed (exit {status})"

    def _wait(self, process: subprocess.Popen, seconds: float) -> int | None:
        """Returns the exit status, or None if the process runs on after ``seconds``. Updates the record meanwhile."""
        end = time.monotonic() + seconds
        while True:
            left = end - time.monotonic()
            if left <= 0:
                return None
            try:
                return process.wait(min(PACKED_EVERY, left))
            except subprocess.TimeoutExpired:
                self.pack()

    def _stop(self, process: subprocess.Popen) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
            if self._wait(process, GRACE) is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def say(self, line: str) -> None:
        self._lines.append(line)
        print(line, flush=True)
        self.pack()

    def pack(self) -> None:
        """Each of the two files is whole at any time."""
        try:
            summary = self._summarized()
        except (LookupError, OSError, TypeError, ValueError) as error:
            # The record matters more than its summary.
            summary = "\n".join(self._lines) + f"\n\nno summary: {error!r}\n"
        (self._folder / "summary.txt").write_text(summary)
        with written_aside(self._summary) as aside:
            shutil.copyfile(self._folder / "summary.txt", aside)
        with written_aside(self._record) as aside, tarfile.open(aside, "w:gz") as tar:
            for path in sorted(self._folder.iterdir()):
                if path.is_file() and not path.name.startswith("."):
                    _add(tar, path)

    def _summarized(self) -> str:
        text = "\n".join(self._lines) + "\n"
        results, smoke = report.records(self._folder)
        red = [f"{f['arithmetic']} {f['what']}: {f['fault'] or f['error']}" for f in smoke if not f["green"]]
        if smoke:
            text += f"\nsmoke: {len(smoke)} results, {len(red)} red\n" + "".join(f"- {line}\n" for line in red)
        errors = self._folder / "parity.json"
        tests = json.loads(errors.read_text()) if errors.exists() else []
        parity = [test for test in tests if test.get("outcome") == "failed"]
        if parity:
            text += "\nparity, red:\n" + "".join(f"- {test['test']}\n" for test in parity)
        if results:
            machine, rows = report.read(results)
            text += "\n" + report.text_of(machine, *report.published(rows, smoke))
            if machine.get("commit") == "unknown":
                text += "\nThe commit is not known: set COMMIT where there is no .git.\n"
        return text


def _add(tar: tarfile.TarFile, path: Path) -> None:
    """Adds a file as it is now: a step may be writing it anew, and `tar.add` fails where it grows shorter meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        content = path.read_bytes()
        info = tarfile.TarInfo(path.name)
        info.size, info.mtime = len(content), int(time.time())
        tar.addfile(info, io.BytesIO(content))


def tail(log: Path) -> bytes:
    """Returns the end of a log."""
    return log.read_bytes()[-2000:]


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--more", action="store_true", help="the second visit: whole parity, profile, sanitizer")
    parser.add_argument("--rehearse", action="store_true", help="at small sizes, on a CPU too: times mean nothing")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="of the whole visit")
    options = parser.parse_args()
    out = Path(os.environ["OUT"])
    out.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="visit-"))
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    slower, suffix = SLOWER if options.rehearse else 1.0, "-more" if options.more else ""
    visit = Visit(out, folder, options.seconds, slower, suffix)
    if smi := shutil.which("nvidia-smi"):
        with (folder / "nvidia-smi.txt").open("wb") as file:
            subprocess.run([smi], stdout=file, check=False)
    steps = Steps(folder, options.rehearse)
    try:
        for step in steps.more() if options.more else steps.first():
            visit.run(step)
        if report.records(folder)[0]:
            visit.run(Step("report", RESERVE, [sys.executable, "benchmarks/report.py", str(folder)]), sure=True)
    except KeyboardInterrupt:
        visit.say("interrupted: the record holds what there is")
        sys.exit(130)


if __name__ == "__main__":
    main()
