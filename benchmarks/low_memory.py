"""Measures what training keeps for its backward pass, and the CPU time of a step, in each memory mode; on one core.

``python benchmarks/low_memory.py [--size N] [--batch N] [--steps N] [--bf16]`` makes the default flow on a
WideResNet-50-2's channels, random weights and features, and prints a row a mode.
"""

import argparse
import itertools
import time
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastmsflow import MultiScaleFlow
from fastmsflow.nn.activation_checkpointing import ACTIVATION_CHECKPOINTING

CHANNELS = (256, 512, 1024)
MIB = 2**20


class Live(TorchDispatchMode):
    """Follows every new storage of the operations in the block, from the operation that made it to its end."""

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, tuple[StorageWeakRef, int, int]] = {}
        self._gone: list[tuple[int, int, int]] = []
        self._operation = 0

    def here(self) -> int:
        """Bytes that live now."""
        self._look()
        return sum(size for _, size, _ in self._live.values())

    def peak(self, without: set[int]) -> int:
        """Bytes that lived at the most; ``without`` the storages that lie there."""
        self._look()
        spans = [
            *self._gone,
            *((s, b, self._operation + 1) for key, (_, s, b) in self._live.items() if key not in without),
        ]
        change = [0] * (self._operation + 2)
        for size, born, died in spans:
            change[born] += size
            change[died] -= size
        return max(itertools.accumulate(change))

    def _look(self) -> None:
        for key, (ref, size, born) in list(self._live.items()):
            if ref.expired():
                self._gone.append((size, born, self._operation))
                del self._live[key]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._look()
        self._operation += 1
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self._live.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes(), self._operation))
        return result


def step(flow: MultiScaleFlow, features: list[torch.Tensor], bf16: bool) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return flow.nll(features).mean()


def measured(flow: MultiScaleFlow, features: list[torch.Tensor], bf16: bool) -> tuple[int, int]:
    """Bytes kept after the forward pass, and at the most in both passes, besides the weights' gradients."""
    flow.zero_grad()
    with Live() as live:
        loss = step(flow, features, bf16)
        kept = live.here()
        loss.backward()
    gradients = {p.grad.untyped_storage()._cdata for p in flow.parameters() if p.grad is not None}
    return kept, live.peak(gradients)


def seconds(flow: MultiScaleFlow, features: list[torch.Tensor], bf16: bool) -> float:
    flow.zero_grad()
    begin = time.process_time()
    step(flow, features, bf16).backward()
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256, help="of the square images, a multiple of 32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3, help="timed")
    parser.add_argument("--bf16", action="store_true", help="under autocast")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    flow = MultiScaleFlow(CHANNELS).to(memory_format=torch.channels_last)
    grids = [options.size // stride for stride in (8, 16, 32)]
    features = [
        torch.rand(options.batch, c, n, n).contiguous(memory_format=torch.channels_last)
        for c, n in zip(CHANNELS, grids, strict=True)
    ]
    modes = (None, *ACTIVATION_CHECKPOINTING)
    memory, times = {}, {mode: [] for mode in modes}
    for mode in modes:
        flow.activation_checkpointing = mode
        memory[mode] = measured(flow, features, options.bf16)
    for _ in range(options.steps):
        for mode in modes:  # in turn, so that a busy machine slows all alike
            flow.activation_checkpointing = mode
            times[mode].append(seconds(flow, features, options.bf16))
    print(f"{options.batch} x {options.size} x {options.size}, {'bf16 autocast' if options.bf16 else 'float32'}")
    print("| memory | kept, MiB | peak besides gradients, MiB | fastest step, CPU s | times |\n|---|---|---|---|---|")
    for mode in modes:
        kept, peak = (f"{size / MIB:.1f}" for size in memory[mode])
        fastest = min(times[mode])
        print(f"| {mode or 'none'} | {kept} | {peak} | {fastest:.2f} | {fastest / min(times[None]):.2f} |")


if __name__ == "__main__":
    main()
