"""A program of the fast Python is told what a real one is told, and its caller learns how it ended."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.warm_python import warm_python

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="the fast Python is for Linux")]

SURROUNDINGS = """
import json, os, sys, time
mask = os.umask(0)
told = [sys.argv, os.getcwd(), mask, os.environ["OWN"], sys.stdin.read(), time.strftime("%H", time.gmtime(0))]
print(json.dumps([*told, len.__name__, __name__, os.getppid()]))
print("to standard error", file=sys.stderr)
"""
ENDINGS = {
    "return": "",
    "number": "import sys; sys.exit(5)",
    "text": "import sys; sys.exit('a reason')",
    "error": "1 / 0",
    "at exit": "import atexit; atexit.register(print, 'the last line')",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "terminated": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "interrupted": "raise KeyboardInterrupt",
}
# A signal that comes just before a sleep is noticed after it, so the sleeps are short.
WAIT = "import os, time; print(os.getpid(), flush=True); [time.sleep(0.05) for _ in range(1200)]"


def ran(python: Path | str, code: str, *words: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([python, "-c", code, *words], capture_output=True, text=True, check=False, **options)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Path]:
    """A server of this test alone, which imports nothing, and its executable."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, warm_python(Path(folder), packages=()) as client:
        yield client


def test_a_program_has_its_callers_surroundings(python: Path, tmp_path: Path) -> None:
    options = {"cwd": tmp_path, "env": {**os.environ, "OWN": "a value", "TZ": "Asia/Tokyo"}, "input": "a line"}
    before = os.umask(0o27)
    try:
        ours, real = (ran(each, SURROUNDINGS, "a word", "--b", **options) for each in (python, sys.executable))
    finally:
        os.umask(before)
    assert (ours.stdout, ours.stderr) == (real.stdout, real.stderr)


@pytest.mark.parametrize("code", ENDINGS.values(), ids=ENDINGS)
def test_a_caller_learns_how_its_program_ended(python: Path, code: str) -> None:
    ours, real = ran(python, code), ran(sys.executable, code)
    assert (ours.returncode, ours.stdout) == (real.returncode, real.stdout)
    assert ours.stderr.splitlines()[-1:] == real.stderr.splitlines()[-1:]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_a_signal_reaches_the_program(python: Path, number: signal.Signals) -> None:
    with subprocess.Popen([python, "-c", WAIT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as caller:
        assert caller.stdout is not None
        program = int(caller.stdout.readline())
        caller.send_signal(number)
        assert caller.wait(timeout=30) == -number
        assert ends(program)


def test_a_program_whose_server_dies_has_not_succeeded(server: Path) -> None:
    with subprocess.Popen([server, "-c", WAIT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as caller:
        assert caller.stdout is not None
        program = int(caller.stdout.readline())
        os.kill(parent(program), signal.SIGKILL)
        _, said = caller.communicate(timeout=30)
    assert (caller.returncode, said) == (1, "the fast Python's server has gone, and its programs with it\n")
    assert ends(program)


def test_a_caller_that_dies_while_it_asks_leaves_nothing_open(server: Path) -> None:
    reading, writing = os.pipe()
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(str(server.parent / "server"))
        socket.send_fds(asking, [(100).to_bytes(8, "big")], [writing] * 4)
        asking.sendall(b"{")
    os.close(writing)
    # The end of the file comes when nobody holds the pipe's other end.
    assert os.read(reading, 1) == b""
    os.close(reading)
    assert ran(server, "print(1)").stdout == "1\n"


def ends(process: int) -> bool:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if not Path(f"/proc/{process}").exists():
            return True
        time.sleep(0.02)
    return False


def parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
