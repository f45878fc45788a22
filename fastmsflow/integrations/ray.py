"""Scores images on a Ray cluster, or on all GPUs of one machine by a local Ray. Needs the ``ray`` extra.

Ray reads, distributes and restarts; ``BatchScorer`` scores; ``PredictionFolder`` knows which images have no row yet.
"""

import logging
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
from ..quiet import errors_alone

__all__ = ["RayOptions", "check_cluster", "connected", "score_on_ray"]

LOCAL = "ray"
REMOTE = "ray://"
CONNECT_SECONDS = 10


def check_cluster(cluster: str) -> None:
    """Raises InputError if ``cluster`` names no cluster."""
    if cluster != LOCAL and not (cluster.startswith(REMOTE) and _host_and_port(cluster)):
        raise InputError(f"cluster {cluster!r} is not known; give ray for this machine's, or ray://ADDRESS:10001")


@contextmanager
def connected(cluster: str, quiet: bool = True) -> Iterator[int]:
    """Connects to ``cluster`` in a with block and yields the number of its GPUs.

    ``cluster``: ``ray://ADDRESS``, or ``ray`` for the cluster that RAY_ADDRESS names or this machine has started, else
    a new one of this machine; ``quiet``: no progress bars.

    Raises: UnavailableError if Ray is not installed or no cluster answers.
    """
    check_cluster(cluster)
    # Ray reports its use only if the user has set this.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # The cluster works on for this time after a client was killed, while a new client would write the same rows.
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
        # A missing token shows only as a timeout.
        timed_out = cluster != LOCAL and isinstance(error, ConnectionError)
        token = "; if it wants a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" if timed_out else ""
        why = f"the Ray cluster cannot be used ({in_one_line(error)}){token}"
        raise UnavailableError(f"{address or cluster}: {why}") from error
    context = ray.data.DataContext.get_current()
    bars = context.enable_progress_bars
    try:
        context.enable_progress_bars = not quiet
        with errors_alone("ray.data"), warnings.catch_warnings():
            # Ray Data warns of fewer images than actors.
            warnings.filterwarnings("ignore", category=UserWarning, module=r"ray\.")
            yield int(ray.cluster_resources().get("GPU", 0))
    finally:
        context.enable_progress_bars = bars
        ray.shutdown()


def _address_here() -> str:
    """Returns the address of the cluster that ``ray.init`` would join: RAY_ADDRESS, or the one that ``ray start`` has
    left on this machine; an empty text where there is none."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address not in ("", "auto"):
        return address
    # Ray chooses its folder in the same way.
    folder = os.environ.get("RAY_TMPDIR") or (sys.platform == "linux" and os.environ.get("TMPDIR")) or "/tmp"
    left = Path(folder, "ray", "ray_current_cluster")
    return left.read_text().strip() if left.is_file() else ""


def _host_and_port(address: str) -> tuple[str, int] | None:
    host, _, port = address.removeprefix(REMOTE).partition("/")[0].rpartition(":")
    return (host.strip("[]"), int(port)) if host and port.isdecimal() else None


def _check_answers(address: str) -> None:
    """Raises UnavailableError if ``address`` names a host and a port and nothing answers; Ray would try for minutes."""
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


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """The sizes of batches and files, and the GPUs of the cluster."""

    batch_size: int
    """Images that an actor scores at once."""
    images_per_part: int
    """Rows of a file of results."""
    gpus: int
    """Number of GPUs of the connected cluster."""


def score_on_ray(folder: PredictionFolder, images: Files | Shards, scorer: dict[str, Any], options: RayOptions) -> None:
    """Scores ``images`` into ``folder`` by as many actors as the cluster has GPUs, or processors if it has none.

    ``scorer``: arguments of BatchScorer. Every machine must be able to read its model and the images, and to write the
    folder. A worker that is killed is replaced, and its images are scored again.

    Raises: InputError with the worker's line; UnavailableError if the cluster has another version of fastmsflow.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util.client import ray as client

    try:
        if client.is_connected():
            # Ray Data needs its driver within the cluster; a retry would write the rows of the first try again.
            driver = ray.remote(num_cpus=0, max_retries=0)(cast(Any, _score))
            try:
                ray.get(driver.remote(folder, ray.put(images), scorer, options))
            except (ImportError, AttributeError) as error:
                why = f"the cluster has no such fastmsflow ({in_one_line(error)})"
                raise UnavailableError(f"{why}; install this version on all its machines") from error
        else:
            _score(folder, images, scorer, options)
    except RayError as error:
        raise InputError(f"a worker of the cluster failed: {_line_of(error)}") from error
    if (rows := folder.rows_of_this_run()) < len(images):
        remedy = "give a folder that all its machines share, or the URL of an object store; if it is one, start again"
        have = f"the cluster has scored {len(images)} images, and {rows} have rows here"
        raise InputError(f"{shown(folder.out)}: {have}; {remedy}")


def _score(folder: PredictionFolder, images: Files | Shards, scorer: dict[str, Any], options: RayOptions) -> None:
    import ray

    resources = {"num_gpus": 1} if options.gpus else {"num_cpus": 1}
    actors = options.gpus or max(1, int(ray.cluster_resources().get("CPU", 1)))
    if isinstance(images, Files):
        # A block of names becomes a file of results.
        starts = range(0, len(images), options.images_per_part)
        actors = min(actors, len(starts))
        blocks = [images.paths[start : start + options.images_per_part] for start in starts]
        dataset: Any = ray.data.from_arrow([_named(block) for block in blocks])
    else:
        dataset = _shard_dataset(images, options.batch_size, actors)
    dataset.map_batches(
        BatchScorer,
        fn_constructor_kwargs=scorer,
        batch_size=options.batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=actors),
        **resources,
    ).write_parquet(
        folder.parts,
        filesystem=folder.files,
        filename_provider=_filename_provider(folder.run),
        mode="append",
        # Blocks of shards are split by bytes.
        min_rows_per_file=None if isinstance(images, Files) else options.images_per_part,
        # The actors have all processors; writing takes little.
        ray_remote_args={"num_cpus": 0},
    )


def _filename_provider(run: str) -> Any:
    """Returns a provider of file names that begin with ``run``, for old and new versions of Ray."""
    from ray.data.datasource import FilenameProvider

    class Names(FilenameProvider):
        def get_filename_for_task(self, write_uuid: str, task_index: int) -> str:
            return f"{run}_{write_uuid}_{task_index:06}.parquet"

        def get_filename_for_block(self, block: Any, write_uuid: str, task_index: int, block_index: int) -> str:
            return f"{run}_{write_uuid}_{task_index:06}_{block_index:06}.parquet"

    return Names()


def _named(paths: list[str]) -> pa.Table:
    """Returns a table of paths in UTF-8; a path that is not UTF-8 has a fault."""
    names = [as_utf8(path) for path in paths]
    fault = "its name is not UTF-8; rename it, or score it into another folder without --cluster"
    faults = [None if name == path else f"{name}: {fault}" for name, path in zip(names, paths, strict=True)]
    return pa.table({PATH: names, "fault": faults}, schema=pa.schema({PATH: pa.string(), "fault": pa.string()}))


def _shard_dataset(images: Shards, batch_size: int, readers: int) -> Any:
    import ray

    shards = images.set.manifest.shards
    done = [images.done.get(shard.name, set()) for shard in shards]
    waiting = [
        pa.table({"number": [i], "done": pa.array([list(done[i])], pa.list_(pa.string()))})
        for i, shard in enumerate(shards)
        if len(done[i]) < shard.images
    ]
    return ray.data.from_arrow(waiting).map_batches(
        partial(_read_shard, where=images.where, size=batch_size),
        batch_size=1,
        # The actors have all processors, and reading mostly waits; a few tasks read ahead.
        num_cpus=0,
        compute=ray.data.TaskPoolStrategy(size=readers),
    )


def _read_shard(row: dict[str, Any], where: str, size: int) -> Iterator[pa.Table]:
    """Yields batches of ``size`` images of a shard with their paths, and faults for lost images."""
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
        yield pa.table(rows, schema=pa.schema({PATH: pa.string(), "bytes": pa.binary(), "fault": pa.string()}))


def _line_of(error: Exception) -> str:
    """Returns the worker's own message, without Ray's tracebacks and advice."""
    told = [line for line in str(error).splitlines() if "InputError: " in line or "UnavailableError: " in line]
    return told[-1].partition("Error: ")[2] if told else in_one_line(error)
