"""Scoring on a Ray cluster, or on all GPUs of one machine by a local Ray. Needs the ``ray`` extra.

Ray reads, shares out and starts again; ``BatchScorer`` scores, and ``PredictionFolder`` says what is left to do.
"""

import logging
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from ..data.image_batches import ShardBatches
from ..data.shards.reader import Encoded
from ..errors import InputError, UnavailableError, in_one_line
from ..files import as_utf8, shown
from ..inference import BatchScorer
from ..inference.prediction_folder import PATH, PredictionFolder
from ..inference.prediction_sources import Files, Shards

__all__ = ["check_cluster", "connected", "score_on_ray"]

LOCAL = "ray"
REMOTE = "ray://"
CONNECT_SECONDS = 10


def check_cluster(cluster: str) -> str:
    """``cluster`` if it names one. Errors: InputError otherwise."""
    if cluster != LOCAL and not (cluster.startswith(REMOTE) and _host_and_port(cluster)):
        raise InputError(f"cluster {cluster!r} is not known; give ray for this machine's, or ray://ADDRESS:10001")
    return cluster


@contextmanager
def connected(cluster: str, quiet: bool = True) -> Iterator[int]:
    """Connects to ``cluster`` in a with block -> the number of its GPUs: to the one at ``ray://ADDRESS``, or, by
    ``ray``, to the one that RAY_ADDRESS names or this machine has started, else to a new one of this machine.

    ``quiet``: no progress bars. Errors: UnavailableError where Ray is not installed or nothing answers.
    """
    check_cluster(cluster)
    # Reports of use are sent only where somebody has asked for them.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # For this long the cluster goes on after a client that was killed; a new one would write the same rows meanwhile.
    os.environ.setdefault("RAY_CLIENT_RECONNECT_GRACE_PERIOD", "5")
    try:
        import ray.data
    except ImportError as error:
        raise UnavailableError("a cluster needs Ray: pip install 'fastmsflow[ray]'") from error
    address = _address_here() if cluster == LOCAL else cluster
    _check_answers(address)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            ray.init(None if cluster == LOCAL else cluster, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        # A client is told no more of a token that is missing.
        timed_out = cluster != LOCAL and isinstance(error, ConnectionError)
        token = "; if it wants a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" if timed_out else ""
        why = f"the Ray cluster cannot be used ({in_one_line(error)}){token}"
        raise UnavailableError(f"{address or cluster}: {why}") from error
    try:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = not quiet
        yield int(ray.cluster_resources().get("GPU", 0))
    finally:
        ray.shutdown()


def _address_here() -> str:
    """Returns the address of the cluster that ``ray.init`` would join: RAY_ADDRESS, or the one that ``ray start`` has
    left on this machine; an empty text where there is none."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address not in ("", "auto"):
        return address
    # Ray's own choice of a folder.
    folder = os.environ.get("RAY_TMPDIR") or (sys.platform == "linux" and os.environ.get("TMPDIR")) or "/tmp"
    left = Path(folder, "ray", "ray_current_cluster")
    return left.read_text().strip() if left.is_file() else ""


def _host_and_port(address: str) -> tuple[str, int] | None:
    host, _, port = address.removeprefix(REMOTE).partition("/")[0].rpartition(":")
    return (host.strip("[]"), int(port)) if host and port.isdecimal() else None


def _check_answers(address: str) -> None:
    """Ray itself would try for minutes. Errors: UnavailableError where nothing answers at ``address``, if it names a
    host and a port."""
    where = _host_and_port(address)
    if where is None:
        return
    try:
        socket.create_connection(where, timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        remedy = "look whether it has been started and can be reached"
        if not address.startswith(REMOTE):
            remedy += ", or end what is left of it with `ray stop`"
        raise UnavailableError(f"{address}: no Ray cluster answers there ({error}); {remedy}") from error


def score_on_ray(
    folder: PredictionFolder,
    images: Files | Shards,
    scorer: dict[str, Any],
    *,
    batch_size: int,
    images_per_part: int,
    gpus: int,
) -> None:
    """Scores ``images`` into ``folder`` by as many actors as the connected cluster has GPUs, or processors if it has
    none. ``scorer``: arguments of BatchScorer; its model, the images and the folder must be to be had on every machine.

    A worker that is killed is replaced and its images are scored again. Errors: InputError with the worker's line.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util.client import ray as client

    options = {"batch_size": batch_size, "images_per_part": images_per_part, "gpus": gpus}
    try:
        if client.is_connected():
            # Ray Data wants its driver within the cluster; a second try would write what the first has written.
            driver = ray.remote(num_cpus=0, max_retries=0)(cast(Any, _score))
            try:
                ray.get(driver.remote(folder, ray.put(images), scorer, **options))
            except (ImportError, AttributeError) as error:
                why = f"the cluster has no such fastmsflow ({in_one_line(error)})"
                raise UnavailableError(f"{why}; install this version on all its machines") from error
        else:
            _score(folder, images, scorer, **options)
    except RayError as error:
        raise InputError(f"a worker of the cluster failed: {_line_of(error)}") from error
    if (rows := folder.rows_of_this_run()) < len(images):
        remedy = "give a folder that all its machines share, or the URL of an object store; if it is one, start again"
        have = f"the cluster has scored {len(images)} images, and {rows} have rows here"
        raise InputError(f"{shown(folder.out)}: {have}; {remedy}")


def _score(
    folder: PredictionFolder,
    images: Files | Shards,
    scorer: dict[str, Any],
    *,
    batch_size: int,
    images_per_part: int,
    gpus: int,
) -> None:
    import ray

    resources = {"num_gpus": 1} if gpus else {"num_cpus": 1}
    actors = gpus or max(1, int(ray.cluster_resources().get("CPU", 1)))
    dataset = _files(images, images_per_part) if isinstance(images, Files) else _shards(images, batch_size, actors)
    dataset.map_batches(
        BatchScorer,
        fn_constructor_kwargs=scorer,
        batch_size=batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors),
        **resources,
    ).write_parquet(
        folder.parts,
        filesystem=folder.files,
        filename_provider=_names(folder.run),
        mode="append",
        # Shards' blocks are of bytes; names are in blocks of this size already.
        min_rows_per_file=None if isinstance(images, Files) else images_per_part,
        # The actors have all processors; writing takes little.
        ray_remote_args={"num_cpus": 0},
    )


def _names(run: str) -> Any:
    """Returns what gives files names that begin with ``run``, in old and in new versions of Ray."""
    from ray.data.datasource import FilenameProvider

    class Names(FilenameProvider):
        def get_filename_for_task(self, write_uuid: str, task_index: int) -> str:
            return f"{run}_{write_uuid}_{task_index:06}.parquet"

        def get_filename_for_block(self, block: Any, write_uuid: str, task_index: int, block_index: int) -> str:
            return f"{run}_{write_uuid}_{task_index:06}_{block_index:06}.parquet"

    return Names()


def _files(images: Files, images_per_part: int) -> Any:
    """Names alone; a block of them becomes a file of results."""
    import ray

    starts = range(0, len(images), images_per_part)
    return ray.data.from_arrow([_named(images.paths[start : start + images_per_part]) for start in starts])


def _named(paths: list[str]) -> pa.Table:
    """Paths, which a table has as UTF-8; a file by another name has its fault."""
    names = [as_utf8(path) for path in paths]
    fault = "its name is not UTF-8; rename it, or score it into another folder without --cluster"
    faults = [None if name == path else f"{name}: {fault}" for name, path in zip(names, paths, strict=True)]
    return pa.table({PATH: pa.array(names, pa.string()), "fault": pa.array(faults, pa.string())})


def _shards(images: Shards, batch_size: int, readers: int) -> Any:
    import ray

    shards = images.set.manifest.shards
    done = [images.done.get(shard.name, frozenset()) for shard in shards]
    waiting = [
        pa.table({"number": [i], "done": pa.array([list(done[i])], pa.list_(pa.string()))})
        for i, shard in enumerate(shards)
        if len(done[i]) < shard.images
    ]
    return ray.data.from_arrow(waiting).map_batches(
        partial(_read_shard, where=images.where, size=batch_size),
        batch_size=1,
        # Reading is waiting, and the actors have all processors; a few tasks are ahead of them.
        num_cpus=0,
        compute=ray.data.TaskPoolStrategy(size=readers),
    )


def _read_shard(row: dict[str, Any], where: str, size: int) -> Iterator[pa.Table]:
    """Yields the images of a shard with their paths, ``size`` at once; of those that are lost, the fault."""
    shards = ShardBatches(where)
    shard = shards.manifest.shards[int(row["number"][0])]
    for batch in shards.batches(shard, size, frozenset(row["done"][0])):
        images = cast(list[Encoded], batch.images)
        lost = [None] * batch.lost
        rows = {
            PATH: [*(as_utf8(image.name) for image in images), *lost],
            "bytes": [*(image.content for image in images), *lost],
            "fault": [*(None for _ in images), *([batch.fault] * batch.lost)],
        }
        types = {PATH: pa.string(), "bytes": pa.binary(), "fault": pa.string()}
        yield pa.table({name: pa.array(values, types[name]) for name, values in rows.items()})


def _line_of(error: Exception) -> str:
    """The worker's own line; Ray puts tracebacks before it and advice behind it."""
    told = [line for line in str(error).splitlines() if "InputError: " in line or "UnavailableError: " in line]
    return told[-1].partition("Error: ")[2] if told else in_one_line(error)
