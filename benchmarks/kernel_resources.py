"""What every kernel takes of a chip, by compiling ahead of time: no GPU is needed.

``python benchmarks/kernel_resources.py`` compiles the kernels as their launchers launch them at the default model's
shapes and replaces the running Triton's section of benchmarks/kernel_resources.md; ``--json`` prints the figures.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from fastmsflow.kernels import (
    conv3x3,
    conv3x3_coupling,
    conv3x3_layer_norm,
    coupling,
    fusion,
    image_score,
    layer_norm,
    likelihood,
    score_map,
    tables,
)
from fastmsflow.kernels.conv3x3_layer_norm import fuses_layer_norm

TABLE = Path(__file__).with_suffix(".md")
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory a program may take.
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
BATCH = 8
LEVELS = ((256, 64), (512, 32), (1024, 16))
CONDITION = 64
MATRIX_INSTRUCTIONS = r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma)"


@dataclass(frozen=True)
class Resources:
    """One kernel compiled for one target."""

    kernel: str
    case: str
    target: str
    registers: int
    spills: int
    """Bytes of stack a thread (NVIDIA), or spilled registers (AMD)."""
    shared: int
    """Bytes a program."""
    matrix: str
    """The matrix instruction seen, or nothing."""


class CompileOnly:
    """Stands in for the GPU's driver where kernels are compiled and never launched."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"{self.target.backend} {self.target.arch}"

    def get_current_stream(self, device: object) -> int:
        return 0


@contextmanager
def compiling_for(name: str) -> Iterator[list[tuple[str, Any]]]:
    """Launches inside compile for the target and run nothing; yields the (kernel's name, compiled kernel) of each.

    Triton's driver stays the stand-in: this process is for compiling.
    """
    compiled: list[tuple[str, Any]] = []

    def compile_only(kernel: JITFunction, grid: object) -> Callable:
        def launch_nothing(*args: object, **options: object) -> None:
            compiled.append((kernel.fn.__name__, kernel.run(*args, grid=grid, warmup=True, **options)))

        return launch_nothing

    before, chip = JITFunction.__getitem__, tables.chip
    driver.set_active(CompileOnly(TARGETS[name]))
    JITFunction.__getitem__, tables.chip = compile_only, lambda device: name
    try:
        yield compiled
    finally:
        JITFunction.__getitem__, tables.chip = before, chip


def cases() -> Iterator[tuple[str, partial]]:
    """(description, launch) of every kernel at the default model's shapes, on tensors without data."""
    for dtype in (torch.bfloat16, torch.float32):
        new = partial(_empty, dtype)
        for channels, size in LEVELS:
            x = new(BATCH, channels, size, size)
            half = x[:, : channels // 2]
            vector, log_det = (torch.empty(n, device="meta") for n in (channels, BATCH))
            perm = torch.empty(channels, device="meta", dtype=torch.int64)
            block = (0.1, 1.9, "tanh", None)
            across = (None, None, None, 1.0, 1.9, "atan")
            name = f"{channels} channels, {_name(dtype)}"
            for inverse in (False, True):
                tag = f"{name}, inverse" if inverse else name
                options = (*block, inverse, False)
                yield tag, partial(coupling.coupling, [x], x, vector, vector, perm, *options)
                yield tag, partial(coupling.coupling_backward, x, log_det, [x], x, vector, perm, *options)
            logp = torch.empty((BATCH, size, size), device="meta")
            for scored, grad in ((False, x), (True, logp)):
                tag = f"{name}, across levels{', likelihood' if scored else ''}"
                options = (1e6, False, scored)
                yield tag, partial(coupling.coupling, [half, half], x, *across, *options)
                yield (
                    tag,
                    partial(coupling.coupling_backward, grad, log_det, [half, half], x, *across[1:], *options),
                )
            width = channels // 2 + CONDITION
            hidden, rows = new(BATCH, width, size, size), torch.empty(BATCH * size * size, device="meta")
            weight = torch.empty(width, device="meta")
            precision = "tf32" if dtype == torch.float32 else "ieee"
            conv1, conv2 = new(width, channels // 2, 3, 3), new(channels, width, 3, 3)
            heads = new(channels, channels // 2, 3, 3)
            yield name, partial(conv3x3.conv3x3, hidden, conv2, vector, precision)
            yield f"{name}, input gradient", partial(conv3x3.conv3x3_input_gradient, x, conv2, precision)
            yield name, partial(conv3x3.conv3x3_weight_gradient, hidden, x, precision)
            for keep in (False, True):
                tag = f"{name}, training" if keep else name
                fixed = (vector, vector, perm, *block, precision, keep, False)
                yield tag, partial(conv3x3_coupling.conv3x3_coupling, hidden, conv2, vector, [x], *fixed)
                fixed = (*across, 1e6, precision, keep, True)
                tag += ", across levels, likelihood"
                yield tag, partial(conv3x3_coupling.conv3x3_coupling, half, heads, vector, [half, half], *fixed)
                tag = f"{name}, training" if keep else name
                if fuses_layer_norm(width):
                    norm = (hidden[:1], weight, weight, 1e-5, precision, keep)
                    yield tag, partial(conv3x3_layer_norm.conv3x3_layer_norm_relu, half, conv1, *norm)
            name = f"{width} channels, {_name(dtype)}"
            yield name, partial(layer_norm.layer_norm_relu, hidden, hidden[:1], weight, weight, 1e-5)
            yield (
                name,
                partial(layer_norm.layer_norm_relu_backward, hidden, hidden, hidden[:1], weight, weight, rows, rows),
            )
        z = [new(BATCH, channels, size, size) for channels, size in LEVELS]
        h2 = [level[:, : level.shape[1] // 2] for level in z]
        joint = new(BATCH, sum(level.shape[1] for level in h2), *z[-1].shape[2:])
        yield _name(dtype), partial(fusion.pool_and_concat, h2)
        yield f"{_name(dtype)}, backward", partial(fusion.pool_and_concat_backward, joint, h2)
        yield _name(dtype), partial(fusion.split_and_upsample, joint, h2)
        yield _name(dtype), partial(fusion.split_and_upsample_backward, h2, joint)
        logp = [torch.empty((BATCH, size, size), device="meta") for _, size in LEVELS]
        yield _name(dtype), partial(likelihood.log_likelihood_maps, z)
        yield _name(dtype), partial(likelihood.log_likelihood_maps_backward, logp, z)
    yield "512x512", partial(score_map.score_maps, logp, (512, 512))
    yield "512x512", partial(image_score.image_scores, torch.empty((BATCH, 512, 512), device="meta"), 7864)


def measure(target: str, brief: bool = False) -> list[Resources]:
    """Compiles the cases for ``target``; ``brief``: only the first of each launcher."""
    results = []
    seen: set[Callable] = set()
    for case, run in cases():
        if brief and run.func in seen:
            continue
        seen.add(run.func)
        with compiling_for(target) as compiled:
            run()
        results += [_resources(name, case, target, kernel) for name, kernel in compiled]
    return results


def _resources(name: str, case: str, target: str, kernel: Any) -> Resources:
    if target.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        registers, spills = (
            int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count")
        )
    else:
        text = kernel.asm["ptx"]
        registers, spills = _usage(kernel.asm["cubin"])
    found = re.search(MATRIX_INSTRUCTIONS, text)
    return Resources(name, case, target, registers, spills, kernel.metadata.shared, found[1] if found else "")


def _usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of a thread, by cuobjdump, which comes inside Triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])


def _empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def section(results: list[Resources]) -> str:
    """Markdown: a row per kernel and case, a column per target; of several launches the one with most registers."""
    lines = [
        f"## Triton {triton.__version__}",
        "",
        "| kernel | case | " + " | ".join(TARGETS) + " |",
        "|---" * (len(TARGETS) + 2) + "|",
    ]
    worst: dict[tuple[str, str], dict[str, Resources]] = {}
    for r in sorted(results, key=lambda r: (r.spills, r.registers)):
        worst.setdefault((r.kernel, r.case), {})[r.target] = r
    for (kernel, case), row in sorted(worst.items()):
        cells = [f"{r.registers} / {r.spills} / {r.shared} {r.matrix}".strip() for r in (row[t] for t in TARGETS)]
        lines.append(f"| {kernel} | {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the figures, write no table")
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this one (may be repeated)")
    parser.add_argument("--brief", action="store_true", help="only the first case of each launcher")
    options = parser.parse_args()
    results = [r for name in options.target or TARGETS for r in measure(name, options.brief)]
    if options.json:
        print(json.dumps([asdict(r) for r in results]))
        return
    head = (
        "# What the kernels take\n\nRegisters a thread / spills / bytes of shared memory a program, and the matrix"
        " instruction where there is one, at the default model's shapes, batch 8. Spills: bytes of stack a thread"
        " (NVIDIA), spilled registers (AMD). Compiled ahead of time, run on no GPU:"
        " `python benchmarks/kernel_resources.py`.\n\n"
    )
    old = TABLE.read_text() if TABLE.exists() else ""
    kept = [part for part in re.findall(r"(?ms)^## .*?(?=^## |\Z)", old) if f" {triton.__version__}\n" not in part]
    TABLE.write_text(head + "\n".join(sorted([*(part.rstrip() + "\n" for part in kept), section(results)])))


if __name__ == "__main__":
    main()
