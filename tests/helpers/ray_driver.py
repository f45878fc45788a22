"""A user's own driver of Ray Data, for test_ray.py: scores tars, Parquet with bytes, files and decoded images by
BatchScorer, while one of its workers is killed.

Arguments: the model, the folders of tars, Parquet and files, and that of results.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import ray

from fastmsflow.inference import BatchScorer

ACTOR = b"ray::MapWorker(MapBatches(BatchScorer))"


def parent(process: str | int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def kill_a_worker(results: Path) -> None:
    """Kills one of this driver's actors as soon as there are results."""
    while not list(results.glob("*.parquet")):
        time.sleep(0.01)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            is_actor = (process / "cmdline").read_bytes().startswith(ACTOR)
            # Driver, raylet, worker: another driver on this machine has its own.
            if is_actor and parent(parent(process.name)) == os.getpid():
                os.kill(int(process.name), signal.SIGKILL)
                print("killed", process.name, flush=True)
                return
        except OSError:
            continue


def main(model: str, tars: str, parquet: str, files: str, out: str) -> None:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    scorer = {
        "fn_constructor_kwargs": {"model": model},
        "batch_format": "pyarrow",
        "batch_size": 32,
        "num_cpus": 0.5,
        "compute": ray.data.ActorPoolStrategy(size=2),
    }
    killer = threading.Thread(target=kill_a_worker, args=(Path(out) / "tars",))
    killer.start()
    tables = ray.data.read_webdataset(tars, decoder=None, override_num_blocks=10)
    tables = tables.rename_columns({"jpg": "bytes", "__key__": "path"})
    tables.map_batches(BatchScorer, **scorer).write_parquet(f"{out}/tars")
    killer.join()
    ray.data.read_parquet(parquet).map_batches(BatchScorer, **scorer).write_parquet(f"{out}/parquet")
    encoded = ray.data.read_binary_files(files, include_paths=True)
    encoded.map_batches(BatchScorer, **scorer).write_parquet(f"{out}/files")
    images = ray.data.read_images(files, include_paths=True)
    images.map_batches(BatchScorer, **scorer).write_parquet(f"{out}/images")
    empty = ray.data.from_arrow(pa.table({"path": pa.array([], pa.string())}))
    print("rows of no rows:", empty.map_batches(BatchScorer, **scorer).count())
    no_model = {**scorer, "fn_constructor_kwargs": {"model": "/nowhere/m.safetensors"}}
    for name, constructed, column in (("no model", no_model, "path"), ("no column", scorer, "text")):
        try:
            ray.data.from_arrow(pa.table({column: ["x"]})).map_batches(BatchScorer, **constructed).materialize()
        except Exception as error:
            print(f"{name}:", next(line for line in str(error).splitlines() if "InputError: " in line))


if __name__ == "__main__":
    main(*sys.argv[1:])
