"""One command as several processes: by torchrun's own launcher."""

import logging
import os
import signal
import sys
from typing import Annotated

import typer

from ..errors import PREEMPTED, InputError
from ..world import World

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


def launch(devices: int, nodes: int = 1) -> World:
    """In each of the processes: its place among them. Started as one process of what should be several, it starts them,
    waits, and exits with what they exit with; under torchrun, whose processes are there already, it starts none.

    Errors: InputError where there are fewer GPUs than ``devices``, or ``nodes`` do not know the first one's address.
    """
    here = World.here()
    if here.size > 1 or devices * nodes == 1:
        _check(here, devices, nodes)
        return here
    import torch

    if torch.cuda.is_available() and torch.cuda.device_count() < devices:
        raise InputError(f"--devices {devices}: this machine has {torch.cuda.device_count()} GPUs; give as many")
    if nodes > 1 and "MASTER_ADDR" not in os.environ:
        raise InputError(f"--nodes {nodes}: set MASTER_ADDR, on each of them, to the address of the first")
    raise typer.Exit(_run(devices, nodes))


def _check(here: World, devices: int, nodes: int) -> None:
    """torchrun's numbers count; other ones on the command line would be a misunderstanding."""
    if devices * nodes > 1 and (devices, nodes) != (here.local_size, here.size // here.local_size):
        raise InputError(
            f"--devices {devices} --nodes {nodes}, but torchrun started {here.local_size} processes on each of"
            f" {here.size // here.local_size} machines; leave the options out"
        )


def _run(devices: int, nodes: int) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # What went wrong the processes say themselves. Each of the launcher's loggers has a level of its own.
    logging.disable()
    # Otherwise each would take all cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // devices)))
    endpoint = "localhost:0"
    if nodes > 1:
        endpoint = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', PORT)}"
    config = LaunchConfig(
        nodes, nodes, devices, run_id="fastmsflow", rdzv_endpoint=endpoint, rdzv_backend="c10d", max_restarts=0
    )
    try:
        elastic_launch(config, sys.executable)("-m", "fastmsflow", *sys.argv[1:])
    except ChildFailedError as error:
        return _worst([failure.exitcode for failure in error.failures.values()])
    except SignalException as error:
        return PREEMPTED if error.sigval == signal.SIGTERM else 128 + error.sigval
    return 0


def _worst(codes: list[int]) -> int:
    """Of the processes' exit codes, as a shell has them: negative ones are signals. Where one fails, the launcher ends
    the others, by SIGTERM."""
    own = [code for code in codes if code != -signal.SIGTERM] or codes
    return max(code if code > 0 else 128 - code for code in own)
