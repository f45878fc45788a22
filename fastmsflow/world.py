"""The processes that share one piece of work, as torchrun starts them. torch is imported when they are several."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
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
            # One may list or hash millions of files while the others wait.
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            torch.distributed.init_process_group(backend, timeout=timedelta(days=1))

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

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block in which the processes say nothing to each other: what goes wrong in one of them ends all of them.

        Errors: what the block raised; in the others, and in all but the first where it went wrong in several,
        Elsewhere.
        """
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            failed = error
        # Some have no text.
        text = None if failed is None else str(failed) or type(failed).__name__
        told = next(((rank, text) for rank, text in enumerate(self.gathered(text)) if text is not None), None)
        if told is None:
            return
        if failed is not None and told[0] == self.rank:
            raise failed
        raise Elsewhere(told[1])

    def once(self, work: Callable[[], T]) -> T:
        """``work``, done by the first process; its result, which must be picklable, on all of them. Errors: as
        ``together``'s."""
        result: list[T | None] = [None]
        with self.together():
            if self.first:
                result[0] = work()
        if self.size > 1:
            from torch import distributed

            distributed.broadcast_object_list(result)
        return result[0]  # type: ignore[return-value]

    def any(self, *flags: bool) -> list[bool]:
        """For each of ``flags``, whether it is set in any of the processes; cheap."""
        if self.size == 1:
            return list(flags)
        import torch

        together = torch.tensor(flags, dtype=torch.uint8)
        torch.distributed.all_reduce(together, torch.distributed.ReduceOp.MAX)
        return [bool(flag) for flag in together.tolist()]

    def gathered(self, own: T) -> Sequence[T]:
        """What each process has, in the order of their ranks, on all of them; ``own`` must be picklable."""
        if self.size == 1:
            return [own]
        from torch import distributed

        everyone: list[T | None] = [None] * self.size
        distributed.all_gather_object(everyone, own)
        return everyone  # type: ignore[return-value]


class Elsewhere(InputError):
    """Happened in another process, which tells of it."""


ALONE: World = World()
"""The only process there is."""
