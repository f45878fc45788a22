"""SortedTable maps are painted to one scale, whatever the size of the image."""

import numpy as np
import pytest
from PIL import Image

from fastmsflow.inference.regions import find_regions
from fastmsflow.visualization.color_scale import ColorScale
from fastmsflow.visualization.image_visualizer import ImageVisualizer


@pytest.mark.parametrize("side", [64, 256, 1024])
def test_pictures_have_one_scale_whatever_the_image_and_an_outline(side: int) -> None:
    heat = ColorScale(3, "absolute", (0.0, 10.0), 5.0)
    visualizer = ImageVisualizer(heat, (side, side))
    image = Image.new("RGB", (200, 100), (128, 128, 128))
    shown = visualizer.shrink(image)
    assert shown.size == (max(256, side), max(256, side) // 2)
    score_map = np.zeros((side, side), np.float32)
    score_map[side // 4 : side // 2, side // 4 : side // 2] = 10
    outlines = [region.outline for region in find_regions(score_map, 5.0, image.size)]
    name = "a name that is far too long for so small a picture, " * 4

    def painted(values: np.ndarray, lines: list[np.ndarray]) -> np.ndarray:
        picture = visualizer.paint(
            shown, values, outlines=lines, size=image.size, name=name, verdict="score", defective=None
        )
        return np.asarray(picture).astype(int)

    with_region, without = painted(score_map, outlines), painted(np.zeros_like(score_map), [])
    assert with_region.shape == without.shape
    changed = np.argwhere((with_region != without).any(axis=2))
    (top, left), (bottom, right) = changed.min(axis=0), changed.max(axis=0)
    width, height = shown.size
    # A quarter of the image each way and its outline; nothing in the image at the left, the words or the legend.
    assert right - left == pytest.approx(width / 4, abs=0.03 * width + 6)
    assert bottom - top == pytest.approx(height / 4, abs=0.03 * width + 6)
    assert left > width
    assert (with_region[top:bottom, left:right] == 255).all(axis=2).any()
