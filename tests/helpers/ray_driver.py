"""A user's own driver of Ray Data: it scores tars, Parquet with bytes, files and decoded images by BatchScorer, while
one of its workers is killed."""

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import ray

from fastmsflow.inference import BatchScorer


class DrivenScorer(BatchScorer):
    """A scorer that leaves a file named by its process in the folder ``processes``."""

    def __init__(self, model: str, processes: str) -> None:
        super().__init__(model)
        Path(processes, str(os.getpid())).touch()


ACTOR = b"ray::MapWorker(MapBatches(DrivenScorer))"


class Sources(NamedTuple):
    """Folders of images; each tar, each Parquet file and each quarter of the files holds a multiple of 32."""

    tars: Path
    parquet: Path
    files: Path
    decoded: Path


def drive(address: str, model: Path, sources: Sources, out: Path) -> dict[str, Any]:
    """Scores all into folders of ``out`` on the cluster at ``address``.

    Returns what happened: ``killed``, the process of the worker that was; ``rows of no rows``, a number; ``no model``
    and ``no column``, the lines that said so.
    """
    found: dict[str, Any] = {}
    ray.init(address, logging_level="ERROR", log_to_driver=False)
    try:
        processes = out / "processes"
        processes.mkdir(parents=True)
        killer = threading.Thread(target=lambda: found.update(killed=kill_a_worker(processes, out / "encoded")))
        killer.start()
        of_tars = ray.data.read_webdataset(str(sources.tars), decoder=None, override_num_blocks=8)
        # Blocks of tars are pandas', and one data set has blocks of one kind.
        of_tars = of_tars.map_batches(lambda table: table, batch_size=None, batch_format="pyarrow")
        of_tars = of_tars.rename_columns({"jpg": "bytes", "__key__": "path"})
        of_parquet = ray.data.read_parquet(str(sources.parquet))
        files = ray.data.read_binary_files(str(sources.files), include_paths=True, override_num_blocks=4)
        # In one data set, since each data set has actors of its own, which import for seconds.
        first, *rest = (images.select_columns(["path", "bytes"]) for images in (of_tars, of_parquet, files))
        encoded = first.union(*rest)
        driven = scoring(model, actors=2, processes=str(processes))
        encoded.map_batches(DrivenScorer, **driven).write_parquet(f"{out}/encoded")
        killer.join()
        alone = scoring(model, actors=1)
        decoded = ray.data.read_images(str(sources.decoded), include_paths=True)
        decoded.map_batches(BatchScorer, **alone).write_parquet(f"{out}/decoded")
        empty = ray.data.from_arrow(pa.table({"path": pa.array([], pa.string())}))
        found["rows of no rows"] = empty.map_batches(BatchScorer, **alone).count()
        no_model = scoring(Path("/nowhere/m.safetensors"), actors=1)
        for name, constructed, column in (("no model", no_model, "path"), ("no column", alone, "text")):
            try:
                ray.data.from_arrow(pa.table({column: ["x"]})).map_batches(BatchScorer, **constructed).materialize()
            except Exception as error:
                found[name] = next(line for line in str(error).splitlines() if "InputError: " in line)
    finally:
        ray.shutdown()
    return found


def scoring(model: Path, actors: int, **constructed: str) -> dict[str, Any]:
    """Returns arguments of ``map_batches``; ``constructed`` goes to the scorer besides the model."""
    return {
        "fn_constructor_kwargs": {"model": str(model), **constructed},
        "batch_format": "pyarrow",
        "batch_size": 32,
        "num_cpus": 0.5,
        "compute": ray.data.ActorPoolStrategy(size=actors),
    }


def kill_a_worker(processes: Path, results: Path) -> int | None:
    """Kills one of the actors named in ``processes`` as soon as there are results.

    Returns the killed process, or None if all of them had ended.
    """
    while not list(results.glob("*.parquet")):
        time.sleep(0.01)
    for process in processes.iterdir():
        with suppress(OSError):
            # Another process may have the number of an actor that has ended.
            if Path(f"/proc/{process.name}/cmdline").read_bytes().startswith(ACTOR):
                os.kill(int(process.name), signal.SIGKILL)
                return int(process.name)
    return None
