"""One command as several processes: by torchrun's own launcher."""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Mapping
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from ..cli.options import console, errors
from ..errors import PREEMPTED, InputError
from .process_group import JOIN_TIMEOUT, ProcessGroup, master_address

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

Devices = Annotated[
    int, typer.Option(help="Processes on this machine, each on a GPU of its own where there are GPUs.", min=1)
]
Nodes = Annotated[
    int,
    typer.Option(
        help="Machines; on each the same command is started, with the address of the first one in MASTER_ADDR"
        " (and MASTER_PORT, if 29400 will not do).",
        min=1,
    ),
]
PORT = "29400"
LAUNCHER = "FASTMSFLOW_LAUNCHER"
"""The launcher's process id, in the environment of those that it starts."""
# A step of a large batch, and a state to be saved, must fit in; torch's own 30 s are few.
SHUTDOWN_SECONDS = "300"
# Processes that end so long after the first one were ended because of it.
SAME_FAULT_SECONDS = 10
PR_SET_PDEATHSIG = 1


def launch(devices: int, nodes: int = 1) -> ProcessGroup:
    """In each of the processes: its place among them. Started as one process of what should be several, it starts them,
    waits, and exits with what they exit with; under torchrun, whose processes are there already, it starts none.

    SIGTERM is handed on to the processes, which have SHUTDOWN_SECONDS to end (under torchrun
    TORCH_ELASTIC_SHUTDOWN_TIMEOUT, 30 by itself). When the launcher is killed, they get one too. Where one of them
    fails, the others have 30 s, which torch does not let one change.
    Errors: InputError where there are fewer GPUs than ``devices``, or ``nodes`` do not find the first one.
    """
    here = ProcessGroup.here()
    if max(here.size, devices * nodes) > 1:
        # To torch's import: a connection that breaks is an error's text, without the stack of frames that it logs.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    if here.size > 1 or devices * nodes == 1:
        _check(here, devices, nodes)
        if here.size > 1:
            _end_with_launcher()
        return here
    import torch

    if torch.cuda.is_available() and torch.cuda.device_count() < devices:
        raise InputError(f"--devices {devices}: this machine has {torch.cuda.device_count()} GPUs; give as many")
    if nodes > 1:
        if "MASTER_ADDR" not in os.environ:
            raise InputError(f"--nodes {nodes}: set MASTER_ADDR, on each of them, to the address of the first")
        os.environ.setdefault("MASTER_PORT", PORT)
        master_address()
    raise typer.Exit(_run(devices, nodes))


def _check(here: ProcessGroup, devices: int, nodes: int) -> None:
    """torchrun's numbers count; other ones on the command line would be a misunderstanding."""
    if devices * nodes > 1 and (devices, nodes) != (here.local_size, here.size // here.local_size):
        raise InputError(
            f"--devices {devices} --nodes {nodes}, but torchrun started {here.local_size} processes on each of"
            f" {here.size // here.local_size} machines; leave the options out"
        )


def _end_with_launcher() -> None:
    """A launcher that is killed cannot end its processes: the kernel sends SIGTERM in its place, on Linux."""
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    # It may have gone before. torchrun does not say who it is.
    if int(os.environ.get(LAUNCHER, os.getppid())) != os.getppid():
        os.kill(os.getpid(), signal.SIGTERM)


def _run(devices: int, nodes: int) -> int:
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, LogsDest, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    def stop(number: int, frame: FrameType | None) -> None:
        # Schedulers send it again, also while this process ends.
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
        raise SignalException(f"signal {number}", signal.Signals(number))

    class NoLogs(DefaultLogsSpecs):
        """Of the usual ones each launch would leave an empty folder. Asked for when the processes are about to start:
        until then, while machines are waited for within C++, signals have their usual effect."""

        def __init__(self) -> None:
            super().__init__(os.devnull)

        def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
                # Under nohup a terminal may hang up.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, stop)
            return super().reify(envs)

    # What went wrong the processes say themselves. Each of the launcher's loggers has a level of its own.
    logging.disable()
    # Otherwise each would take all cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // devices)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SHUTDOWN_SECONDS)
    os.environ[LAUNCHER] = str(os.getpid())
    endpoint = "localhost:0" if nodes == 1 else f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    config = LaunchConfig(
        nodes,
        nodes,
        devices,
        logs_specs=NoLogs(),
        run_id="fastmsflow",
        rdzv_endpoint=endpoint,
        rdzv_backend="c10d",
        rdzv_configs={"join_timeout": JOIN_TIMEOUT, "read_timeout": JOIN_TIMEOUT},
        max_restarts=0,
        # Ours handle them.
        signals_to_handle="",
    )
    if nodes > 1:
        # Python's would run when the wait is over.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        console.print(f"waiting for {nodes} machines at {endpoint} ...", style="dim", soft_wrap=True)
    try:
        elastic_launch(config, sys.executable)("-m", "fastmsflow", *sys.argv[1:])
    except ChildFailedError as error:
        return _told(error.failures)
    except SignalException as error:
        return PREEMPTED if error.sigval == signal.SIGTERM else 128 + error.sigval
    except RendezvousError as error:
        raise InputError(
            f"--nodes {nodes}: the machines did not meet at {endpoint} within {JOIN_TIMEOUT} s"
            f" ({type(error).__name__}); look whether the same command is started on all of them, and the first one can"
            " be reached"
        ) from error
    return 0


def _told(failures: "Mapping[int, ProcessFailure]") -> int:
    """Tells of the processes that could not themselves, killed by a signal. -> the launcher's exit code.

    ``failures``: by rank, in the order in which they were seen.
    """
    first = min(failure.timestamp for failure in failures.values())
    codes = {
        rank: failure.exitcode for rank, failure in failures.items() if failure.timestamp - first < SAME_FAULT_SECONDS
    }
    for rank, code in codes.items():
        if code < 0 and code != -signal.SIGTERM:
            errors.print(_obituary(rank, signal.Signals(-code)), soft_wrap=True, highlight=False)
    return exit_code(list(codes.values()))


def _obituary(rank: int, number: signal.Signals) -> str:
    if number == signal.SIGKILL:
        return (
            f"fastmsflow: process {rank} was killed by {number.name}, most often because memory ran out; try fewer"
            " workers or a smaller batch"
        )
    return f"fastmsflow: process {rank} was ended by {number.name}; PYTHONFAULTHANDLER=1 shows where"


def exit_code(codes: list[int]) -> int:
    """Of the processes' exit codes, in the order in which they ended, the one that counts, as a shell has it: negative
    ones are signals. Where one fails, the launcher ends the others, by SIGTERM."""
    own = [code for code in codes if code != -signal.SIGTERM] or codes
    return next((128 - code for code in own if code < 0), own[0])
