"""Counts how wide the kernels' loads and stores of memory are, by compiling ahead of time: no GPU is needed.

``python benchmarks/access_width.py --kernel coupling`` compiles the kernels as their launchers launch them at the
default model's shapes in half precision (bfloat16; those of scores in float32), reads the machine code (SASS) and
prints a Markdown table; ``--json`` prints the counts. The counts are of instructions in the code: one in a loop counts
once.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.kernel_resources import BATCH, TARGETS, compiling_for, inspected
from fastmsflow.benchmarking import LEVELS, KernelCase, kernel_cases

NVIDIA = [name for name in TARGETS if name.startswith("sm_")]
# A warp's threads fill a line of 128 bytes with four bytes each, and half of one with two.
NARROW = 4
# The instructions as NVIDIA's "CUDA Binary Utilities" lists them, by the memory that they access.
KINDS = {
    "LDG": "global loads",
    "LD": "global loads",
    "STG": "global stores",
    "ST": "global stores",
    "LDGSTS": "global to shared",
    "RED": "global atomics",
    "REDG": "global atomics",
    "ATOM": "global atomics",
    "ATOMG": "global atomics",
    "LDS": "shared loads",
    "LDSM": "shared loads",
    "STS": "shared stores",
    "STSM": "shared stores",
}
COLUMNS = list(dict.fromkeys(KINDS.values()))
TMA = ("UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP")
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


@dataclass(frozen=True)
class Counts:
    """The instructions of one kernel's machine code."""

    instructions: int
    """All but those that do nothing."""
    widths: dict[str, dict[int, int]]
    """For each of ``COLUMNS`` that occurs, the number of instructions by the bytes that one moves for a thread."""
    tma: int
    """Copies by the tensor memory accelerator, each of a whole tile."""

    @property
    def narrow(self) -> int:
        """The number of instructions that move fewer than ``NARROW`` bytes from or to global memory."""
        in_global = (found for kind, found in self.widths.items() if kind.startswith("global"))
        return sum(n for found in in_global for width, n in found.items() if width < NARROW)


@dataclass(frozen=True)
class Accesses:
    """One kernel compiled for one case and target."""

    kernel: str
    case: str
    target: str
    counts: Counts


def counted(sass: str) -> Counts:
    """Counts the instructions of one kernel in the text that ``nvdisasm -c`` prints."""
    names = [name for name in INSTRUCTION.findall(sass) if name != "NOP"]
    operations = [(operation, modifiers) for operation, *modifiers in (name.split(".") for name in names)]
    found = Counter((KINDS[o], _width(o, modifiers)) for o, modifiers in operations if o in KINDS)
    widths: dict[str, dict[int, int]] = {}
    for (kind, width), n in sorted(found.items()):
        widths.setdefault(kind, {})[width] = n
    return Counts(len(names), widths, sum(o in TMA for o, _ in operations))


def _width(operation: str, modifiers: Sequence[str]) -> int:
    if operation in ("LDSM", "STSM"):  # One, two or four matrices, and four bytes of each for a thread.
        return 4 * int(modifiers[-1]) if modifiers[-1] in ("2", "4") else 4
    return next((WIDTHS[modifier] for modifier in modifiers if modifier in WIDTHS), 4)


def measure(target: str, launchers: Sequence[str]) -> list[Accesses]:
    """Compiles the cases of ``launchers`` for ``target``; code that a case launches repeatedly comes once."""
    results: list[Accesses] = []
    for case in _half_precision():
        if case.tiles not in launchers:
            continue
        with compiling_for(target) as compiled:
            case.launch()
        for name, code in compiled:
            counts = counted(inspected(code.asm["cubin"], "nvdisasm", "-c"))
            accesses = Accesses(name, case.name, target, counts)
            if accesses not in results:
                results.append(accesses)
    return results


def _half_precision() -> Iterator[KernelCase]:
    return kernel_cases(LEVELS, BATCH, 512, torch.device("meta"), dtypes=[torch.bfloat16])


def table(results: Sequence[Accesses]) -> str:
    """Markdown: a row for each kernel, case and target, and below a list of those with narrow accesses."""
    lines = [
        f"Instructions by the bytes that each moves for a thread; Triton {triton.__version__}.",
        "",
        "| kernel | case | target | instructions | " + " | ".join(COLUMNS) + " | TMA copies |",
        "|---" * (len(COLUMNS) + 5) + "|",
    ]
    for r in results:
        widths = [r.counts.widths.get(kind, {}) for kind in COLUMNS]
        cells = [", ".join(f"{width} B: {n}" for width, n in found.items()) for found in widths]
        row = [r.kernel, r.case, r.target, str(r.counts.instructions), *cells, str(r.counts.tma or "")]
        lines.append("| " + " | ".join(row) + " |")
    lines += ["", f"Accesses of global memory narrower than {NARROW} bytes:", ""]
    narrow = [f"- {r.kernel}, {r.case}, {r.target}: {r.counts.narrow}" for r in results if r.counts.narrow]
    return "\n".join([*lines, *(narrow or ["- none"])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the counts, not a table")
    parser.add_argument("--target", choices=NVIDIA, action="append", help="for this one, not sm_90 (may be repeated)")
    launchers = sorted({case.tiles for case in _half_precision()})
    parser.add_argument("--kernel", choices=launchers, action="append", help="only this launcher's (may be repeated)")
    options = parser.parse_args()
    results = [r for target in options.target or ["sm_90"] for r in measure(target, options.kernel or launchers)]
    print(json.dumps([asdict(r) for r in results]) if options.json else table(results))


if __name__ == "__main__":
    main()
