"""Measures pixel metrics of large maps in constant memory: processor time and peak memory for 50 and 200 maps.

``python -m benchmarks.pixel_metrics [--side 2048] [--images 50 200] [--threads 1 2]`` prints a Markdown table. Every
map is made anew, which is not counted in the time; each line is measured in a process of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from benchmarks.suite_settings import environment
from fastmsflow.calibration import Calibration
from fastmsflow.data import Sample
from fastmsflow.distributed.process_group import SINGLE_PROCESS
from fastmsflow.evaluation.evaluator import Calibrator, Evaluator
from fastmsflow.evaluation.ground_truth import GroundTruth
from fastmsflow.evaluation.pixel_decisions import PixelDecisions
from fastmsflow.metrics import Bins, PixelHistogram, Regions
from fastmsflow.pixel_calibration import PixelThresholds
from fastmsflow.scoring import Scores

LEVELS = 3
THRESHOLD = 6.0
SAMPLE_MAPS = 2
Seconds = Counter[str]


@contextmanager
def measured(seconds: Seconds, part: str) -> Iterator[None]:
    begin = time.process_time()
    yield
    seconds[part] += time.process_time() - begin


def images(count: int, side: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields masks (1, side, side) bool and maps in nats, float32; every other image is good."""
    for number in range(count):
        generator = np.random.default_rng(number)
        coarse = generator.standard_normal((side // 32, side // 32), np.float32)
        nats = np.exp(0.5 * np.kron(coarse, np.ones((32, 32), np.float32)))
        nats += generator.standard_exponential((side, side), np.float32)
        mask = np.zeros((side, side), bool)
        for y, x in generator.integers(0, side * 15 // 16, (5 * (number % 2), 2)):
            mask[y : y + side // 20, x : x + side // 32] = True
        nats[mask] += 2
        yield mask[None], nats[None]


def one_kind_of_map(count: int, side: int) -> Seconds:
    """SegF1 at a threshold and at the best one, and AUPRO to 0.05 and 0.3, of one map of each image."""
    seconds: Seconds = Counter()
    labels = np.arange(count) % 2
    decisions = PixelDecisions(THRESHOLD, labels, SINGLE_PROCESS)
    sample: list[tuple[Regions, np.ndarray]] = []
    histogram: PixelHistogram | None = None
    for number, (mask, score_map) in enumerate(images(count, side)):
        with measured(seconds, "regions"):
            regions = Regions(mask)
        with measured(seconds, "SegF1 at a threshold"):
            decisions.add([number], score_map, mask)
        if histogram is not None:
            with measured(seconds, "histogram"):
                histogram.update(regions, score_map)
            continue
        sample.append((regions, score_map))
        if len(sample) == SAMPLE_MAPS:
            with measured(seconds, "bins"):
                histogram = PixelHistogram(Bins.from_samples(sample))
            with measured(seconds, "histogram"):
                for of_image, given in sample:
                    histogram.update(of_image, given)
            sample.clear()
    assert histogram is not None
    with measured(seconds, "SegF1 at a threshold"):
        decisions.compute()
    with measured(seconds, "SegF1-max, AUPRO"):
        found = [histogram.f1_max(), histogram.aupro(0.3), histogram.aupro(0.05)]
    assert max(metric.error for metric in found) <= 1e-4
    return seconds


def scores_of(nats: np.ndarray) -> Scores:
    log_likelihood = -torch.from_numpy(nats)
    peak = log_likelihood.amax(dim=(1, 2))
    log_likelihood -= peak[:, None, None]
    likelihood = log_likelihood.exp()
    top = -log_likelihood.amin(dim=(1, 2))
    return Scores(1 - (-top).exp(), top, LEVELS * likelihood, log_likelihood, peak)


def whole_evaluator(count: int, side: int) -> Seconds:
    """Every metric of ``evaluate``, of its four maps of each image, and of decisions on pixels."""
    seconds: Seconds = Counter()
    samples = [Sample(Path(f"{number}.png"), number % 2) for number in range(count)]
    labels = np.array([sample.label for sample in samples])
    thresholds = PixelThresholds((0.001,), (THRESHOLD,), (0.0,), (0.1,))
    calibration = Calibration((1.0,) * 30, (1.0,) * 30, 0.5, pixels=thresholds)
    known = GroundTruth(samples, labels, None, True, False, None)
    evaluator = Evaluator(known, LEVELS, calibration=calibration)
    for number, (mask, nats) in enumerate(images(count, side)):
        scores = scores_of(nats)
        with measured(seconds, "all metrics"):
            evaluator.add([number], scores, mask)
    with measured(seconds, "all metrics"):
        evaluator.complete()
        evaluator.result()
    return seconds


def calibration(count: int, side: int) -> Seconds:
    """The thresholds of images, regions and pixels, from the maps of ``count`` good images."""
    seconds: Seconds = Counter()
    calibrator = Calibrator([f"{number}.png" for number in range(count)])
    for number, (_, nats) in enumerate(images(count, side)):
        scores = scores_of(nats)
        with measured(seconds, "profiles"):
            calibrator.add([number], scores)
    with measured(seconds, "thresholds, intervals"):
        calibrator.calibration(0.05)
    return seconds


CASES: dict[str, Callable[[int, int], Seconds]] = {
    "one kind of map": one_kind_of_map,
    "whole evaluator": whole_evaluator,
    "calibration": calibration,
}


def peak_mib() -> float:
    # Not ru_maxrss: a process begins with its parent's.
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=2048)
    parser.add_argument("--images", type=int, nargs="+", default=[50, 200])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--case", choices=CASES, help="measure one alone, in this process: of use to this script")
    options = parser.parse_args()
    if options.case:
        seconds = CASES[options.case](options.images[0], options.side)
        print(json.dumps({"seconds": seconds, "peak": peak_mib()}))
        return
    print(f"{environment()['device']}, torch {torch.__version__}, numpy {np.__version__}; maps of {options.side}^2\n")
    print("| what | maps | threads | processor time, s | of these | peak memory, MiB |\n|---|---|---|---|---|---|")
    for case in CASES:
        for threads in options.threads:
            for count in options.images:
                command = [sys.executable, "-m", "benchmarks.pixel_metrics", "--case", case, "--images", str(count)]
                done = subprocess.run(
                    [*command, "--side", str(options.side)], check=True, capture_output=True, text=True,
                    env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                )  # fmt: skip
                found = json.loads(done.stdout)
                parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in found["seconds"].items())
                total = sum(found["seconds"].values())
                print(f"| {case} | {count} | {threads} | {total:.1f} | {parts} | {found['peak']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
