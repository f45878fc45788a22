"""The processes that share one piece of work, as torchrun starts them. torch is imported when they are several."""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple, TypeVar

from ..errors import InputError

T = TypeVar("T")
_met: list[str] = []
"""Where this process has met others."""
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# Machines do not all start at once.
JOIN_TIMEOUT = 900
# gloo's and NCCL's words for a process at the other end that is no more.
PEER_LOST_WORDS = (
    "Connection closed by",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exit",
    "communicator was aborted",
)


class ProcessGroup(NamedTuple):
    """One process among all of them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among those of this machine: the number of its GPU."""
    local_size: int = 1

    @classmethod
    def here(cls) -> "ProcessGroup":
        """This process, by the environment that torchrun sets. Slurm's srun does not: let it start one torchrun, or one
        `fastmsflow train --devices N --nodes M`, on each machine, by ``--ntasks-per-node 1``.

        Errors: InputError where that is not whole.
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
        return cls(rank, size, local_rank, local_size)

    @property
    def first(self) -> bool:
        """Whether it is the one that speaks and writes what is written once."""
        return self.rank == 0

    def join(self) -> None:
        """Brings the processes together, where they are several, each on the GPU of its own where there are GPUs.

        Errors: InputError where this machine has fewer GPUs than processes, or they do not find each other.
        """
        import torch

        if torch.cuda.is_available():
            _check_gpus(self.local_size, torch.cuda.device_count(), "this machine has")
            torch.cuda.set_device(self.local_rank)
        if self.size > 1 and not torch.distributed.is_initialized():
            self._meet("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")

    def _meet(self, backend: str) -> None:
        from torch import distributed
        from torch.distributed.rendezvous import rendezvous

        where = ":".join(map(str, master_address()))
        # One may list or hash millions of files while the others wait.
        patient = timedelta(days=1)
        try:
            store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=JOIN_TIMEOUT)))
            store.set_timeout(patient)
            distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patient)
            _met.append(where)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise InputError(
                f"{self.size} processes did not meet at {where} within {JOIN_TIMEOUT} s ({reason}); look whether all of"
                " them were started, with the address of the first one's machine in MASTER_ADDR"
            ) from error

    def join_apart(self) -> None:
        """As ``join``, for processes that share out whole runs: what looks at the environment from here on, ``here``
        and Lightning among others, finds one process with one GPU, its own. To be called before CUDA is begun and
        Lightning is imported, which remember what they saw.

        Errors: as ``join``'s.
        """
        if self.size == 1:
            return
        from torch import cuda

        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is None:
            # By NVML: CUDA, once begun, would not look at the environment again.
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
        """After the last word between them."""
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()

    @contextmanager
    def raise_on_any_rank(self) -> Iterator[None]:
        """A block in which the processes say nothing to each other: what goes wrong in one of them ends all of them.

        Errors: what the block raised; in the others, and in all but the first where it went wrong in several,
        ErrorOnAnotherRank.
        """
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            failed = error
        # Some have no text.
        text = None if failed is None else str(failed) or type(failed).__name__
        told = next(((rank, text) for rank, text in enumerate(self.all_gather(text)) if text is not None), None)
        if told is None:
            return
        if failed is not None and told[0] == self.rank:
            raise failed
        raise ErrorOnAnotherRank(told[1])

    def broadcast_from_rank0(self, work: Callable[[], T]) -> T:
        """``work``, done by the first process; its result, which must be picklable, on all of them. Errors: as
        ``together``'s."""
        result: list[T | None] = [None]
        with self.raise_on_any_rank():
            if self.first:
                result[0] = work()
        if self.size > 1:
            from torch import distributed

            distributed.broadcast_object_list(result)
        return result[0]  # type: ignore[return-value]

    def all_reduce_any(self, *flags: bool) -> list[bool]:
        """For each of ``flags``, whether it is set in any of the processes; cheap."""
        if self.size == 1:
            return list(flags)
        import torch

        together = torch.tensor(flags, dtype=torch.uint8)
        torch.distributed.all_reduce(together, torch.distributed.ReduceOp.MAX)
        return [bool(flag) for flag in together.tolist()]

    def all_gather(self, own: T) -> Sequence[T]:
        """What each process has, in the order of their ranks, on all of them; ``own`` must be picklable."""
        if self.size == 1:
            return [own]
        from torch import distributed

        everyone: list[T | None] = [None] * self.size
        distributed.all_gather_object(everyone, own)
        return everyone  # type: ignore[return-value]


class ErrorOnAnotherRank(InputError):
    """Happened in another process, which tells of it."""


class PeerLost(ErrorOnAnotherRank):
    """Another process has gone; it has told why, if it could."""


def is_peer_lost(error: BaseException) -> bool:
    """Whether ``error``, by its text, is what torch.distributed raises in those that are left."""
    # Without the OSErrors of files and pipes of our own.
    return isinstance(error, PeerLost) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in PEER_LOST_WORDS)
    )


def has_joined() -> bool:
    """Whether this process has joined others, which may have parted since."""
    return bool(_met)


def master_address() -> tuple[str, int]:
    """(MASTER_ADDR, MASTER_PORT). Errors: InputError where one is missing or cannot be one."""
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
"""The only process there is."""
