"""Coordinates processes that share one piece of work, as torchrun starts them; a single process imports no torch."""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple, TypeVar

from ..errors import InputError
from ..number_range import PROCESSES

T = TypeVar("T")
_joined_at: list[str] = []
"""Addresses at which this process has joined others."""
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# Seconds: machines do not all start at once.
JOIN_TIMEOUT = 900
# gloo's and NCCL's messages when another process has ended.
PEER_LOST_WORDS = (
    "Connection closed by",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exit",
    "communicator was aborted",
)


class ProcessGroup(NamedTuple):
    """One process of a group, and the group's size."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Rank among this machine's processes, and the number of this process's GPU."""
    local_size: int = 1

    @classmethod
    def here(cls) -> "ProcessGroup":
        """Returns this process according to the environment that torchrun sets.

        Slurm's srun does not set it: let srun start one torchrun, or one `fastmsflow train --devices N --nodes M`, on
        each machine with ``--ntasks-per-node 1``.

        Raises: InputError if some of the variables are missing, or contradict each other.
        """
        given = [name for name in RANK_VARIABLES if name in os.environ]
        if "WORLD_SIZE" not in given:
            return cls()
        try:
            rank, size, local_rank, local_size = (int(os.environ[name]) for name in RANK_VARIABLES)
        except (KeyError, ValueError) as error:
            raise InputError(
                f"the environment names {', '.join(given)}, and not all of {', '.join(RANK_VARIABLES)}"
            ) from error
        if not (0 <= rank < size and 0 <= local_rank < local_size <= size and size in PROCESSES):
            values = ", ".join(f"{name}={os.environ[name]}" for name in RANK_VARIABLES)
            raise InputError(f"the environment says {values}; a rank is below its size, and sizes are {PROCESSES}")
        return cls(rank, size, local_rank, local_size)

    @property
    def first(self) -> bool:
        """True for the process that prints, and writes the files that are written once."""
        return self.rank == 0

    def join(self) -> None:
        """Connects the processes if there are several, each to a GPU of its own if there are GPUs.

        Raises: InputError if this machine has fewer GPUs than processes, or the processes do not find each other.
        """
        from torch import cuda, distributed

        backend = "gloo"
        if cuda.is_available():
            _check_gpus(self.local_size, cuda.device_count(), "this machine has")
            cuda.set_device(self.local_rank)
            backend = "cpu:gloo,cuda:nccl"
        if self.size == 1 or distributed.is_initialized():
            return
        from torch.distributed.rendezvous import rendezvous

        address = ":".join(map(str, master_address()))
        # One process may list or hash millions of files while the others wait.
        timeout = timedelta(days=1)
        try:
            store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=JOIN_TIMEOUT)))
            store.set_timeout(timeout)
            distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
            _joined_at.append(address)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise InputError(
                f"{self.size} processes did not meet at {address} within {JOIN_TIMEOUT} s ({reason}); look whether all"
                " of them were started, with the address of the first one's machine in MASTER_ADDR"
            ) from error

    def join_apart(self) -> None:
        """Joins processes that share out whole runs, each of which has one process.

        After this call the environment describes a single process with one GPU, for ``here``, Lightning and others.
        Call this method before CUDA is initialized and Lightning is imported, since both remember the environment.

        Raises: the errors of ``join``.
        """
        if self.size == 1:
            return
        from torch import cuda

        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is None:
            # This counts by NVML: CUDA, once initialized, would not read the environment again.
            gpus, has = [str(i) for i in range(cuda.device_count())], "this machine has"
        else:
            gpus, has = [name for name in visible.split(",") if name], "CUDA_VISIBLE_DEVICES names"
        if gpus:
            _check_gpus(self.local_size, len(gpus), has)
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus[self.local_rank]
        self._replace(local_rank=0, local_size=1).join()
        for name in (*RANK_VARIABLES, "TORCHELASTIC_RUN_ID"):
            os.environ.pop(name, None)

    def leave(self) -> None:
        """Disconnects from the other processes."""
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()

    @contextmanager
    def raise_on_any_rank(self) -> Iterator[None]:
        """Raises an error of the block on all processes if one of them has one; they must not communicate in the block.

        Raises: the error of the block in the first process that has one; ErrorOnAnotherRank in all others.
        """
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            failed = error
        # Some errors have no text.
        text = None if failed is None else str(failed) or type(failed).__name__
        for rank, reason in enumerate(self.all_gather(text)):
            if failed is not None and rank == self.rank:
                raise failed
            if reason is not None:
                raise ErrorOnAnotherRank(reason)

    def broadcast_from_rank0(self, work: Callable[[], T]) -> T:
        """Returns, on all processes, the result of ``work`` on the first one, which must be picklable.

        Raises: the errors of ``raise_on_any_rank``.
        """
        result: list[T | None] = [None]
        with self.raise_on_any_rank():
            if self.first:
                result[0] = work()
        if self.size > 1:
            from torch import distributed

            distributed.broadcast_object_list(result)
        return result[0]  # type: ignore[return-value]

    def all_reduce_any(self, *flags: bool) -> list[bool]:
        """Returns for each of ``flags`` whether it is set in any process; cheap."""
        if self.size == 1:
            return list(flags)
        import torch

        reduced = torch.tensor(flags, dtype=torch.uint8)
        torch.distributed.all_reduce(reduced, torch.distributed.ReduceOp.MAX)
        return [bool(flag) for flag in reduced.tolist()]

    def all_gather(self, own: T) -> Sequence[T]:
        """Returns, on all processes, ``own`` of each process in the order of ranks; it must be picklable."""
        if self.size == 1:
            return [own]
        from torch import distributed

        gathered: list[T | None] = [None] * self.size
        distributed.all_gather_object(gathered, own)
        return gathered  # type: ignore[return-value]


class ErrorOnAnotherRank(InputError):
    """Raised in a process when another one has an error, which that one reports itself."""


class PeerLost(ErrorOnAnotherRank):
    """Raised when another process has ended; that process has reported the reason if it could."""


def is_peer_lost(error: BaseException) -> bool:
    """Returns whether ``error`` is, by its text, one that torch.distributed raises when another process has ended."""
    # An OSError may come from a file or pipe of this process.
    return isinstance(error, PeerLost) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in PEER_LOST_WORDS)
    )


def has_joined() -> bool:
    """Returns whether this process has ever joined others."""
    return bool(_joined_at)


def master_address() -> tuple[str, int]:
    """Returns (MASTER_ADDR, MASTER_PORT). Raises: InputError if one is missing or not valid."""
    host, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    if not host:
        raise InputError("several processes meet on the first one's machine: set MASTER_ADDR to its address")
    if not (port.isdecimal() and 0 < int(port) < 2**16):
        raise InputError(f"MASTER_PORT is {port!r}; it must be a number from 1 to {2**16 - 1}")
    try:
        socket.getaddrinfo(host, int(port))
    except OSError as error:
        raise InputError(f"MASTER_ADDR is {host!r}, and no machine is known by that name ({error})") from error
    return host, int(port)


def _check_gpus(processes: int, gpus: int, has: str) -> None:
    if gpus < processes:
        raise InputError(f"{processes} processes, but {has} {gpus} GPUs; start as many")


SINGLE_PROCESS: ProcessGroup = ProcessGroup()
"""A process without others."""
