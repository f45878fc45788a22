"""Writes results as one HTML page that needs no network and no other file."""

import base64
import hashlib
import html
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from numbers import Real
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from PIL import Image

from ..contours import trace_contours
from ..errors import InputError
from ..files import written_aside
from .heat_maps import COLORMAP

# The longest sides in the page; a page of 430 images has 3 MB (solar cells) to 10 MB (detailed photographs).
IMAGE_SIDE, HEAT_SIDE = 384, 256
QUALITY = 80
# Outlines have points on a grid of a quarter of a heat map's pixel.
GRID = 4
# The page interpolates between so many colors.
COLOR_STOPS = 33


@dataclass(frozen=True)
class ReportRow:
    """One image with its score and heat map."""

    image: Path
    """The page shows its name."""
    label: int | None
    """0 good, 1 defective, None unknown."""
    kind: str
    """The defect's folder name, or "good"; may be empty where the label is unknown."""
    score: float
    """Nats, comparable between images; the higher, the more abnormal."""
    pixels: np.ndarray
    """(H, W, 3) uint8."""
    score_map: np.ndarray
    """(H, W) real; the higher, the more abnormal."""
    mask: np.ndarray | None = None
    """(H, W) bool: the true defects, which are outlined."""


@dataclass(frozen=True)
class Report:
    """The contents of a page."""

    title: str
    rows: Iterable[ReportRow]
    """Consumed once, one row at a time."""
    heat_scale: tuple[float, float]
    """The values of the first and the last color, the same for all images."""
    heat_caption: str
    threshold: float | None
    """Images with a higher score are flagged; the reader can move it. None: it starts at the median score."""
    threshold_note: str
    """The origin of ``threshold``, in one sentence."""
    region_threshold: float | None
    """Heat maps are outlined at this value."""
    pro: tuple[np.ndarray, np.ndarray] | None
    """(false-positive rates, PROs) of fastmsflow.metrics.pro_curve."""
    metrics: Mapping[str, Mapping[str, float | None]]
    """Checkpoint ("last", ...) -> name of the metric -> value."""
    settings: Mapping[str, Any]
    """Option -> value; may be nested."""
    versions: Mapping[str, str]
    fingerprint: str
    """The fingerprint of the data."""
    licence: str = ""
    """The license of the images."""
    side: int | None = None
    """The longest side of pictures and heat maps, which are shrunk by their largest values, so that small defects stay.
    None: IMAGE_SIDE, and HEAT_SIDE for heat maps, which are shrunk by means."""
    corruption: Mapping[str, Mapping[str, Mapping[str, float | None]]] = field(default_factory=dict)
    """Checkpoint -> change of light -> name of the metric -> value."""
    pixel_note: str = ""
    """The threshold of pixels, its origin and the metrics at it, in a sentence or two."""
    kinds: Mapping[str, Mapping[str, Mapping[str, float | None]]] = field(default_factory=dict)
    """Checkpoint -> kind of defect -> name of the metric -> value."""


def write_report(path: Path, page: Report) -> None:
    """Writes ``page`` as HTML: scores with a threshold to move, counts, curves, a gallery to sort and filter.

    Rows are written one by one, so that only one is in memory.

    Raises: InputError if there is no row, a row's score or score map is not finite, or its arrays differ in size.
    """
    style = _template("page.css")
    script = _template("charts.js") + _template("page.js")
    facts: list[dict[str, Any]] = []
    sections = {
        # No other script or style takes effect, whatever an image's name contains.
        "policy": lambda: [
            f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)};"
            " base-uri 'none'; form-action 'none'"
        ],
        "title": lambda: [html.escape(_shown(page.title))],
        "style": lambda: [style],
        "pictures": lambda: _pictures(page, facts),
        "data": lambda: [_as_json(_data(page, facts))],
        "script": lambda: [script],
    }
    with written_aside(path) as aside, aside.open("w", encoding="utf-8", newline="\n") as file:
        # The template has the data after the pictures, when all facts are known.
        for i, part in enumerate(re.split(r"\{\{(\w+)\}\}", _template("page.html"))):
            file.writelines(sections[part]() if i % 2 else [part])


def _pictures(page: Report, facts: list[dict[str, Any]]) -> Iterator[str]:
    """Yields an inert element with the pictures of each row, and appends the row's facts to ``facts``.

    The page reads an element when it shows the row.
    """
    (low, high), region = page.heat_scale, page.region_threshold
    for row in page.rows:
        _check(row)
        image = Image.fromarray(row.pixels)
        side = page.side or IMAGE_SIDE
        image.thumbnail((side, side))
        score_map = _shrunk(row.score_map.astype(np.float32), page.side)
        height, width = score_map.shape
        # Gray values; the page colors them.
        share = np.clip((score_map - low) / max(high - low, 1e-12), 0, 1)
        pictures = {
            "image": _as_webp(image),
            "heat": _as_webp(Image.fromarray((share * 255).round().astype(np.uint8))),
            "box": f"0 0 {GRID * width} {GRID * height}",
            "mask": "" if row.mask is None else _svg_outline(row.mask, 0.5, (height, width)),
            "region": "" if region is None else _svg_outline(score_map, region, (height, width)),
        }
        yield f'<script type="application/json" id="pictures-{len(facts)}">{_as_json(pictures)}</script>\n'
        facts.append(
            {
                "name": row.image.name,
                "kind": row.kind,
                "label": row.label,
                "score": row.score,
                "masked": row.mask is not None and bool(row.mask.any()),
                "ratio": round(width / height, 4),
            }
        )
    if not facts:
        raise InputError("a report needs at least one image; none was given")


def _shrunk(score_map: np.ndarray, side: int | None) -> np.ndarray:
    """Returns a map (H, W) float32 as large as the page shows it; ``side``: see Report."""
    if side is None:
        heat_map = Image.fromarray(score_map)
        heat_map.thumbnail((HEAT_SIDE, HEAT_SIDE), Image.Resampling.BOX, reducing_gap=None)
        return np.asarray(heat_map)
    step = -(-max(score_map.shape) // side)
    starts = (np.arange(0, length, step) for length in score_map.shape)
    rows, columns = starts
    return np.maximum.reduceat(np.maximum.reduceat(score_map, rows, axis=0), columns, axis=1)


def _check(row: ReportRow) -> None:
    if not math.isfinite(row.score) or not np.isfinite(row.score_map).all():
        raise InputError(f"{row.image}: its score or heat map is not finite; look for where the model overflows")
    shapes = {row.pixels.shape[:2], row.score_map.shape, row.score_map.shape if row.mask is None else row.mask.shape}
    if len(shapes) > 1:
        raise InputError(f"{row.image}: image, heat map and mask have shapes {sorted(shapes)}; give all the same")


def _data(page: Report, facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    colors = mpl.colormaps[COLORMAP](np.linspace(0, 1, COLOR_STOPS))[:, :3].round(4)
    return {
        "rows": facts,
        "scale": page.heat_scale,
        "caption": page.heat_caption,
        "threshold": page.threshold,
        "note": page.threshold_note,
        "region": page.region_threshold,
        "pro": page.pro and [np.asarray(part, dtype=np.float64).round(5).tolist() for part in page.pro],
        "metrics": page.metrics,
        "corruption": page.corruption,
        "pixel_note": page.pixel_note,
        "kinds": page.kinds,
        "settings": page.settings,
        "versions": page.versions,
        "fingerprint": page.fingerprint,
        "licence": page.licence,
        "colours": colors.tolist(),
    }


def _svg_outline(values: np.ndarray, level: float, size: tuple[int, int]) -> str:
    """Returns the contour of ``values`` at ``level`` as an SVG path, ``GRID`` units a pixel of ``size`` (H, W)."""
    border = min(float(values.min()), level) - 1
    per_pixel = np.array([size[1] / values.shape[1], size[0] / values.shape[0]]) * GRID
    path = []
    for line in trace_contours(values, level, border):
        points = (line * per_pixel).clip(0, np.array(size)[::-1] * GRID).round().astype(int)
        steps = np.diff(points, axis=0)
        steps = steps[steps.any(axis=1)]
        if len(steps) > 2:
            path.append(f"M{points[0, 0]} {points[0, 1]}l" + " ".join(f"{x} {y}" for x, y in steps[:-1]) + "z")
    return "".join(path)


def _as_webp(image: Image.Image) -> str:
    """Returns the WebP file in Base64."""
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=QUALITY, method=2)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _template(name: str) -> str:
    return (files("fastmsflow.visualization") / "template" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Returns the name of an inline script or style in a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"


def _as_json(content: Any) -> str:
    """Returns ASCII that is safe between <script> tags; values that JSON lacks become text."""
    return json.dumps(_plain(content), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _plain(value: Any) -> Any:
    """Returns ``value`` in JSON's types; NaN, paths and all else as text."""
    if isinstance(value, Mapping):
        return {_shown(str(key)): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if value is None or isinstance(value, bool | int):
        return value
    return float(value) if isinstance(value, Real) and math.isfinite(value) else _shown(str(value))


def _shown(text: str) -> str:
    """Returns ``text`` with U+FFFD for the bytes of a file name that are not UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
