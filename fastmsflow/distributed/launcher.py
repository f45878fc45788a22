"""Starts one command as several processes by torch's elastic launcher."""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

from ..errors import PREEMPTED, InputError
from .process_group import JOIN_TIMEOUT, ProcessGroup, master_address

PORT = "29400"
LAUNCHER = "FASTMSFLOW_LAUNCHER"
"""The environment variable that tells processes their launcher's process id."""
# A step of a large batch and the saving of a state must fit in; torch's own 30 s are too few.
SHUTDOWN_SECONDS = "300"
# Processes that end later than this after the first one were ended because of it.
SAME_FAULT_SECONDS = 10
PR_SET_PDEATHSIG = 1


def launch(devices: int, nodes: int = 1, notify: Callable[[str], None] = print) -> ProcessGroup:
    """Returns this process's place among ``devices`` processes on each of ``nodes`` machines.

    The first call starts the processes, waits for them and ends with their exit code; the processes run the same
    command and call this again. Under torchrun the processes exist already, and none is started.

    SIGTERM is handed on to the processes, which have SHUTDOWN_SECONDS to end (under torchrun
    TORCH_ELASTIC_SHUTDOWN_TIMEOUT, 30 by default). When the launcher is killed, they get a SIGTERM too. Where one of
    them fails, the others have 30 s, a value that torch does not let one change.

    ``notify`` prints the line that says for how many machines the launcher waits.

    Raises: InputError if there are fewer GPUs than ``devices``, or the machines do not find the first one; SystemExit
    with the exit code of the processes that were started.
    """
    here = ProcessGroup.here()
    if here.size == devices * nodes == 1:
        return here
    # Set before torch is imported: a broken connection is told in one line, without the C++ stack.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    if here.size > 1:
        if devices * nodes > 1 and (devices, nodes) != (here.local_size, here.size // here.local_size):
            raise InputError(
                f"--devices {devices} --nodes {nodes}, but torchrun started {here.local_size} processes on each of"
                f" {here.size // here.local_size} machines; leave the options out"
            )
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
    sys.exit(_run(devices, nodes, notify))


def _end_with_launcher() -> None:
    """Asks the Linux kernel for a SIGTERM when the launcher is killed, which cannot send one itself then."""
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    # The launcher may have ended already; torchrun does not tell its process id.
    if int(os.environ.get(LAUNCHER, os.getppid())) != os.getppid():
        os.kill(os.getpid(), signal.SIGTERM)


def _run(devices: int, nodes: int, notify: Callable[[str], None] = print) -> int:
    """Starts the processes, waits for them and returns the exit code."""
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, LogsDest, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    def stop(number: int, frame: FrameType | None) -> None:
        # Schedulers repeat the signal, also while this process ends.
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
        raise SignalException(f"signal {number}", signal.Signals(number))

    class NoLogs(DefaultLogsSpecs):
        """Writes no log files, and sets the signal handlers when the processes are about to start.

        The usual class leaves an empty folder behind. Until the processes start, the launcher waits for machines within
        C++, where signals must keep their usual effect.
        """

        def __init__(self) -> None:
            super().__init__(os.devnull)

        def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
                # nohup ignores SIGHUP, and so does the launcher then.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, stop)
            return super().reify(envs)

    # The processes print their errors themselves; torch's loggers have levels of their own.
    logging.disable()
    # Otherwise each process would use all cores.
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
        # NoLogs sets the handlers.
        signals_to_handle="",
    )
    if nodes > 1:
        # Python's own handler would run only after the wait.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        notify(f"waiting for {nodes} machines at {endpoint} ...")
    try:
        elastic_launch(config, sys.executable)("-m", "fastmsflow", *sys.argv[1:])
    except ChildFailedError as error:
        return _print_failures(error.failures)
    except SignalException as error:
        return PREEMPTED if error.sigval == signal.SIGTERM else 128 + error.sigval
    except RendezvousError as error:
        raise InputError(
            f"--nodes {nodes}: the machines did not meet at {endpoint} within {JOIN_TIMEOUT} s"
            f" ({type(error).__name__}); look whether the same command is started on all of them, and the first one can"
            " be reached"
        ) from error
    return 0


def _print_failures(failures: Mapping[int, Any]) -> int:
    """Prints a line for each process that a signal killed, and returns the launcher's exit code.

    ``failures``: torch's ProcessFailures by rank, in the order in which the launcher saw them.
    """
    first = min(failure.timestamp for failure in failures.values())
    codes = {
        rank: failure.exitcode for rank, failure in failures.items() if failure.timestamp - first < SAME_FAULT_SECONDS
    }
    for rank, code in codes.items():
        if code < 0 and code != -signal.SIGTERM:
            how = f"was ended by {signal.Signals(-code).name}; PYTHONFAULTHANDLER=1 shows where"
            if code == -signal.SIGKILL:
                how = "was killed by SIGKILL, most often because memory ran out; try fewer workers or a smaller batch"
            print(f"fastmsflow: process {rank} {how}", file=sys.stderr)
    return exit_code(list(codes.values()))


def exit_code(codes: list[int]) -> int:
    """Returns the exit code that counts among those of the processes, in the order in which they ended.

    Negative codes are signals and are returned as a shell has them, 128 + signal. Where one process fails, the launcher
    ends the others by SIGTERM, so that those codes count least.
    """
    failed = [code for code in codes if code != -signal.SIGTERM] or codes
    return next((128 - code for code in failed if code < 0), failed[0])
