"""``predict --format parquet`` on one machine, by one process and by a local Ray: images a second and peak memory.

``python benchmarks/predict_rates.py``: an untrained model on the demo's backbone at 256x256, and JPEG photographs of
512x512. A rate counts the images alone: of two runs of 64 and of 320 images, the difference. Start-up is the rest of
the smaller one. Memory is that of all processes together, pages that they share once (PSS). All ways are run in turns,
three times; each figure is the median, and a rate has the least and the most beside it. Linux, 9 minutes on two cores.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage import data as photographs

from fastmsflow import MSFlow

FEW, MANY = 64, 320
ROUNDS = 3
SIDE, MODEL_SIDE = 512, 256
WAYS = {
    "one process, which reads too": ("--workers", "0"),
    "one process and 2 that read": ("--workers", "2"),
    "Ray, 2 actors": ("--cluster", "ray"),
}


def measured(arguments: list[str]) -> tuple[float, float]:
    """Runs ``python -m fastmsflow ARGUMENTS`` -> (seconds, MiB at the peak)."""
    call = [sys.executable, "-m", "fastmsflow", *arguments]
    begin, peak = time.perf_counter(), 0.0
    process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        peak = max(peak, sum(map(memory, family(process.pid))))
        time.sleep(0.25)
    if process.returncode:
        raise SystemExit(process.communicate()[1])
    return time.perf_counter() - begin, peak


def family(process: int) -> set[int]:
    """The process and all that it has started."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = {process}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def memory(process: int) -> float:
    """MiB; 0 of a process that has ended."""
    with suppress(OSError, StopIteration):
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("Pss:")).split()[1]) / 1024
    return 0.0


def made(folder: Path) -> None:
    """m.safetensors, and the folders few and many of images."""
    torch.manual_seed(0)
    MSFlow("tf_efficientnet_lite0", pretrained=False, image_size=(MODEL_SIDE, MODEL_SIDE)).save(
        folder / "m.safetensors"
    )
    brick = np.stack([photographs.brick()] * 3, axis=-1)
    for name, count in (("few", FEW), ("many", MANY)):
        (folder / name).mkdir()
        for i in range(count):
            pixels = np.roll(brick, (7 * i, 3 * i), (0, 1))[:SIDE, :SIDE]
            Image.fromarray(pixels).save(folder / f"{name}/{i:04}.jpg", quality=90)


def run(way: str, turn: int, folder: Path) -> tuple[float, float, float]:
    """(images a second, seconds of start-up, MiB at the peak)."""
    taken = {}
    for images in ("few", "many"):
        out = str(folder / f"{way} {turn} {images}")
        arguments = [str(folder / "m.safetensors"), str(folder / images), "--out", out, "--format", "parquet"]
        taken[images] = measured(["predict", *arguments, *WAYS[way], "--quiet"])
    (few, _), (many, peak) = taken["few"], taken["many"]
    rate = (MANY - FEW) / (many - few)
    return rate, few - FEW / rate, peak


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made(Path(folder))
        runs = [(way, run(way, turn, Path(folder))) for turn in range(ROUNDS) for way in WAYS]
    print("| way | images/s | start-up | peak memory |\n|---|---|---|---|")
    for name in WAYS:
        rates, starts, peaks = zip(*(figures for way, figures in runs if way == name), strict=True)
        rate = f"{statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})"
        print(f"| {name} | {rate} | {statistics.median(starts):.0f} s | {statistics.median(peaks):.0f} MiB |")


if __name__ == "__main__":
    main()
