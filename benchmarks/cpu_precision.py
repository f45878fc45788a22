"""Measures processor time on one thread of a CPU, in turns: inference by dtype, compiled or not, and training steps.

``python benchmarks/cpu_precision.py [--size 256] [--compile] [--training]``; the model is WideResNet-50-2 with random
weights, and the batch one image. A row is a median; each round calls every contestant once.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch

from fastmsflow import MSFlow

DTYPES = (torch.float32, torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--extractor", default="wide_resnet50_2")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="compile both models too, for minutes")
    parser.add_argument("--training", action="store_true", help="measure steps of the flow in place of inference")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = MSFlow(options.extractor, pretrained=False, image_size=(options.size, options.size)).eval()
    images = torch.rand(options.batch, 3, options.size, options.size)
    calls = training_steps(model, images) if options.training else inference(model, images, options.compile)
    print("| | processor time, ms |\n|---|---|")
    for name, seconds in measured(calls, options.rounds).items():
        print(f"| {name} | {1000 * seconds:.1f} |", flush=True)


def inference(model: MSFlow, images: torch.Tensor, compiled: bool) -> dict[str, Callable[[], object]]:
    calls: dict[str, Callable[[], object]] = {}
    for dtype in DTYPES:
        for compile in (False, True) if compiled else (False,):
            fast = model.for_inference(dtype, compile=compile)
            features, name = fast.features(images), f"{str(dtype)[6:]}{', compiled' if compile else ''}"
            calls[f"features, {name}"] = lambda fast=fast: fast.features(images)
            calls[f"flow and scores, {name}"] = lambda fast=fast, x=features: fast.scores_of_features(x)
    return calls


def training_steps(model: MSFlow, images: torch.Tensor) -> dict[str, Callable[[], object]]:
    features = [level.contiguous(memory_format=torch.channels_last) for level in model.features(images)]

    def step(precision: str) -> Callable[[], object]:
        flow = copy.deepcopy(model.flow).train().to(memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(flow.parameters(), lr=1e-4, fused=True)

        def one() -> None:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                loss = flow.nll(features).mean()
            loss.backward()
            optimizer.step()

        return one

    return {f"step of the flow, {precision}": step(precision) for precision in ("32-true", "bf16-mixed")}


def measured(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Returns the median of each call's processor time, in seconds; the first round, which compiles, does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            begin = time.process_time()
            with torch.set_grad_enabled("step" in name):
                call()
            if number:
                times[name].append(time.process_time() - begin)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


if __name__ == "__main__":
    main()
