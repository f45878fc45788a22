"""Millions of images -> Parquet files, one for each part, by any number of processes, and on from where it stopped.

A folder of results:

- ``predictions.json``, first of all: which model, thresholds and images it is of, and the parts;
- ``images.list``, where images are files: their names, each before a NUL;
- ``parts/part-000000.parquet``, ...: each written aside and renamed, so it is there whole or not at all;
- ``manifest.json``, last of all: of every part its rows, faults, bytes and SHA-256, and the totals.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..data.parts import Parts, read_parts
from ..errors import InputError
from ..files import claimed_folder, shown, write_json
from ..model import MSFlow
from .parquet import Summary, Table, read_faults, read_summary, version
from .scorer import Scorer

FORMAT = "fastmsflow predictions 1"
RUN, MANIFEST, PARTS, LIST = "predictions.json", "manifest.json", "parts", "images.list"
PART = re.compile(r"part-(\d{6,})\.parquet")
ELSEWHERE = "choose another folder"
# Seconds between two looks at which parts there are.
PAUSE = 0.5
# What runs that do not say were computed in.
BEFORE_DTYPES = ("dtype", "float32")


@dataclass(frozen=True)
class Run:
    """One model on one set of images, into the folder ``out``."""

    out: Path
    source: Parts
    setting: dict[str, Any]
    """What its results hang on."""

    @classmethod
    def of(cls, out: Path, source: Parts, scorer: Scorer) -> "Run":
        setting = {
            "model": fingerprint(scorer.model),
            "threshold": None if scorer.limit is None else scorer.limit.value,
            "region_threshold": scorer.heat.region_threshold,
            "source": f"{source.kind} {source.fingerprint}",
            "images_per_part": source.images[0],
            "dtype": scorer.dtype,
        }
        return cls(out, source, setting)

    @property
    def key(self) -> str:
        """16 hexadecimal digits, in each of its files."""
        # Files that were written before there was a choice are of float32, and have keys without it.
        setting = {name: value for name, value in self.setting.items() if (name, value) != BEFORE_DTYPES}
        return hashlib.sha256(json.dumps(setting).encode()).hexdigest()[:16]

    @property
    def images(self) -> int:
        return sum(self.source.images)

    def path(self, part: int) -> Path:
        return self.out / PARTS / f"part-{part:06}.parquet"

    @contextmanager
    def claimed(self) -> Iterator[list[int]]:
        """For one of the processes: the parts that are to be done. Their files, if there are any, are gone: those that
        are not whole, and those whose shard was damaged, which may have been mended.

        Errors: InputError where ``out`` holds something else or another run, or another process writes there.
        """
        with claimed_folder(self.out), claimed_folder(self.out / PARTS):
            self._refuse_others()
            parts = [{"name": self.path(i).name, "images": images} for i, images in enumerate(self.source.images)]
            head = {"format": FORMAT, "key": self.key, **self.setting, "images": self.images, "parts": parts}
            write_json(self.out / RUN, head)
            waiting = [part for part in range(len(parts)) if not self._finished(part)]
            for part in waiting:
                self.path(part).unlink(missing_ok=True)
            if waiting:
                (self.out / MANIFEST).unlink(missing_ok=True)
            yield waiting

    def score(
        self, scorer: Scorer, parts: Sequence[int], batch_size: int, workers: int, progress: Callable[[int], None]
    ) -> None:
        """``parts``, one after the other. ``progress`` gets the number of images that are through.

        Errors: InputError where results cannot be written, no shard can be reached for want of a package, or ``scorer``
        computes in another dtype than the run's.
        """
        if scorer.dtype != self.setting["dtype"]:
            others = self.setting["dtype"]
            raise InputError(f"--dtype auto is {scorer.dtype} in this process and {others} in the first; name one")
        table, done = Table(), 0
        threshold = None if scorer.limit is None else scorer.limit.value
        for read in read_parts(self.source, parts, batch_size, scorer.model.image_size, workers):
            for item, judged, fault in scorer.items(read):
                table.add(item, judged, threshold, fault)
            done += len(read.items)
            if read.last:
                table.write(self.path(read.part), self.key, read.lost, read.fault)
                table = Table()
            progress(done)

    def written(self) -> set[int]:
        """The parts that are there."""
        names = (PART.fullmatch(path.name) for path in (self.out / PARTS).iterdir())
        return {int(name[1]) for name in names if name}

    def wait(self, parts: Sequence[int], progress: Callable[[], None]) -> None:
        """Until the other processes have written ``parts``."""
        while not self.written().issuperset(parts):
            progress()
            time.sleep(PAUSE)

    def finish(self) -> dict[str, Any]:
        """Writes the manifest -> what it says. Errors: InputError where a part is not whole."""
        parts: list[dict[str, Any]] = []
        for part in range(len(self.source.images)):
            path = self.path(part)
            summary = self._summary(part)
            if summary is None:
                raise InputError(f"{shown(path)}: not whole any more; give the same command again")
            content = path.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            of = {"name": path.name, "rows": summary.rows, "bytes": len(content), "sha256": digest}
            counts = {"faults": summary.faults, "lost": summary.lost, "defective": summary.defective}
            parts.append({**of, **counts, "damaged": summary.damaged})
        totals = {name: sum(part[name] for part in parts) for name in ("bytes", "faults", "lost", "defective")}
        manifest = {
            "format": FORMAT,
            "key": self.key,
            **self.setting,
            "images": self.images,
            **totals,
            "damaged": [part["name"] for part in parts if part["damaged"]],
            "versions": {"fastmsflow": __version__, "torch": torch.__version__, "pyarrow": version},
            "parts": parts,
        }
        write_json(self.out / MANIFEST, manifest)
        return manifest

    def faults(self, manifest: dict[str, Any]) -> Iterator[str]:
        """For each image that cannot be read or scored a line, but for those that are lost with their shard."""
        for part in manifest["parts"]:
            if part["faults"] > part["lost"]:
                yield from read_faults(self.out / PARTS / part["name"])

    def _summary(self, part: int) -> Summary | None:
        found = read_summary(self.path(part))
        return found if found and (found.key, found.rows) == (self.key, self.source.images[part]) else None

    def _finished(self, part: int) -> bool:
        summary = self._summary(part)
        return summary is not None and summary.damaged is None

    def _refuse_others(self) -> None:
        """A folder is gone on with if it is this run's, and begun if it holds no results."""
        run, manifest = _json(self.out / RUN), _json(self.out / MANIFEST)
        if any(found is not None and found.get("format") != FORMAT for found in (run, manifest)):
            raise InputError(f"{shown(self.out)}: holds a {RUN} or {MANIFEST} of something else; {ELSEWHERE}")
        if run is None:
            if manifest is not None or self.written():
                raise InputError(f"{shown(self.out)}: holds parts, and no {RUN} that says of what; {ELSEWHERE}")
            return
        run = dict([BEFORE_DTYPES]) | run
        changes = [
            f"{name.replace('_', ' ')} was {run.get(name)}, is {value}"
            for name, value in self.setting.items()
            if run.get(name) != value
        ]
        if changes:
            raise InputError(
                f"{shown(self.out)}: holds results of another run ({'; '.join(changes)}); set that back, or {ELSEWHERE}"
            )


def fingerprint(model: MSFlow) -> str:
    """Of weights, calibration and what else decides on a score, wherever the model's file lies."""
    total = hashlib.sha256(json.dumps(model.config).encode())
    for name, tensor in model.state_dict().items():
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()[:16]


def _json(path: Path) -> dict[str, Any] | None:
    """{} where it is no JSON object."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
