"""A Python that starts in a twentieth of the time: its programs are forked off a server that has everything imported.

``warm_python(folder)`` yields an executable file. It takes a script, ``-m MODULE`` or ``-c CODE`` as Python does, and
the program has the caller's environment, current folder, umask, standard streams and signals; its exit code comes back,
and SIGKILL reaches it too. With other options it is a real Python. One server is enough for all processes of a test
run; it imports when its first program is asked for.

What Python does before its first line was done for the server: its programs share the server's hash seed, warning
filters and random states, and their streams are UTF-8. They have process groups and limits of their own, and SIGSTOP
does not reach them. Tests of these things, of imports and of parents need a real Python.
"""

import atexit
import builtins
import fcntl
import json
import os
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from tests.helpers.frame_memory import with_frame_memory
from tests.helpers.paths import ROOT

PASSED_ON = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
# This is of fcntl.h, and Python's module lacks it.
F_SETSIG = 10
IMPORTED = (
    "fastmsflow.evaluation.report",
    "fastmsflow.inference.batch_scorer",
    "fastmsflow.integrations.spark",
    "fastmsflow.training.every_class",
    "fastmsflow.training.train",
    "pandas",
    "pyarrow.parquet",
    "pytest",
    "sklearn.metrics",
    "timm",
    "torch._inductor.compile_fx",
    "webdataset",
)

# Sends its arguments and open files, and waits.
CLIENT = """#!{python} -IS
import json, os, signal, socket, sys

words = sys.argv[1:]
unbuffered = words[:1] == ["-u"]
if unbuffered:
    del words[0]
if not words or words[0].startswith("-") and words[0] not in ("-m", "-c"):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
# Its other end stays here: the program is killed when this process is gone, however it ends.
alive, _ = os.pipe()
files = []
for number in range(3):
    try:
        files.append(os.dup(number))
    except OSError:
        files.append(os.open(os.devnull, os.O_RDWR))
request = dict(
    words=words,
    unbuffered=unbuffered,
    folder=os.getcwd(),
    umask=os.umask(0),
    environment=dict(os.environ),
    parent=os.getppid(),
    leads_session=os.getsid(0) == os.getpid(),
    ignored=[number for number in {numbers} if signal.getsignal(number) is signal.SIG_IGN],
)
content = json.dumps(request).encode()
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
socket.send_fds(server, [len(content).to_bytes(8, "big")], [*files, alive])
server.sendall(content)
for number in [*files, alive]:
    os.close(number)


def answer():
    answered = server.recv(8, socket.MSG_WAITALL)
    if len(answered) < 8:
        sys.exit("the fast Python's server has gone, and its programs with it")
    return int.from_bytes(answered, "big")


program = answer()


def pass_on(number, _):
    try:
        os.kill(program, number)
    except ProcessLookupError:
        pass


for number in {numbers}:
    if number not in request["ignored"]:
        signal.signal(number, pass_on)
status = answer()
if os.WIFSIGNALED(status):
    number = os.WTERMSIG(status)
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
os._exit(os.WEXITSTATUS(status))
"""


@contextmanager
def warm_python(folder: Path, packages: Sequence[str] = IMPORTED) -> Iterator[Path]:
    """Starts the server in a with block and yields the executable; both keep their files in ``folder``.

    ``packages``: what the server imports.
    """
    address, client = folder / "server", folder / "python"
    numbers = [int(number) for number in PASSED_ON]
    client.write_text(CLIENT.format(python=sys.executable, address=str(address), numbers=numbers))
    client.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(address))
        listening.listen(64)
        number = listening.fileno()
        command = [sys.executable, "-m", "tests.helpers.warm_python", str(number), str(client), *packages]
        # The server is no test.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
        # The server ends with its standard input, however this process ends.
        server = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[number], cwd=ROOT, env=environment)
    with server:
        yield client
        server.kill()


class Server:
    """Forks a program for each client, and tells the client how it ended."""

    def __init__(self, listening: socket.socket, executable: str) -> None:
        self._listening = listening
        self._executable = executable
        self._clients: dict[int, socket.socket] = {}
        self._path = [path for path in sys.path if path not in ("", str(ROOT))]

    def serve(self) -> NoReturn:
        ended, wakeup = socket.socketpair()
        for end in (ended, wakeup):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
        ready = selectors.DefaultSelector()
        ready.register(self._listening, selectors.EVENT_READ)
        ready.register(ended, selectors.EVENT_READ)
        ready.register(0, selectors.EVENT_READ)
        while True:
            for key, _ in ready.select():
                if key.fileobj is self._listening:
                    self._begin(self._listening.accept()[0])
                elif key.fileobj == 0:
                    sys.exit()
                else:
                    ended.recv(4096)
                    self._report()

    def _begin(self, client: socket.socket) -> None:
        files: list[int] = []
        try:
            head, files, _, _ = socket.recv_fds(client, 8, 4)
            request = json.loads(client.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL))
        except (OSError, ValueError):
            # The client was killed before it had asked.
            client.close()
            for file in files:
                os.close(file)
            return
        program = os.fork()
        if program == 0:
            signal.set_wakeup_fd(-1)
            # An end that stayed open here would keep another client's program alive.
            for other in (self._listening, client, *self._clients.values()):
                other.close()
            self._become(request, files)
        for file in files:
            os.close(file)
        self._clients[program] = client
        with suppress(OSError):
            client.sendall(program.to_bytes(8, "big"))

    def _report(self) -> None:
        while self._clients:
            program, status = os.waitpid(-1, os.WNOHANG)
            if program == 0:
                return
            # Imported packages may have begun processes too.
            if client := self._clients.pop(program, None):
                with client, suppress(OSError):
                    client.sendall(status.to_bytes(8, "big"))

    def _become(self, request: dict[str, Any], files: list[int]) -> NoReturn:
        """Runs a client's program in this process, and ends with it."""
        import torch

        if request["leads_session"]:
            os.setsid()
        else:
            os.setpgid(0, 0)
        *streams, alive = files
        fcntl.fcntl(alive, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(alive, F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(alive, fcntl.F_SETFL, fcntl.fcntl(alive, fcntl.F_GETFL) | os.O_ASYNC)
        if select.select([alive], [], [], 0)[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in request["ignored"]:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        os.environ.clear()
        os.environ.update(request["environment"])
        time.tzset()
        os.umask(request["umask"])
        os.chdir(request["folder"])
        open_streams(streams, request["unbuffered"] or bool(os.environ.get("PYTHONUNBUFFERED")))
        # The package asks for its parent: that is the client's.
        os.getppid = lambda: request["parent"]
        sys.executable = self._executable
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
        code = exit_code(lambda: with_frame_memory(run_program, request["words"], self._path))
        with suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def open_streams(files: list[int], unbuffered: bool) -> None:
    for number, (name, file) in enumerate(zip(("stdin", "stdout", "stderr"), files, strict=True)):
        os.dup2(file, number)
        os.close(file)
        whole_lines = unbuffered or name == "stderr" or os.isatty(number)
        stream = os.fdopen(
            number,
            "r" if name == "stdin" else "w",
            buffering=1 if whole_lines and name != "stdin" else -1,
            errors="backslashreplace" if name == "stderr" else "surrogateescape",
            closefd=False,
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def run_program(words: list[str], standard_path: list[str]) -> None:
    own = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    kind, *rest = words
    if kind == "-m":
        sys.path[:] = [str(Path.cwd()), *own, *standard_path]
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.path[:] = ["", *own, *standard_path]
        sys.argv = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = ModuleType("__main__")
        main.__dict__["__builtins__"] = builtins
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.path[:] = [str(Path(kind).resolve().parent), *own, *standard_path]
        sys.argv = words
        runpy.run_path(kind, run_name="__main__")


def exit_code(program: Callable[[], None]) -> int:
    """Calls ``program`` and returns the exit code that Python would end with; says what Python would say."""
    try:
        program()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    # Ctrl-C is for the tests, and a program gets what was sent to it as soon as it has a handler.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    listening = socket.socket(fileno=int(sys.argv[1]))
    # It imports for seconds, and for many tests in vain.
    select.select([listening, 0], [], [])
    from fastmsflow.cli.imports import import_packages

    import_packages(*sys.argv[3:])
    Server(listening, sys.argv[2]).serve()
