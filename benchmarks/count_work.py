"""Counts on a CPU the launches and the bytes of what users run on a GPU.

``python benchmarks/count_work.py`` prints, for flow inference, end-to-end inference and a training step of the default
model, launches and megabytes a call (1 MB: 10^6 bytes) by batch, in three modes: ``auto``, the vendor's convolutions
and this library's other kernels, as users get them; ``fused``, the kernels' own convolutions; ``torch``, plain
PyTorch. ``--breakdown`` adds them by operator; ``--json`` prints {work: {mode: {batch: {"launches", "megabytes"}}}}.

What is counted and what is not is written in benchmarks/recorded_work.py. Settings are those of the suite
(benchmarks/contestants.py): inference in float16, the training step, of features computed before, in bfloat16 under
autocast. What is kept of the weights is computed before, as are the optimizer's states. The step is recorded under a
CPU's autocast, which leaves LayerNorm in bfloat16: in mode ``torch`` a GPU converts its input to float32 and moves more
than is counted. The other modes have kernels for that.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.contestants import FastMSFlow
from benchmarks.recorded_work import CPU, Work, WorkByName, make_fake, on_a_gpu, recording, taken_for_a_gpus
from benchmarks.suite_settings import SIZES, Size
from fastmsflow import MSFlow, backend
from fastmsflow.kernels import configs

MODES = ("auto", "fused", "torch")
LEGEND = """Counted on a CPU, not measured: launches and megabytes (10^6 bytes, each operand once) of one call on a GPU.
auto: the vendor's convolutions and this library's other kernels, as users get them; fused: the kernels' convolutions,
whose gradients are summed in parts, which small batches pay for; torch: plain PyTorch. Two figures in place of one:
PyTorch launches more for a larger batch."""
BATCHES = (1, 8, 32)
Counts = dict[str, dict[str, dict[int, WorkByName]]]
"""Recorded work by its name, the mode and the batch."""


def count(size: Size, batches: Sequence[int] = BATCHES) -> Counts:
    """Records every work in every mode with every batch."""
    contestant, tensors = _contestant(size), FakeTensorMode()
    for module in (contestant.flow, contestant._inference, contestant.fast):
        make_fake(module, tensors)
    works: dict[str, Callable[[int], Callable[[], object]]] = {
        "flow_inference": lambda batch: partial(_score, contestant, _features(size, batch, contestant.adapt)),
        "end_to_end_inference": lambda batch: partial(contestant.predict, _images(size, batch)),
        "training_step": lambda batch: partial(contestant.step, _features(size, batch, contestant.adapt_training)),
    }
    counts: Counts = {name: {} for name in works}
    for mode in MODES:
        with on_a_gpu(tensors), computing(mode):
            for name, work in works.items():
                work(batches[0])()
                counts[name][mode] = {batch: _recorded(work(batch)) for batch in batches}
    return counts


def _contestant(size: Size) -> FastMSFlow:
    """Returns a contestant whose extractor has weights, which folding batch norms needs, and whose flow has none."""
    model = MSFlow(size.extractor, pretrained=False, image_size=(size.image, size.image), blocks=size.blocks).eval()
    model.flow.to("meta")
    with taken_for_a_gpus():
        return FastMSFlow(model.flow, size.grids, model)


@torch.no_grad()
def _score(contestant: FastMSFlow, features: list[Tensor]) -> list[Tensor]:
    """The flow's part in a prediction, which has no use for the log-det."""
    return contestant._inference.log_likelihoods(features)


def _features(size: Size, batch: int, adapt: Callable[[Tensor], Tensor]) -> list[Tensor]:
    return [adapt(torch.empty(batch, c, *grid)) for c, grid in zip(size.channels, size.grids, strict=True)]


def _images(size: Size, batch: int) -> Tensor:
    return torch.empty(batch, 3, size.image, size.image).contiguous(memory_format=FastMSFlow.layout)


@contextmanager
def computing(mode: str) -> Iterator[None]:
    """Lets ``mode`` say within the block who computes, whatever has been timed on this machine."""
    with ExitStack() as stack:
        for kind in configs.KINDS:
            stack.enter_context(configs.force_convolution(kind, mode == "fused", CPU))
        if mode == "torch":
            stack.enter_context(backend.use("torch"))
        yield


def _recorded(call: Callable[[], object]) -> WorkByName:
    with recording() as recorded_work:
        call()
    return recorded_work


def totals(recorded_work: WorkByName) -> dict[str, float]:
    """Adds up the work of all operators."""
    moved = sum(work.bytes for work in recorded_work.values())
    return {"launches": sum(work.launches for work in recorded_work.values()), "megabytes": round(moved / 1e6, 1)}


def table(counts: Counts) -> Iterator[str]:
    """Markdown: a row per work and mode."""
    batches = _each(counts["flow_inference"]["auto"])
    yield f"| work | mode | launches | MB at batch {batches} |\n|---|---|---|---|"
    for name, by_mode in counts.items():
        for mode, by_batch in by_mode.items():
            found = [totals(recorded_work) for recorded_work in by_batch.values()]
            launches = _each(dict.fromkeys(total["launches"] for total in found))
            yield f"| {name} | {mode} | {launches} | {_each(total['megabytes'] for total in found)} |"


def breakdown(counts: Counts) -> Iterator[str]:
    """Markdown: per work and mode a table with a row per operator."""
    for name, by_mode in counts.items():
        for mode, by_batch in by_mode.items():
            yield f"\n## {name}, {mode}\n\n| operator | launches | MB at batch {_each(by_batch)} |\n|---|---|---|"
            rows = {
                operator: [recorded_work.get(operator, Work()) for recorded_work in by_batch.values()]
                for operator in dict.fromkeys(
                    operator for recorded_work in by_batch.values() for operator in recorded_work
                )
            }
            for operator, works in sorted(rows.items(), key=lambda row: -row[1][-1].bytes):
                launches = _each(dict.fromkeys(work.launches for work in works))
                yield f"| {operator} | {launches} | {_each(f'{work.bytes / 1e6:.2f}' for work in works)} |"


def _each(values: Iterable[object]) -> str:
    return " / ".join(map(str, values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the figures as JSON")
    form.add_argument("--breakdown", action="store_true", help="print those of each operator, too")
    parser.add_argument(
        "--size", choices=SIZES, default="default", help="default: the published model; small: for tests"
    )
    options = parser.parse_args()
    counts = count(SIZES[options.size])
    if options.json:
        found = {
            name: {
                mode: {str(batch): totals(recorded_work) for batch, recorded_work in by.items()}
                for mode, by in by_mode.items()
            }
            for name, by_mode in counts.items()
        }
        print(json.dumps(found))
        return
    print(f"{LEGEND}\n")
    print("\n".join(table(counts)))
    if options.breakdown:
        print("\n".join(breakdown(counts)))


if __name__ == "__main__":
    main()
