"""One self-contained HTML page of results: no network, no other file."""

import base64
import hashlib
import html
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from numbers import Real
from pathlib import Path
from typing import Any

import contourpy
import matplotlib as mpl
import numpy as np
from PIL import Image

from ..errors import InputError
from ..files import written_aside
from .heat_maps import COLOURS

# Longest sides in the page: 430 images make 3 MB (solar cells) to 10 MB (detailed photographs).
IMAGE_SIDE, HEAT_SIDE = 384, 256
QUALITY = 80
# Outlines are drawn on a grid of quarters of a heat map's pixel.
GRID = 4
# What the page interpolates between; turbo is smooth.
COLOUR_STOPS = 33
TEMPLATE = files("fastmsflow.visualization") / "template"


@dataclass(frozen=True)
class ReportRow:
    """One image with its score and heat map."""

    image: Path
    """Shown as its name."""
    label: int | None
    """0 good, 1 defective, None unknown."""
    kind: str
    """The defect's folder name, or "good"; may be empty where the label is unknown."""
    score: float
    """Nats, comparable between images; the higher, the more abnormal."""
    pixels: np.ndarray
    """(H, W, 3) uint8."""
    heat: np.ndarray
    """(H, W) real; the higher, the more abnormal."""
    mask: np.ndarray | None = None
    """(H, W) bool: true defects, outlined."""


@dataclass(frozen=True)
class Report:
    """What ``write_report`` shows."""

    title: str
    rows: Iterable[ReportRow]
    """Consumed once, one at a time."""
    heat_scale: tuple[float, float]
    """The values of the first and last colour, the same for all images."""
    heat_caption: str
    threshold: float | None
    """Images with a higher score are flagged, until the reader moves it; None: it starts at the median score."""
    threshold_note: str
    """Where ``threshold`` comes from, in one sentence."""
    region_threshold: float | None
    """Heat maps are outlined at this value."""
    pro: tuple[np.ndarray, np.ndarray] | None
    """(false-positive rates, PROs) of fastmsflow.metrics.pro_curve."""
    metrics: Mapping[str, Mapping[str, float | None]]
    """Which checkpoint ("last", ...) -> name of the metric -> value."""
    settings: Mapping[str, Any]
    """Nested."""
    versions: Mapping[str, str]
    fingerprint: str
    """Of the data."""
    licence: str = ""
    """Of the images."""


def write_report(path: Path, page: Report) -> None:
    """Writes ``page`` as HTML: scores with a threshold to move, counts, curves, a gallery to sort and filter.

    Rows are written as they come, so that one at a time is in memory. Errors: InputError where there is no row, or a
    row's score or heat map is not finite, or its sizes differ.
    """
    style = _template("page.css")
    script = _template("charts.js") + _template("page.js")
    facts: list[dict[str, Any]] = []
    holes = {
        # Only these two run or style anything: nothing else does, whatever an image is called.
        "policy": lambda: [
            f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)};"
            " base-uri 'none'; form-action 'none'"
        ],
        "title": lambda: [_as_html(page.title)],
        "style": lambda: [style],
        "pictures": lambda: _pictures(page, facts),
        "data": lambda: [_as_json(_data(page, facts))],
        "script": lambda: [script],
    }
    with written_aside(path) as aside, aside.open("w", encoding="utf-8", newline="\n") as file:
        # In the template's order, so the facts are complete when they are written, after the pictures.
        for i, part in enumerate(re.split(r"\{\{(\w+)\}\}", _template("page.html"))):
            file.writelines(holes[part]() if i % 2 else [part])


def _pictures(page: Report, facts: list[dict[str, Any]]) -> Iterator[str]:
    """Each row's pictures as an inert element, which the page reads once it shows them; the rest goes to ``facts``."""
    low, high = page.heat_scale
    for row in page.rows:
        _check(row)
        image = Image.fromarray(row.pixels)
        image.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
        width, height = _fitted(row.heat.shape, HEAT_SIDE)
        heat = np.asarray(Image.fromarray(row.heat.astype(np.float32)).resize((width, height), Image.Resampling.BOX))
        # Grey: the page colours it, opaque or more transparent where it is normal.
        share = np.clip((heat - low) / max(high - low, 1e-12), 0, 1)
        pictures = {
            "image": _as_webp(image),
            "heat": _as_webp(Image.fromarray((share * 255).round().astype(np.uint8))),
            "box": f"0 0 {GRID * width} {GRID * height}",
            "mask": "" if row.mask is None else _outline(row.mask, 0.5, (height, width)),
            "region": "" if page.region_threshold is None else _outline(heat, page.region_threshold, (height, width)),
        }
        yield f'<script type="application/json" id="pictures-{len(facts)}">{_as_json(pictures)}</script>\n'
        label = None if row.label is None else int(row.label)
        facts.append(
            {
                "name": row.image.name,
                "kind": row.kind,
                "label": label,
                "score": float(row.score),
                "masked": row.mask is not None and bool(row.mask.any()),
                "ratio": round(width / height, 4),
            }
        )
    if not facts:
        raise InputError("a report needs at least one image; none was given")


def _check(row: ReportRow) -> None:
    if not math.isfinite(row.score) or not np.isfinite(row.heat).all():
        raise InputError(f"{row.image}: its score or heat map is not finite; look for where the model overflows")
    shapes = {row.pixels.shape[:2], row.heat.shape, row.heat.shape if row.mask is None else row.mask.shape}
    if len(shapes) > 1:
        raise InputError(f"{row.image}: image, heat map and mask have shapes {sorted(shapes)}; give all the same")


def _data(page: Report, facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    colours = mpl.colormaps[COLOURS](np.linspace(0, 1, COLOUR_STOPS))[:, :3].round(4)
    return {
        "rows": facts,
        "scale": [float(v) for v in page.heat_scale],
        "caption": page.heat_caption,
        "threshold": None if page.threshold is None else float(page.threshold),
        "note": page.threshold_note,
        "region": None if page.region_threshold is None else float(page.region_threshold),
        "pro": None
        if page.pro is None
        else [np.asarray(part, dtype=np.float64).round(5).tolist() for part in page.pro],
        "metrics": page.metrics,
        "settings": page.settings,
        "versions": page.versions,
        "fingerprint": page.fingerprint,
        "licence": page.licence,
        "colours": colours.tolist(),
    }


def _outline(values: np.ndarray, level: float, size: tuple[int, int]) -> str:
    """Where ``values`` (H, W) pass ``level``, as an SVG path on a grid of ``GRID`` units a pixel of ``size`` (H, W)."""
    # A border below the level closes what touches the edge.
    padded = np.pad(values.astype(np.float64), 1, constant_values=min(float(values.min()), level) - 1)
    per_pixel = np.array([size[1] / values.shape[1], size[0] / values.shape[0]]) * GRID
    path = []
    for line in contourpy.contour_generator(z=padded).lines(level):
        # Pixel (0, 0) is centred at (1, 1) of the padded array, at half a pixel of the picture.
        points = ((np.asarray(line) - 0.5) * per_pixel).clip(0, np.array(size)[::-1] * GRID).round().astype(int)
        steps = np.diff(points, axis=0)
        steps = steps[steps.any(axis=1)]
        if len(steps) > 2:
            path.append(f"M{points[0, 0]} {points[0, 1]}l" + " ".join(f"{x} {y}" for x, y in steps[:-1]) + "z")
    return "".join(path)


def _fitted(shape: tuple[int, ...], side: int) -> tuple[int, int]:
    """(width, height) of an (H, W) picture, shrunk to ``side`` at most."""
    shrunk = min(1.0, side / max(shape))
    return max(1, round(shape[1] * shrunk)), max(1, round(shape[0] * shrunk))


def _as_webp(image: Image.Image) -> str:
    """Base64."""
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=QUALITY, method=2)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _template(name: str) -> str:
    return (TEMPLATE / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a Content-Security-Policy names an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"


def _as_json(content: Any) -> str:
    """ASCII, safe between <script> tags; what JSON lacks is written as text."""
    return json.dumps(_plain(content), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _plain(value: Any) -> Any:
    """What JSON has; NaN, paths and all else as text."""
    if isinstance(value, Mapping):
        return {_shown(str(key)): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if value is None or isinstance(value, bool | int):
        return value
    return float(value) if isinstance(value, Real) and math.isfinite(value) else _shown(str(value))


def _as_html(text: str) -> str:
    return html.escape(_shown(text))


def _shown(text: str) -> str:
    """Bytes of a file name that are not UTF-8 become U+FFFD."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
