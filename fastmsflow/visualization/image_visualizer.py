"""Draws one scored image: the image, its heat map with outlined regions, and the legend of the colors.

Text is laid out with Pillow, because `predict` draws a picture for every image and matplotlib takes several
times as long.
"""

from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path

import matplotlib as mpl
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .color_scale import ColorScale
from .heat_maps import COLORMAP, overlay

SMALLEST_SIDE = 256
BAR_STEPS = 512
INK, PAPER = (24, 24, 24), (255, 255, 255)
VERDICT_COLORS = {True: (176, 0, 32), False: (0, 104, 55), None: INK}


class ImageVisualizer:
    """Draws the images of one model, with the same colors for the same values."""

    def __init__(self, color_scale: ColorScale, image_size: tuple[int, int] | None) -> None:
        """``image_size``: (H, W) of the score maps, as large as which a picture shows an image; None: maps and pictures
        have the image's own size."""
        self._color_scale = color_scale
        self._side = None if image_size is None else max(SMALLEST_SIDE, *image_size)

    def shrink(self, image: Image.Image) -> Image.Image:
        """Returns ``image`` at the size that the picture shows, with its proportions."""
        if self._side is None:
            return image
        scale = self._side / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        return image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=2.0)

    def paint(
        self,
        shrunk: Image.Image,
        score_map: np.ndarray,
        *,
        outlines: Sequence[np.ndarray],
        size: tuple[int, int],
        name: str,
        verdict: str,
        defective: bool | None,
    ) -> Image.Image:
        """Returns the picture, RGB, with the image's ``name`` and a line with score and label, ``verdict``, above.

        ``shrunk``: the RGB image that ``shrink`` returned; ``score_map``: (H, W) float32; ``outlines``: lines (n, 2) of
        (x, y) in pixels of the image of ``size`` (width, height); ``defective``: None without a threshold.
        """
        width, height = shrunk.size
        values = np.asarray(Image.fromarray(score_map).resize((width, height), Image.Resampling.BILINEAR))
        heat_map = Image.fromarray(overlay(np.asarray(shrunk), values, self._color_scale.scale))
        _draw_outlines(heat_map, outlines, (width / size[0], height / size[1]))

        side = self._side or max(SMALLEST_SIDE, width, height)
        text = max(12, side // 32)
        gap = text // 2
        # A tall image makes a narrow picture, but the text needs its width all the same.
        page = max(2 * width, side) + 3 * gap
        legend = _draw_legend(self._color_scale, page - 2 * gap, text)
        top = gap + 2 * round(1.4 * text) + gap
        picture = Image.new("RGB", (page, top + height + gap + legend.height), PAPER)
        draw = ImageDraw.Draw(picture)
        draw.text((gap, gap), _fitted(name, _font(text, True), page - 2 * gap), INK, _font(text, True))
        line = _fitted(verdict, _font(text), page - 2 * gap)
        draw.text((gap, gap + round(1.4 * text)), line, VERDICT_COLORS[defective], _font(text))
        left = (page - 2 * width - gap) // 2
        picture.paste(shrunk, (left, top))
        picture.paste(heat_map, (left + width + gap, top))
        picture.paste(legend, (gap, top + height + gap))
        return picture


@lru_cache(64)
def _draw_legend(color_scale: ColorScale, width: int, text: int) -> Image.Image:
    """Returns the color bar with its values, the mark of the region threshold, and the caption."""
    font, bar = _font(text), text
    line = round(1.35 * text)
    caption = _wrapped(color_scale.caption, font, width)
    legend = Image.new("RGB", (width, bar + text // 3 + line * (1 + len(caption)) + text // 2), PAPER)
    draw = ImageDraw.Draw(legend)
    colors = (mpl.colormaps[COLORMAP](np.linspace(0, 1, BAR_STEPS))[:, :3] * 255).round().astype(np.uint8)
    legend.paste(Image.fromarray(colors[None]).resize((width, bar), Image.Resampling.BILINEAR), (0, 0))
    low, high = color_scale.scale
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        value = f"{low + share * (high - low):.2f}"
        value = {0.0: f"≤ {value}", 1.0: f"≥ {value}"}.get(share, value)
        x = share * (width - 1)
        length = draw.textlength(value, font)
        draw.line([(x, bar), (x, bar + text // 4)], INK)
        draw.text((min(max(0, x - length / 2), width - length), bar + text // 3), value, INK, font)
    if color_scale.mark is not None:
        x = round((color_scale.mark - low) / max(high - low, 1e-12) * (width - 1))
        half = max(1, text // 10)
        draw.rectangle([x - 2 * half, 0, x + 2 * half, bar - 1], INK)
        draw.rectangle([x - half + 1, 0, x + half - 1, bar - 1], PAPER)
    for number, content in enumerate(caption):
        draw.text((0, bar + text // 3 + line * (1 + number)), content, INK, font)
    return legend


def _draw_outlines(heat_map: Image.Image, outlines: Sequence[np.ndarray], scale: tuple[float, float]) -> None:
    """Draws lines in white within black, which are visible on every color."""
    draw = ImageDraw.Draw(heat_map)
    thin = max(1, round(max(heat_map.size) / 300))
    # A line at the image's border is moved inside by its width.
    last = np.array(heat_map.size) - 1 - thin
    lines = [[(x, y) for x, y in (outline * scale - 0.5).clip(thin, last).tolist()] for outline in outlines]
    for color, width in ((INK, 3 * thin), (PAPER, thin)):
        for line in lines:
            draw.line(line, color, width, joint="curve")


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    # matplotlib's font; Pillow's own has Latin letters only.
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(mpl.get_data_path(), "fonts", "ttf", name)), size)


def _fitted(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Returns ``text`` without its middle if it is too long."""
    if font.getlength(text) <= width:
        return text
    half = len(text) // 2
    while half > 1 and font.getlength(f"{text[:half]}…{text[-half:]}") > width:
        half -= 1
    return f"{text[:half]}…{text[-half:]}"


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Returns the lines of ``text``."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
