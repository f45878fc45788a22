"""Tests what the launcher makes of how its processes end, and what they make of its end."""

import os
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

from fastmsflow import InputError
from fastmsflow.distributed import launcher
from fastmsflow.distributed.launcher import LAUNCHER, _print_failures, _run, exit_code
from tests.helpers.paths import ROOT

PREEMPTED = 75


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([-15, 1], 1),
        ([1, PREEMPTED], 1),
        ([PREEMPTED, 1], PREEMPTED),
        ([-9, -15], 137),
        ([1, -9], 137),
        ([-15], 143),
        ([130, 130], 130),
    ],
)
def test_the_launcher_ends_as_the_process_that_failed_not_as_those_it_ended(codes: list[int], expected: int) -> None:
    assert exit_code(codes) == expected


def test_a_signal_that_ended_a_process_is_told_but_not_the_launchers_own(capsys) -> None:
    def ended(**of: tuple[int, int]) -> tuple[int, str]:
        failures = {int(name[1:]): SimpleNamespace(exitcode=code, timestamp=at) for name, (code, at) in of.items()}
        return _print_failures(failures), capsys.readouterr().err

    assert ended(p3=(-signal.SIGSEGV, 100), p0=(-signal.SIGTERM, 100)) == (
        128 + signal.SIGSEGV,
        "fastmsflow: process 3 was ended by SIGSEGV; PYTHONFAULTHANDLER=1 shows where\n",
    )
    code, said = ended(p0=(1, 100), p1=(-signal.SIGKILL, 101))
    assert code == 137 and said.startswith("fastmsflow: process 1 was killed by SIGKILL, most often because memory")
    # The launcher's, after 30 s of SIGTERM in vain.
    assert ended(p0=(1, 100), p1=(-signal.SIGKILL, 130)) == (1, "")
    assert ended(p0=(1, 100), p1=(-signal.SIGTERM, 100)) == (1, "")


def test_machines_that_do_not_meet_are_one_line(monkeypatch) -> None:
    """The first one waits for the second."""
    monkeypatch.setattr(launcher, "JOIN_TIMEOUT", 1)
    # What a launcher does to its own process.
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(launcher.logging, "disable", lambda: None)
    names = ("OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "TORCHELASTIC_SIGNALS_TO_HANDLE", LAUNCHER)
    for name in names:
        monkeypatch.setenv(name, "1")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(port))
    with pytest.raises(InputError, match=f"--nodes 2: the machines did not meet at localhost:{port} within 1 s"):
        _run(1, 2)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal is Linux's")
def test_a_process_whose_launcher_has_gone_before_it_could_look_ends() -> None:
    script = "from fastmsflow.distributed.launcher import _end_with_launcher as f; f(); print('alive')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHELASTIC_RUN_ID": "x"}

    def ran(**more: str) -> tuple[int, str]:
        done = subprocess.run([sys.executable, "-c", script], env=environment | more, capture_output=True, text=True)
        return done.returncode, done.stdout

    assert ran() == (0, "alive\n")
    assert ran(**{LAUNCHER: str(os.getpid())}) == (0, "alive\n")
    assert ran(**{LAUNCHER: "1" if os.getpid() != 1 else "2"}) == (-signal.SIGTERM, "")
