"""Results of the suite -> the tables and the plot of the README.

``python benchmarks/report.py RESULTS.json ...`` (of one machine) writes speed.md and speed.png beside the first;
``--readme`` also puts the table where README.md has its markers.
"""

import argparse
import importlib.util
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"
MARKERS = ("<!-- speed -->", "<!-- /speed -->")
OURS, FIRST = "fastmsflow", "as shipped"
GROUPS = ("flow inference", "end-to-end inference", "flow training step", "training step")
Rows = list[dict[str, Any]]


def read(paths: list[Path]) -> tuple[dict[str, Any], Rows]:
    """The machine, and the rows of all files. Errors: ValueError where they are of several machines."""
    contents = [json.loads(path.read_text()) for path in paths]
    machines = [content["machine_info"] for content in contents]
    if len({machine["device"] for machine in machines}) != 1:
        raise ValueError(f"results of several machines: {', '.join(machine['device'] for machine in machines)}")
    rehearsal = any(machine.get("rehearsal") for machine in machines)
    return machines[0] | {"rehearsal": rehearsal}, [row for content in contents for row in content["benchmarks"]]


def milliseconds(row: dict[str, Any]) -> float:
    return 1e3 * row["stats"]["median"]


def by_contestant(rows: Rows, group: str) -> dict[int, dict[str, dict[str, Any]]]:
    """{batch: {contestant: row}}."""
    found: dict[int, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        if row["group"] == group:
            found[row["extra_info"]["images"]][row["extra_info"]["contestant"]] = row
    return dict(sorted(found.items()))


def speed_table(machine: dict[str, Any], rows: Rows) -> str:
    """Milliseconds by contestant, and how many times faster ours is."""
    names = list(dict.fromkeys(r["extra_info"]["contestant"] for r in rows if r["group"] in GROUPS))
    names.sort(key=lambda name: name == OURS)
    lines = [
        "| median ms (quartiles) | batch | " + " | ".join(names) + " |",
        "|---" * (len(names) + 2) + "|",
    ]
    for group in GROUPS:
        for batch, found in by_contestant(rows, group).items():
            ours = milliseconds(found[OURS]) if OURS in found else None
            cells = [_cell(found.get(name), ours if name != OURS else None) for name in names]
            lines.append(f"| {group} | {batch} | " + " | ".join(cells) + " |")
    peaks = [row for row in rows if "peak_bytes" in row["extra_info"] and row["group"] in GROUPS]
    for group in GROUPS:
        for batch, found in by_contestant(peaks, group).items():
            cells = [f"{found[n]['extra_info']['peak_bytes'] / 2**30:.2f} GiB" if n in found else "" for n in names]
            lines.append(f"| memory at the peak, weights included: {group} | {batch} | " + " | ".join(cells) + " |")
    if machine.get("rehearsal"):
        lines.insert(0, "**A rehearsal: every row ran once, uncompiled. These times mean nothing.**\n")
    where = ", ".join(f"{key} {machine[key]}" for key in ("torch", "triton", "commit") if key in machine)
    threads = f", {machine['threads']} threads" if "driver_version" not in machine else ""
    return f"{machine['device']}{threads}; {where}.\n\n" + "\n".join(lines) + "\n"


def _cell(row: dict[str, Any] | None, ours: float | None) -> str:
    if row is None:
        return ""
    stats = row["stats"]
    text = f"{_short(milliseconds(row))} ({_short(1e3 * stats['q1'])} to {_short(1e3 * stats['q3'])})"
    return text if ours is None else f"{text}, **{milliseconds(row) / ours:.2f}x**"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def kernel_table(rows: Rows) -> str:
    """Every kernel beside the chip's measured limits, and the convolutions beside the vendor's."""
    if not any(row["group"] == "kernels" for row in rows):
        return ""
    limits = {r["name"].split("[")[0]: r for r in rows if r["group"] == "the chip"}
    if len(limits) < 2:
        return ""
    product = limits["test_matrix_product"]["extra_info"]["flops"] / limits["test_matrix_product"]["stats"]["median"]
    copy = limits["test_copy"]["extra_info"]["bytes"] / limits["test_copy"]["stats"]["median"]
    lines = [
        f"Measured limits: {product / 1e12:.3g} TFLOP/s (bfloat16 product), {copy / 1e12:.3g} TB/s (copy).\n",
        "| kernel, batch 8, bfloat16 | median us | TFLOP/s | of the product's | TB/s | of the copy's |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["group"] == "kernels":
            info = row["extra_info"]
            median = row["stats"]["median"] / info["launches"]
            flops, moved = info["flops"] / median, info["bytes"] / median
            rate = f"{flops / 1e12:.3g} | {flops / product:.0%}" if flops else " | "
            lines.append(f"| {info['case']} | {1e6 * median:.4g} | {rate} | {moved / 1e12:.3g} | {moved / copy:.0%} |")
    for group in GROUPS[:3:2]:
        for batch, found in by_contestant(rows, group).items():
            if OURS in found:
                share = found[OURS]["extra_info"]["flops"] / found[OURS]["stats"]["median"] / product
                lines.append(f"| {group}, batch {batch} | {1e3 * milliseconds(found[OURS]):.4g} | | {share:.0%} | | |")
    pairs: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row["group"].startswith("convolutions"):
            pairs[row["extra_info"]["case"]][row["extra_info"]["whose"]] = (
                1e6 * row["stats"]["median"] / row["extra_info"]["launches"]
            )
    lines += ["", "| convolution, batch 8, bfloat16 | own us | vendor's us | own / vendor's |", "|---|---|---|---|"]
    for case, pair in pairs.items():
        if len(pair) == 2:
            own, vendors = pair["own"], pair["vendor's"]
            lines.append(f"| {case} | {own:.4g} | {vendors:.4g} | {own / vendors:.2f} |")
    return "\n".join(lines) + "\n"


def plot(machine: dict[str, Any], rows: Rows, path: Path) -> None:
    """Images a second by contestant, a panel a group."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = [group for group in GROUPS if by_contestant(rows, group)]
    figure, axes = plt.subplots(1, len(groups), figsize=(3.6 * len(groups), 3.6), squeeze=False, layout="constrained")
    for axis, group in zip(axes[0], groups, strict=True):
        found = by_contestant(rows, group)
        names = list(dict.fromkeys(name for batch in found.values() for name in batch))
        for i, name in enumerate(names):
            speed = [1e3 * batch / milliseconds(row[name]) if name in row else 0.0 for batch, row in found.items()]
            at = [n + (i - (len(names) - 1) / 2) * 0.8 / len(names) for n in range(len(found))]
            axis.bar(at, speed, width=0.75 / len(names), label=name, color=f"C{3 if name == OURS else i}")
        axis.set_title(group, fontsize=10)
        middle, half = (len(found) - 1) / 2, max(len(found), 2) / 2 + 0.1
        axis.set_xlim(middle - half, middle + half)
        axis.set_xticks(range(len(found)), [f"batch {batch}" for batch in found])
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("images a second")
    axes[0][0].legend(fontsize=8, frameon=False)
    figure.suptitle(str(machine["device"]), fontsize=10)
    figure.savefig(path, dpi=150)


def put_into(readme: Path, table: str) -> None:
    """Errors: ValueError where the markers are missing."""
    text = readme.read_text()
    pattern = re.compile(f"{re.escape(MARKERS[0])}.*?{re.escape(MARKERS[1])}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{readme} lacks {' ... '.join(MARKERS)}")
    readme.write_text(pattern.sub(lambda _: f"{MARKERS[0]}\n{table}{MARKERS[1]}", text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--readme", action="store_true", help="put the table into README.md")
    options = parser.parse_args()
    machine, rows = read(options.results)
    first = options.results[0]
    table = speed_table(machine, rows)
    first.with_name("speed.md").write_text(f"{table}\n{kernel_table(rows)}")
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed")
    else:
        plot(machine, rows, first.with_name("speed.png"))
    if options.readme:
        if machine["rehearsal"]:
            parser.error("a rehearsal's times do not go into the README; run the suite without --rehearse")
        put_into(README, table)


if __name__ == "__main__":
    main()
