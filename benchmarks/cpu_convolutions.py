"""Times the ways in which a CPU convolves 3x3, for the table in fastmsflow/cpu/convolution.py.

``python -m benchmarks.cpu_convolutions [--threads N] [--rounds N]`` prints a Markdown table: PyTorch's own convolution,
oneDNN's with packed weights, and Winograd's algorithm by both tiles, at the shapes of the default model and some
narrow ones; then a training step's convolution, forward and backward. All take turns in one process; times are medians.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.suite_settings import environment
from fastmsflow import backend
from fastmsflow.cpu import onednn, winograd
from fastmsflow.cpu.convolution import SAME, Plan, winograd_plan
from fastmsflow.cpu.winograd import F2, F4
from fastmsflow.ops.conv3x3 import conv3x3

# Channels in and out, and the side of the grid.
SHAPES = {
    "level 0, conv1": (128, 192, 64),
    "level 0, conv2": (192, 256, 64),
    "level 1, conv1": (256, 320, 32),
    "level 1, conv2": (320, 512, 32),
    "level 2, conv1": (512, 576, 16),
    "level 2, conv2": (576, 1024, 16),
    "fusion, conv1": (896, 224, 16),
    "fusion, conv2": (224, 896, 16),
    "fusion, head 0": (128, 256, 64),
    "extractor, stage 1": (128, 128, 128),
    "extractor, stage 2": (256, 256, 64),
    "extractor, stage 3": (512, 512, 32),
    "narrow": (96, 96, 64),
    "narrower": (64, 64, 64),
    "lite0, level 0": (84, 40, 32),
    "lite0, level 2": (160, 224, 8),
}
TRAINED = ("level 0, conv1", "level 0, conv2", "level 1, conv1", "level 1, conv2", "fusion, head 0")
INFERENCE_BATCHES, TRAINING_BATCHES = (1, 4), (2, 8)


def operands(name: str, batch: int) -> tuple[Tensor, Tensor]:
    inputs, outputs, side = SHAPES[name]
    shapes = ((batch, inputs, side, side), (outputs, inputs, 3, 3))
    x, weight = (torch.randn(shape).contiguous(memory_format=torch.channels_last) for shape in shapes)
    return x, weight / (9 * inputs) ** 0.5


def medians(calls: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Returns each call's median time in milliseconds, where all take turns in every round."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds + 1):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(1e3 * (time.perf_counter() - start))
    # The first round warms up.
    return [median(taken[1:]) for taken in times]


@torch.no_grad()
def inference_row(name: str, batch: int, rounds: int) -> str:
    x, weight = operands(name, batch)
    plans = [Plan(onednn.pack(weight, None, SAME, x.shape), False)]
    plans += [winograd_plan(weight, None, tile, winograd.plan_chunk(x.shape, len(weight), tile)) for tile in (F2, F4)]
    plain, *others = medians(
        [partial(F.conv2d, x, weight, padding=1), *(partial(plan.convolve, x) for plan in plans)], rounds
    )
    inputs, outputs, side = SHAPES[name]
    width = inputs * outputs / (inputs + outputs)
    cells = [f"{taken:.2f} ({plain / taken:.2f}x)" for taken in others]
    return row(name, f"{inputs} to {outputs}, {side}x{side}", f"{width:.0f}", batch, f"{plain:.2f}", *cells)


def training_row(name: str, batch: int, rounds: int) -> str:
    x, weight = (operand.requires_grad_() for operand in operands(name, batch))
    calls: list[Callable[[], object]] = []
    for choice in ("torch", "auto"):
        grad_out = torch.randn_like(conv3x3(x, weight, None, "torch"))

        def step(choice: backend.Backend = choice, grad_out: Tensor = grad_out) -> None:
            torch.autograd.grad(conv3x3(x, weight, None, choice), [x, weight], grad_out)

        calls.append(step)
    plain, ours = medians(calls, rounds)
    return row(name, batch, f"{plain:.1f}", f"{ours:.1f} ({plain / ours:.2f}x)")


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = environment()
    print(f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}; float32, medians in ms.\n")
    print(row("inference", "channels and grid", "width", "batch", "PyTorch", "packed", "F(2x2)", "F(4x4)"))
    print(row(*["---"] * 8))
    for batch in INFERENCE_BATCHES:
        for name in SHAPES:
            print(inference_row(name, batch, options.rounds), flush=True)
    print(
        "\n" + row("training: forward and both gradients", "batch", "PyTorch", "fastmsflow") + "\n" + row(*["---"] * 4)
    )
    for batch in TRAINING_BATCHES:
        for name in TRAINED:
            print(training_row(name, batch, options.rounds), flush=True)


if __name__ == "__main__":
    main()
