"""Counts what every kernel takes of a chip by compiling ahead of time: no GPU is needed.

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
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from fastmsflow.benchmarking import LEVELS, kernel_cases
from fastmsflow.kernels import configs

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

    before, chip = JITFunction.__getitem__, configs.chip
    driver.set_active(CompileOnly(TARGETS[name]))
    JITFunction.__getitem__, configs.chip = compile_only, lambda device: name
    try:
        yield compiled
    finally:
        JITFunction.__getitem__, configs.chip = before, chip


def measure(target: str, brief: bool = False) -> list[Resources]:
    """Compiles the cases for ``target``; ``brief``: only the first of each launcher."""
    results = []
    seen: set[Callable] = set()
    for case in kernel_cases(LEVELS, BATCH, 512, torch.device("meta")):
        if brief and case.launch.func in seen:
            continue
        seen.add(case.launch.func)
        with compiling_for(target) as compiled:
            case.launch()
        results += [_resources(name, f"{case.name}, {case.arithmetic}", target, kernel) for name, kernel in compiled]
    return results


def measure_candidates(target: str) -> list[Resources]:
    """Compiles the convolutions by the tiles that are tried on a chip, for inference in half precision."""
    results = []
    for kernel, sizes in configs.PRODUCT_CANDIDATES.items():
        for size in sizes:
            tile = f"{size.m}x{size.n}x{size.k}, {size.warps} warps"
            for case in kernel_cases(LEVELS, BATCH, 512, torch.device("meta"), dtypes=[torch.bfloat16]):
                # The levels' kernels are the same, but where a row's length is the program's.
                same = case.level > 0 and kernel != "conv3x3_layer_norm"
                if case.tiles != kernel or "training" in case.name or same:
                    continue
                with compiling_for(target) as compiled, configs.force_tile(kernel, size, torch.device("cpu")):
                    case.launch()
                results += [_resources(name, f"{case.name}, {tile}", target, kernel) for name, kernel in compiled]
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
    """(registers, bytes of stack) of a thread."""
    text = inspected(cubin, "cuobjdump", "--dump-resource-usage")
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])


def inspected(cubin: bytes, tool: str, option: str) -> str:
    """Returns what ``tool``, one of NVIDIA's that come inside Triton, prints of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [Path(triton.__file__).parent / "backends/nvidia/bin" / tool, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


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
    parser.add_argument("--candidates", action="store_true", help="print those of the tiles that are tried on a chip")
    options = parser.parse_args()
    targets = options.target or TARGETS
    if options.candidates:
        results = [r for name in targets for r in measure_candidates(name)]
    else:
        results = [r for name in targets for r in measure(name, options.brief)]
    if options.json or options.candidates:
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
