"""The processes that share one piece of work, as torchrun starts them. torch is imported when they are several."""

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from .errors import InputError

T = TypeVar("T")
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


class World(NamedTuple):
    """One process among all of them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among those of this machine: the number of its GPU."""
    local_size: int = 1

    @classmethod
    def here(cls) -> "World":
        """This process, by the environment that torchrun (and Slurm's and others' launchers like it) sets.

        Errors: InputError where that is not whole.
        """
        given = [name for name in PLACE if name in os.environ]
        if "WORLD_SIZE" not in given:
            return cls()
        try:
            rank, size, local_rank, local_size = (int(os.environ[name]) for name in PLACE)
        except (KeyError, ValueError) as error:
            raise InputError(f"the environment names {', '.join(given)}, and not all of {', '.join(PLACE)}") from error
        return cls(rank, size, local_rank, local_size)

    @property
    def first(self) -> bool:
        """Whether it is the one that speaks and writes what is written once."""
        return self.rank == 0

    def join(self) -> None:
        """Brings the processes together, where they are several, each on the GPU of its own where there are GPUs."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.set_device(self.local_rank)
        if self.size > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")

    def join_apart(self) -> None:
        """As ``join``, for processes that share out whole runs: what looks at the environment from here on, ``here``
        and Lightning among others, finds one process with one GPU, its own. To be called before CUDA is begun and
        Lightning is imported, which remember what they saw.

        Errors: InputError where this machine has fewer GPUs than processes.
        """
        if self.size == 1:
            return
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = [name for name in visible.split(",") if name] if visible is not None else None
        if gpus is not None and 0 < len(gpus) <= self.local_rank:
            raise InputError(f"{self.local_size} processes, but CUDA_VISIBLE_DEVICES names {visible}; start as many")
        if gpus != []:
            os.environ["CUDA_VISIBLE_DEVICES"] = str(self.local_rank) if gpus is None else gpus[self.local_rank]
        self._replace(local_rank=0).join()
        for name in (*PLACE, "TORCHELASTIC_RUN_ID"):
            os.environ.pop(name, None)

    def leave(self) -> None:
        """After the last word between them."""
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()

    def once(self, work: Callable[[], T]) -> T:
        """``work``, done by the first process; its result, which must be picklable, on all of them.

        Errors: on each of them what ``work`` raised, if it is an InputError.
        """
        if self.size == 1:
            return work()
        from torch import distributed

        outcome: list[object] = [None, None]
        failed: Exception | None = None
        if self.first:
            try:
                outcome[0] = work()
            except Exception as error:
                failed = error
                outcome[1] = str(error)
        distributed.broadcast_object_list(outcome)
        if failed is not None:
            raise failed
        if outcome[1] is not None:
            raise Elsewhere(str(outcome[1]))
        return outcome[0]  # type: ignore[return-value]

    def gathered(self, own: T) -> Sequence[T]:
        """What each process has, in the order of their ranks, on all of them; ``own`` must be picklable."""
        if self.size == 1:
            return [own]
        from torch import distributed

        everyone: list[T | None] = [None] * self.size
        distributed.all_gather_object(everyone, own)
        return everyone  # type: ignore[return-value]


class Elsewhere(InputError):
    """Happened in the first process, which tells of it."""
