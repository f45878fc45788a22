"""Results of one part as a Parquet file. Needs the ``shards`` extra."""

import io
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..data.parts import Item
from ..errors import UnavailableError
from ..files import written_aside
from .regions import Region
from .scorer import LABELS, Judged

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as missing:
    raise UnavailableError(f"Parquet needs {missing.name}: pip install 'fastmsflow[shards]'") from missing

version: str = pa.__version__
METADATA = b"fastmsflow"
REGION = pa.struct(
    [
        ("left", pa.float32()),
        ("top", pa.float32()),
        ("right", pa.float32()),
        ("bottom", pa.float32()),
        ("area", pa.int64()),
        ("peak", pa.float32()),
    ]
)
# Scores in float64: the values that the other formats print, to the last bit, and that the threshold is compared with;
# what float32 leaves empty of it compresses well. Labels as plain strings: on the disk they are a dictionary all the
# same, and parts read together need not agree on one.
SCHEMA = pa.schema(
    [
        ("image", pa.string()),
        ("index", pa.int64()),
        ("score", pa.float64()),
        ("log_score", pa.float64()),
        ("absolute_score", pa.float64()),
        ("label", pa.string()),
        ("threshold", pa.float64()),
        ("regions", pa.list_(REGION)),
        ("fault", pa.string()),
    ]
)


@dataclass(frozen=True)
class Summary:
    """What a part's file says of itself."""

    key: str
    """Of the run that it belongs to."""
    rows: int
    faults: int
    """Rows without scores, those of lost images among them."""
    lost: int
    """Images that went with their shard."""
    defective: int
    damaged: str | None
    """What is wrong with the shard."""


class Table:
    """The rows of one part."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, item: Item, judged: Judged | None, threshold: float | None, fault: str | None) -> None:
        """Without ``judged``, ``fault`` says why."""
        row: dict[str, Any] = {"image": _utf8(item.name), "index": item.number, "threshold": threshold, "fault": fault}
        if judged is not None:
            regions = judged.regions
            row |= {
                "score": judged.score,
                "log_score": judged.log_score,
                "absolute_score": judged.absolute_score,
                "label": LABELS[judged.defective],
                "regions": None if regions is None else [_region(region) for region in regions],
            }
        self.rows.append(row)

    def write(self, path: Path, key: str, lost: int, damaged: str | None) -> None:
        """Written aside and renamed. Errors: InputError, see fastmsflow.files.write_faults."""
        faults = sum(row["fault"] is not None for row in self.rows)
        defective = sum(row.get("label") == LABELS[True] for row in self.rows)
        summary = Summary(key, len(self.rows), faults, lost, defective, damaged)
        schema = SCHEMA.with_metadata({METADATA: json.dumps(asdict(summary)).encode()})
        table = pa.Table.from_pylist(self.rows, schema=schema)
        content = io.BytesIO()
        pq.write_table(table, content, compression="zstd")
        with written_aside(path) as aside:
            aside.write_bytes(content.getbuffer())


def read_summary(path: Path) -> Summary | None:
    """None where there is no such file, or it is not whole."""
    try:
        with path.open("rb") as file:
            metadata = pq.read_metadata(file)
        summary = Summary(**json.loads(metadata.metadata[METADATA]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return summary if metadata.num_rows == summary.rows else None


def read_faults(path: Path) -> list[str]:
    """Of the images that have a row and no scores, but for those that are lost with their shard."""
    with path.open("rb") as file:
        rows = pq.read_table(file, columns=["image", "fault"]).to_pylist()
    return [row["fault"] for row in rows if row["fault"] is not None and row["image"] is not None]


def _region(region: Region) -> dict[str, float]:
    left, top, right, bottom = region.box
    return {"left": left, "top": top, "right": right, "bottom": bottom, "area": region.area, "peak": region.peak}


def _utf8(text: str | None) -> str | None:
    """A string of Parquet is UTF-8; a file's name need not be: its other bytes become \\xNN."""
    return text and os.fsencode(text).decode("utf-8", "backslashreplace")
