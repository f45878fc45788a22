"""The two numbers below which no kernel can come: its arithmetic and its bytes, over what a chip was measured to do.

``python benchmarks/floors.py [--tflops T] [--terabytes B] [--batch N]`` prints them for every launcher at the default
model's shapes, in bfloat16. Counted, not measured: the chip's two limits are what is measured (group "the chip" of the
suite).
"""

import argparse

import torch
from triton.runtime import JITFunction

from fastmsflow.benchmarking import LEVELS, kernel_cases, tensors

H100 = {"tflops": 798.0, "terabytes": 3.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tflops", type=float, default=H100["tflops"], help="bfloat16 product; default: an H100's")
    parser.add_argument("--terabytes", type=float, default=H100["terabytes"], help="copy, a second, read and written")
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    # Launchers run on tensors without data, so that their outputs' sizes are known; kernels do not.
    JITFunction.__getitem__ = lambda kernel, grid: lambda *args, **options: None
    print(f"| batch {options.batch}, bfloat16 | GFLOP | MB | us by arithmetic | us by bytes |\n|---|---|---|---|---|")
    for case in kernel_cases(LEVELS, options.batch, 512, torch.device("meta")):
        if case.arithmetic == "bfloat16" or case.tiles in ("score_map", "image_score"):
            moved = sum(
                x.numel() * x.element_size() for x in tensors([case.launch.args, case.launch.keywords, case.launch()])
            )
            by_arithmetic, by_bytes = case.flops / options.tflops / 1e6, moved / options.terabytes / 1e6
            columns = (f"{case.flops / 1e9:.2f}" if case.flops else "", f"{moved / 1e6:.1f}")
            floors = (f"{by_arithmetic:.1f}" if case.flops else "", f"{by_bytes:.1f}")
            print(f"| {case.tiles}: {case.name} | " + " | ".join((*columns, *floors)) + " |")


if __name__ == "__main__":
    main()
