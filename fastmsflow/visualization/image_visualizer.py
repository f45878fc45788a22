"""The picture of one scored image: itself, its heat map with outlined regions, and what the colours mean."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib as mpl
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..inference.regions import Region
from .color_scale import ColorScale
from .heat_maps import COLOURS, overlay

SMALLEST_SIDE = 256
BAR_STEPS = 512
INK, PAPER = (24, 24, 24), (255, 255, 255)
VERDICT = {True: (176, 0, 32), False: (0, 104, 55), None: INK}


@dataclass(frozen=True)
class Verdict:
    name: str
    """Of the image."""
    text: str
    """One line: score and label."""
    defective: bool | None
    """None: not known without a threshold."""


class ImageVisualizer:
    """Pictures of the images of one model, all with the same colours for the same values."""

    def __init__(self, heat: ColorScale, image_size: tuple[int, int]) -> None:
        """``image_size``: (H, W) of the score maps; a picture shows an image about as large."""
        self._heat = heat
        self._side = max(SMALLEST_SIDE, *image_size)
        self._legends: dict[tuple[int, int], Image.Image] = {}

    def shrink(self, image: Image.Image) -> Image.Image:
        """``image`` as large as it is shown, its proportions kept."""
        scale = self._side / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        return image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=2.0)

    def paint(
        self,
        shown: Image.Image,
        score_map: np.ndarray,
        regions: Sequence[Region],
        size: tuple[int, int],
        verdict: Verdict,
    ) -> Image.Image:
        """RGB. ``shown``: RGB, from ``shrink``; ``score_map``: (H, W) float32; ``regions``: in pixels of an image of
        ``size``, (width, height)."""
        width, height = shown.size
        values = np.asarray(Image.fromarray(score_map).resize((width, height), Image.Resampling.BILINEAR))
        heat = Image.fromarray(overlay(np.asarray(shown), values, self._heat.scale))
        _outline(heat, regions, (width / size[0], height / size[1]))

        text = max(12, self._side // 32)
        gap = text // 2
        # Of a tall image the pictures are narrow; the words need their room all the same.
        page = max(2 * width, self._side) + 3 * gap
        legend = self._legend(page - 2 * gap, text)
        top = gap + 2 * round(1.4 * text) + gap
        picture = Image.new("RGB", (page, top + height + gap + legend.height), PAPER)
        draw = ImageDraw.Draw(picture)
        draw.text((gap, gap), _fitted(verdict.name, _font(text, True), page - 2 * gap), INK, _font(text, True))
        line = _fitted(verdict.text, _font(text), page - 2 * gap)
        draw.text((gap, gap + round(1.4 * text)), line, VERDICT[verdict.defective], _font(text))
        left = (page - 2 * width - gap) // 2
        picture.paste(shown, (left, top))
        picture.paste(heat, (left + width + gap, top))
        picture.paste(legend, (gap, top + height + gap))
        return picture

    def _legend(self, width: int, text: int) -> Image.Image:
        """The colours from left to right with their values, the region threshold marked, and what they are of."""
        key = (width, text)
        if key not in self._legends:
            self._legends[key] = _legend(self._heat, width, text)
        return self._legends[key]


def _legend(heat: ColorScale, width: int, text: int) -> Image.Image:
    font, bar = _font(text), text
    line = round(1.35 * text)
    words = _wrapped(heat.caption, font, width)
    legend = Image.new("RGB", (width, bar + text // 3 + line * (1 + len(words)) + text // 2), PAPER)
    draw = ImageDraw.Draw(legend)
    colours = (mpl.colormaps[COLOURS](np.linspace(0, 1, BAR_STEPS))[:, :3] * 255).round().astype(np.uint8)
    legend.paste(Image.fromarray(colours[None]).resize((width, bar), Image.Resampling.BILINEAR), (0, 0))
    low, high = heat.scale
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        value = f"{low + share * (high - low):.2f}"
        value = {0.0: f"≤ {value}", 1.0: f"≥ {value}"}.get(share, value)
        x = share * (width - 1)
        length = draw.textlength(value, font)
        draw.line([(x, bar), (x, bar + text // 4)], INK)
        draw.text((min(max(0, x - length / 2), width - length), bar + text // 3), value, INK, font)
    if heat.mark is not None:
        x = round((heat.mark - low) / max(high - low, 1e-12) * (width - 1))
        half = max(1, text // 10)
        draw.rectangle([x - 2 * half, 0, x + 2 * half, bar - 1], INK)
        draw.rectangle([x - half + 1, 0, x + half - 1, bar - 1], PAPER)
    for number, content in enumerate(words):
        draw.text((0, bar + text // 3 + line * (1 + number)), content, INK, font)
    return legend


def _outline(heat: Image.Image, regions: Sequence[Region], scale: tuple[float, float]) -> None:
    """White within black: seen on every colour."""
    draw = ImageDraw.Draw(heat)
    thin = max(1, round(max(heat.size) / 300))
    # At the border of the image all of a line is still inside.
    last = np.array(heat.size) - 1 - thin
    lines = [[(x, y) for x, y in (region.outline * scale - 0.5).clip(thin, last).tolist()] for region in regions]
    for colour, width in ((INK, 3 * thin), (PAPER, thin)):
        for line in lines:
            draw.line(line, colour, width, joint="curve")


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    # matplotlib brings it; Pillow's own has Latin letters only.
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(mpl.get_data_path(), "fonts", "ttf", name)), size)


def _fitted(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Its middle left out where it is too long."""
    if font.getlength(text) <= width:
        return text
    kept = len(text)
    while kept > 2 and font.getlength(f"{text[: kept // 2]}…{text[-(kept // 2) :]}") > width:
        kept -= 1
    return f"{text[: kept // 2]}…{text[-(kept // 2) :]}"


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
