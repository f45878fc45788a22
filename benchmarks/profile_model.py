"""Says which kernels this library's flow, prediction and training step spend a GPU's time in.

``python -m benchmarks.profile_model`` prints a table each, longest first, at batch 8.
"""

import argparse
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.contestants import FastMSFlow
from benchmarks.suite_settings import DEVICE, SIZES, synchronize
from fastmsflow import MSFlow

BATCH = 8
CALLS = 5
ROWS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="default", help="small: for tests")
    size = SIZES[parser.parse_args().size]
    torch.manual_seed(0)
    model = MSFlow(size.extractor, pretrained=False, image_size=(size.image, size.image), blocks=size.blocks)
    ours = FastMSFlow(model.flow.to(DEVICE), size.grids, model.to(DEVICE).eval())
    images = torch.rand(BATCH, 3, size.image, size.image, device=DEVICE).contiguous(memory_format=ours.layout)
    features = [level.detach().clone() for level in ours.training_features(images)]
    inference = [ours.adapt(level) for level in features]
    for name, call in {
        "flow inference": lambda: ours.likelihoods(inference),
        "end-to-end inference": lambda: ours.predict(images),
        "flow training step": lambda: ours.step(features),
    }.items():
        print(f"{name}, batch {BATCH}, {CALLS} calls\n{profiled(call)}", flush=True)


def profiled(call: Callable[[], object]) -> str:
    for _ in range(3):
        call()
    synchronize()
    on_gpu = DEVICE.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as result:
        for _ in range(CALLS):
            call()
        synchronize()
    key = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    return result.key_averages().table(sort_by=key, row_limit=ROWS, max_name_column_width=80)


if __name__ == "__main__":
    main()
