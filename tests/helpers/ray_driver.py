"""A user's own driver of Ray Data: it scores tars, Parquet with bytes, files and decoded images by BatchScorer, while
one of its workers is killed."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from fastmsflow.inference import BatchScorer

ACTOR = b"ray::MapWorker(MapBatches(BatchScorer))"


def drive(address: str, head: int, model: Path, tars: Path, parquet: Path, files: Path, out: Path) -> dict[str, Any]:
    """Scores all into folders of ``out``, on the cluster at ``address``, whose first process is ``head``.

    Returns what happened: ``killed``, the process of the worker that was; ``rows of no rows``, a number; ``no model``
    and ``no column``, the lines that said so.
    """
    found: dict[str, Any] = {}
    ray.init(address, logging_level="ERROR", log_to_driver=False)
    try:
        killer = threading.Thread(target=lambda: found.update(killed=kill_a_worker(out / "tars", head)))
        killer.start()
        tables = ray.data.read_webdataset(str(tars), decoder=None, override_num_blocks=8)
        tables = tables.rename_columns({"jpg": "bytes", "__key__": "path"})
        tables.map_batches(BatchScorer, **scoring(model, actors=2)).write_parquet(f"{out}/tars")
        killer.join()
        alone = scoring(model, actors=1)
        ray.data.read_parquet(str(parquet)).map_batches(BatchScorer, **alone).write_parquet(f"{out}/parquet")
        encoded = ray.data.read_binary_files(str(files), include_paths=True)
        encoded.map_batches(BatchScorer, **alone).write_parquet(f"{out}/files")
        images = ray.data.read_images(str(files), include_paths=True)
        images.map_batches(BatchScorer, **alone).write_parquet(f"{out}/images")
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


def scoring(model: Path, actors: int) -> dict[str, Any]:
    """Arguments of ``map_batches``."""
    return {
        "fn_constructor_kwargs": {"model": str(model)},
        "batch_format": "pyarrow",
        "batch_size": 32,
        "num_cpus": 0.5,
        "compute": ray.data.ActorPoolStrategy(size=actors),
    }


def kill_a_worker(results: Path, head: int) -> int | None:
    """Kills one of the cluster's actors as soon as there are results -> its process, if there was one."""
    while not list(results.glob("*.parquet")):
        time.sleep(0.01)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            is_actor = (process / "cmdline").read_bytes().startswith(ACTOR)
            # First process, raylet, worker: another cluster on this machine has its own.
            if is_actor and parent(parent(process.name)) == head:
                os.kill(int(process.name), signal.SIGKILL)
                return int(process.name)
        except OSError:
            continue
    return None


def parent(process: str | int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
