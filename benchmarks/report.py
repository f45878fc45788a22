"""Results of the suite -> the tables and the plot of the README.

``python benchmarks/report.py FOLDER`` (or RESULTS.json ..., of one machine) writes speed.md, speed.png and, where
convolutions were timed, table.json beside them; ``--readme`` also puts the table where README.md has its markers. Rows
whose gate is red are named and not published: their numbers are wrong. A FOLDER may hold the records of both visits.
"""

import argparse
import importlib.util
import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"
MARKERS = ("<!-- speed -->", "<!-- /speed -->")
OURS = "fastmsflow"
OUR_COLOR = "C3"
OUR_HATCHES = ("", "///", "...")
GROUPS = ("flow inference", "end-to-end inference", "flow training step", "training step")
CONVOLUTIONS = ("convolutions, own and the vendor's", "convolutions and what follows them, own and the vendor's")
VENDORS = "vendor's"
VERSIONS = ("torch", "triton", "onnxruntime", "openvino", "commit")
Rows = list[dict[str, Any]]


def read(paths: Sequence[Path]) -> tuple[dict[str, Any], Rows]:
    """The machine, and the rows of all files. Errors: ValueError where they are of several machines."""
    contents = [json.loads(path.read_text()) for path in paths]
    machines = [content["machine_info"] for content in contents]
    if len({machine["device"] for machine in machines}) != 1:
        raise ValueError(f"results of several machines: {', '.join(machine['device'] for machine in machines)}")
    rehearsal = any(machine.get("rehearsal") for machine in machines)
    return machines[0] | {"rehearsal": rehearsal}, [row for content in contents for row in content["benchmarks"]]


def records(folder: Path) -> tuple[list[Path], Sequence[dict[str, Any]]]:
    """Files in ``folder`` that hold rows, and what the smoke test found."""
    # A file that is being written aside begins with a dot, and may be gone in a moment.
    contents = {path: json.loads(path.read_text()) for path in sorted(folder.glob("[!.]*.json"))}
    results = [path for path, content in contents.items() if isinstance(content, dict) and content.get("benchmarks")]
    return results, contents.get(folder / "smoke.json", ())


def published(rows: Rows, smoke: Sequence[dict[str, Any]] = ()) -> tuple[Rows, list[str]]:
    """The rows that may be shown, and a line for each that may not.

    ``smoke``: what benchmarks/smoke.py found; it is the gate of single kernels, which it must have met.
    """
    kernels: dict[tuple[str, str], bool] = {}
    for finding in smoke:
        for name in finding["kernels"]:
            key = name, finding["arithmetic"]
            kernels[key] = kernels.get(key, True) and finding["green"]
    fine, refused = [], []
    for row in rows:
        info = row["extra_info"]
        gate = info.get("gate")
        if gate is not None and not gate["green"]:
            over = {what: error for what, error in gate["errors"].items() if not error < gate["bound"]}
            errors = ", ".join(f"{what} {error:.1e}" for what, error in over.items())
            refused.append(f"{row['name']}: {errors}; at most {gate['bound']:.1e} is allowed")
        elif row["group"] == "kernels" and not kernels.get((info["kernel"], info["arithmetic"])):
            found = "red in the smoke test" if (info["kernel"], info["arithmetic"]) in kernels else "no smoke test"
            refused.append(f"{row['name']}: {found}")
        else:
            fine.append(row)
    return fine, refused


def milliseconds(row: dict[str, Any]) -> float:
    return 1e3 * row["stats"]["median"]


def microseconds(row: dict[str, Any]) -> float:
    """The median time of one launch."""
    return 1e3 * milliseconds(row) / row["extra_info"]["launches"]


def by_contestant(rows: Rows, group: str) -> dict[int, dict[str, dict[str, Any]]]:
    """{batch: {contestant: row}}."""
    found: dict[int, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        if row["group"] == group:
            found[row["extra_info"]["images"]][row["extra_info"]["contestant"]] = row
    return dict(sorted(found.items()))


def contestants(rows: Rows) -> list[str]:
    """The names of those that were timed, ours last."""
    names = dict.fromkeys(row["extra_info"]["contestant"] for row in rows if row["group"] in GROUPS)
    return sorted(names, key=is_ours)


def is_ours(name: str) -> bool:
    return name.startswith(OURS)


def heading(rows: Rows, name: str) -> str:
    """The contestant with the precisions of its rows, as "OpenVINO (bfloat16)"."""
    infos = [row["extra_info"] for row in rows if row["group"] in GROUPS]
    precisions = dict.fromkeys(i["precision"] for i in infos if i["contestant"] == name and "precision" in i)
    if not precisions:
        return name
    return f"{name.removesuffix(f' {next(iter(precisions))}')} ({', '.join(precisions)})"


def rival(found: dict[str, dict[str, Any]], name: str) -> str:
    """Ours in the precision of the contestant, where ours was timed in it."""
    own = f"{OURS} {found[name]['extra_info'].get('precision')}"
    return own if own in found else OURS


def speed_table(machine: dict[str, Any], rows: Rows) -> str:
    """Milliseconds by contestant, how many times faster ours is, and the same for the best of the float32 peers."""
    names = contestants(rows)
    lines = []
    if names:
        headings = [heading(rows, name) for name in names]
        lines = [f"| median ms (quartiles) | batch | {' | '.join(headings)} |", "|---" * (len(names) + 2) + "|"]
    for group in GROUPS:
        for batch, found in by_contestant(rows, group).items():
            cells = [_cell(found, name) for name in names]
            lines.append(f"| {group} | {batch} | " + " | ".join(cells) + " |")
    peaks = [row for row in rows if "peak_bytes" in row["extra_info"] and row["group"] in GROUPS]
    for group in GROUPS:
        for batch, found in by_contestant(peaks, group).items():
            cells = [f"{found[n]['extra_info']['peak_bytes'] / 2**30:.2f} GiB" if n in found else "" for n in names]
            lines.append(f"| memory at the peak, weights included: {group} | {batch} | " + " | ".join(cells) + " |")
    if machine.get("rehearsal"):
        lines.insert(0, "**A rehearsal: every row ran once. These times mean nothing.**\n")
    lines += best_peers(rows)
    where = ", ".join(f"{key} {machine[key]}" for key in VERSIONS if key in machine)
    chip = ", ".join((machine["device"], *machine.get("units", ())))
    threads = f", {machine['threads']} threads" if "driver_version" not in machine else ""
    return f"{chip}{threads}; {where}.\n\n" + "\n".join(lines or ["No contestant was timed."]) + "\n"


def _cell(found: dict[str, dict[str, Any]], name: str) -> str:
    if name not in found:
        return ""
    stats, ours = found[name]["stats"], rival(found, name)
    text = f"{_short(milliseconds(found[name]))} ({_short(1e3 * stats['q1'])} to {_short(1e3 * stats['q3'])})"
    if is_ours(name) or ours not in found:
        return text
    return f"{text}, **{milliseconds(found[name]) / milliseconds(found[ours]):.2f}x**"


def best_peers(rows: Rows) -> list[str]:
    """A table of the fastest float32 peer beside ours in float32, where there are several peers."""
    in_float32 = [row for row in rows if row["extra_info"].get("precision") == "float32"]
    ours = [name for name in contestants(in_float32) if is_ours(name)]
    lines = []
    for group in GROUPS:
        for batch, found in by_contestant(in_float32, group).items():
            peers = [name for name in found if not is_ours(name)]
            if len(peers) > 1 and OURS in found:
                best = min(peers, key=lambda name: milliseconds(found[name]))
                times = [
                    f"**{milliseconds(found[best]) / milliseconds(found[n]):.2f}x**" if n in found else "" for n in ours
                ]
                lines.append(f"| {group} | {batch} | {best} | {' | '.join(times)} |")
    heads = " | ".join(f"/ {name}" for name in ours)
    head = ["", f"| best of the float32 peers | batch | by | {heads} |", "|---" * (3 + len(ours)) + "|"]
    return [*head, *lines] if lines else []


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def kernel_table(rows: Rows) -> str:
    """Every kernel beside the chip's measured limits, if those are there; the convolutions beside the vendor's."""
    limits = {row["name"].split("[")[0]: row for row in rows if row["group"] == "the chip"}
    product, copy = (
        limits[name]["extra_info"][what] / limits[name]["stats"]["median"] if name in limits else math.nan
        for name, what in (("test_matrix_product", "flops"), ("test_copy", "bytes"))
    )
    lines = []
    kernels = [row for row in rows if row["group"] == "kernels"]
    if kernels:
        if limits:
            rates = f"{product / 1e12:.3g} TFLOP/s (bfloat16 product), {copy / 1e12:.3g} TB/s (copy)"
            lines.append(f"Measured limits: {rates}.\n")
        lines.append("| kernel | arithmetic | batch | median us | TFLOP/s | of the product's | TB/s | of the copy's |")
        lines.append("|---|---|---|---|---|---|---|---|")
        lines += [_kernel_line(row, product, copy) for row in kernels]
        for group in GROUPS[:3:2]:
            for batch, found in by_contestant(rows, group).items():
                if OURS in found:
                    share = _share(found[OURS]["extra_info"]["flops"] / found[OURS]["stats"]["median"], product)
                    lines.append(f"| {group} |  | {batch} | {1e3 * milliseconds(found[OURS]):.4g} | | {share} | | |")
    for group in CONVOLUTIONS:
        lines += convolution_lines([row for row in rows if row["group"] == group], group)
    return "\n".join(lines) + "\n" if lines else ""


def _kernel_line(row: dict[str, Any], product: float, copy: float) -> str:
    info = row["extra_info"]
    flops, moved = (1e6 * info[what] / microseconds(row) for what in ("flops", "bytes"))
    rate = f"{flops / 1e12:.3g} | {_share(flops, product)}" if flops else " | "
    cells = f"{microseconds(row):.4g} | {rate} | {moved / 1e12:.3g} | {_share(moved, copy)}"
    return f"| {info['case']} | {info['arithmetic']} | {info['batch']} | {cells} |"


def _share(rate: float, limit: float) -> str:
    return "" if math.isnan(limit) else f"{rate / limit:.0%}"


def convolution_lines(rows: Rows, title: str) -> list[str]:
    """The kernels' own best tile beside the vendor's."""
    lines = ["", f"| {title} | batch | own us | by | vendor's us | own / vendor's |", "|---|---|---|---|---|---|"]
    for (case, batch), found in by_case(rows).items():
        if VENDORS in found and len(found) > 1:
            vendors = microseconds(found.pop(VENDORS))
            best = min(found.values(), key=microseconds)
            own, tile = microseconds(best), best["extra_info"]["whose"].removeprefix("own ")
            lines.append(f"| {case} | {batch} | {own:.4g} | {tile} | {vendors:.4g} | {own / vendors:.2f} |")
    return lines if len(lines) > 3 else []


def by_case(rows: Rows) -> dict[tuple[str, int], dict[str, dict[str, Any]]]:
    """{(case, batch): {whose: row}}."""
    found: dict[tuple[str, int], dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        info = row["extra_info"]
        found[info["case"], info["batch"]][info["whose"]] = row
    return dict(found)


def chosen(machine: dict[str, Any], rows: Rows) -> dict[str, Any]:
    """The table of tiles and convolutions that the timed ones speak for, as fastmsflow.kernels.configs reads it: of
    each kernel the tile that is fastest on the geometric mean of its cases, and at each shape whether it beats the
    vendor's.
    """
    contests = complete([row for row in rows if row["group"] in CONVOLUTIONS])
    kernels = dict.fromkeys(row["extra_info"]["kernel"] for row in contests)
    tiles = {kernel: best_tile([r for r in contests if r["extra_info"]["kernel"] == kernel]) for kernel in kernels}
    convolutions: dict[str, list[tuple[int, int, bool]]] = defaultdict(list)
    for found in by_case(contests).values():
        infos = [row["extra_info"] for row in found.values()]
        own = [row for row in found.values() if row["extra_info"]["tile"] == tiles.get(infos[0]["kernel"])]
        if VENDORS in found and own:
            faster = microseconds(own[0]) < microseconds(found[VENDORS])
            convolutions[infos[0]["kind"]].append((infos[0]["pixels"], infos[0]["outputs"], faster))
    found_tiles = {kernel: tile for kernel, tile in tiles.items() if tile is not None}
    return {machine["chip"]: {"tiles": found_tiles, "convolutions": dict(convolutions)}} if found_tiles else {}


def complete(rows: Rows) -> Rows:
    """Returns the rows of cases in which every contender of the kernel was timed; an interruption leaves others."""
    contenders: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        contenders[row["extra_info"]["kernel"]].add(row["extra_info"]["whose"])
    cases = by_case(rows).values()
    whole = [case for case in cases if set(case) == contenders[next(iter(case.values()))["extra_info"]["kernel"]]]
    return [row for case in whole for row in case.values()]


def best_tile(rows: Rows) -> dict[str, int] | None:
    """The fastest on the geometric mean, of complete cases."""
    cases = [{w: r for w, r in found.items() if w != VENDORS} for found in by_case(rows).values()]
    if not cases:
        return None
    best = min(cases[0], key=lambda whose: math.fsum(math.log(microseconds(case[whose])) for case in cases))
    return cases[0][best]["extra_info"]["tile"]


def plot(machine: dict[str, Any], rows: Rows, path: Path) -> None:
    """Images a second by contestant, a panel a group."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = [group for group in GROUPS if by_contestant(rows, group)]
    names = contestants(rows)
    others = (color for color in (f"C{n}" for n in range(10)) if color != OUR_COLOR)
    hatches = dict(zip(filter(is_ours, names), OUR_HATCHES, strict=False))
    colors = {name: OUR_COLOR if is_ours(name) else next(others) for name in names}
    figure, axes = plt.subplots(1, len(groups), figsize=(3.6 * len(groups), 4), squeeze=False, layout="constrained")
    bars = {}
    for axis, group in zip(axes[0], groups, strict=True):
        found = by_contestant(rows, group)
        here = [name for name in names if any(name in row for row in found.values())]
        for i, name in enumerate(here):
            speed = [1e3 * batch / milliseconds(row[name]) if name in row else 0.0 for batch, row in found.items()]
            at = [n + (i - (len(here) - 1) / 2) * 0.8 / len(here) for n in range(len(found))]
            # Ours has one color, in whatever precision.
            look = {"color": colors[name], "hatch": hatches.get(name, ""), "edgecolor": "white", "linewidth": 0}
            bars[heading(rows, name)] = axis.bar(at, speed, width=0.75 / len(here), **look)
        axis.set_title(group, fontsize=10)
        middle, half = (len(found) - 1) / 2, max(len(found), 2) / 2 + 0.1
        axis.set_xlim(middle - half, middle + half)
        axis.set_xticks(range(len(found)), [f"batch {batch}" for batch in found])
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("images a second")
    columns = min(4, len(bars))
    figure.legend(bars.values(), bars, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
    rehearsal = ": a rehearsal, whose times mean nothing" if machine.get("rehearsal") else ""
    figure.suptitle(f"{machine['device']}{rehearsal}", fontsize=10)
    figure.savefig(path, dpi=150)


def put_into(readme: Path, table: str) -> None:
    """Errors: ValueError where the markers are missing."""
    text = readme.read_text()
    pattern = re.compile(f"{re.escape(MARKERS[0])}.*?{re.escape(MARKERS[1])}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{readme} lacks {' ... '.join(MARKERS)}")
    readme.write_text(pattern.sub(lambda _: f"{MARKERS[0]}\n{table}{MARKERS[1]}", text))


def text_of(machine: dict[str, Any], rows: Rows, refused: Sequence[str]) -> str:
    """Everything that is said in words."""
    text = f"{speed_table(machine, rows)}\n{kernel_table(rows)}"
    if refused:
        text += "\nTimed but not published, since their numbers are wrong:\n\n"
        text += "".join(f"- {line}\n" for line in refused)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="a folder of records, or files of results")
    parser.add_argument("--readme", action="store_true", help="put the table into README.md")
    options = parser.parse_args()
    first = options.results[0]
    smoke: Sequence[dict[str, Any]] = ()
    try:
        if first.is_dir():
            options.results, smoke = records(first)
            if not options.results:
                parser.error(f"{first}: no results are in it")
            first = options.results[0]
        machine, rows = read(options.results)
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")
    except (ValueError, KeyError, TypeError) as error:
        parser.error(f"{first}: not results of the suite of one machine ({error})")
    rows, refused = published(rows, smoke)
    first.with_name("speed.md").write_text(text_of(machine, rows, refused))
    table = chosen(machine, rows)
    if table:
        first.with_name("table.json").write_text(json.dumps(table, indent=1) + "\n")
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed")
    elif any(row["group"] in GROUPS for row in rows):
        plot(machine, rows, first.with_name("speed.png"))
    for line in refused:
        print(f"not published: {line}")
    if options.readme:
        if machine["rehearsal"]:
            parser.error("a rehearsal's times do not go into the README; run the suite without --rehearse")
        put_into(README, speed_table(machine, rows))


if __name__ == "__main__":
    main()
