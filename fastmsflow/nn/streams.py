"""Runs the levels' work at the same time."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


def run_on_streams(tasks: Sequence[Callable[[], T]], device: torch.device) -> list[T]:
    """Returns the results of ``tasks``, none of which needs another's result.

    While a CUDA graph is captured, each task runs on a stream of its own, forked from the current one and joined to it
    again, so that replays run them at the same time. Otherwise tasks run one after the other: launched from Python,
    kernels seldom queue up far enough to overlap.
    """
    if torch.compiler.is_compiling() or device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return [task() for task in tasks]
    current = torch.cuda.current_stream(device)
    streams = [torch.cuda.Stream(device) for _ in tasks]
    results = []
    for task, stream in zip(tasks, streams, strict=True):
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            results.append(task())
    for stream in streams:
        current.wait_stream(stream)
    return results
