"""Processes of tests, forked off one server that has everything imported."""

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing

# The server takes the list when its first process starts, so that there is one list for all tests.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "pytest",
        "timm",
        "webdataset",
        "fastmsflow.training.train",
        "fastmsflow.training.every_class",
        "fastmsflow.evaluation.report",
        # Lightning imports it before it writes its first file.
        "s3fs",
    ]
)


def run_processes(function: Callable[..., None], args: tuple[Any, ...], count: int) -> None:
    """Calls ``function(rank, *args)`` in ``count`` processes and waits for them; an error in one is raised."""
    torch.multiprocessing.start_processes(function, args, count, start_method="forkserver")
