"""Masks as people draw them: in colors, palettes and transparency, under names of every spelling, and too small."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmsflow import InputError
from fastmsflow.data import Sample, load_mask, mvtec
from fastmsflow.data.masks import read_mask
from fastmsflow.errors import InputWarning

SIZE = (48, 64)
DRAWN = np.zeros(SIZE, bool)
DRAWN[10:20, 10:30] = True


def sample(folder: Path, mask: Image.Image, name: str = "mask.png", **options) -> Sample:
    Image.new("L", SIZE[::-1], 90).save(folder / "image.png")
    mask.save(folder / name, **options)
    return Sample(folder / "image.png", 1, folder / name, "spot")


def rgba(visible: tuple[int, ...], hidden: tuple[int, ...]) -> Image.Image:
    return Image.fromarray(np.where(DRAWN[..., None], np.uint8(visible), np.uint8(hidden)).astype(np.uint8))


@pytest.mark.parametrize(
    "mask",
    [
        rgba((255, 255, 255, 255), (255, 255, 255, 0)),
        rgba((0, 0, 0, 255), (0, 0, 0, 0)),
        rgba((255, 0, 0, 255), (255, 255, 255, 0)),
        rgba((255, 255, 255, 255), (0, 0, 0, 0)),
        rgba((255, 0, 0, 100), (255, 0, 0, 0)),
        rgba((255, 255, 255, 255), (0, 0, 0, 255)),
        rgba((0, 0, 255, 255), (0, 0, 0, 255)),
        rgba((255, 255, 255, 0), (0, 0, 0, 0)),
        rgba((255, 255, 255, 255), (255, 255, 255, 0)).convert("LA"),
        rgba((0, 128, 0, 255), (0, 0, 0, 255)).convert("RGB"),
        rgba((255, 255, 255, 255), (255, 255, 255, 0)).quantize(4),
    ],
    ids=["white on transparent white", "black on transparent black", "red on transparent white",
         "white on transparent black", "faint", "opaque", "blue", "transparent everywhere", "gray and alpha", "green",
         "palette with alpha"],
)  # fmt: skip
def test_the_drawn_pixels_are_the_mask(mask: Image.Image, tmp_path: Path) -> None:
    assert np.array_equal(load_mask(sample(tmp_path, mask), SIZE), DRAWN)


def test_a_transparent_margin_is_no_defect(tmp_path: Path) -> None:
    pixels = np.array(rgba((255, 255, 255, 255), (0, 0, 0, 255)))
    pixels[:5] = 0
    assert np.array_equal(load_mask(sample(tmp_path, Image.fromarray(pixels)), SIZE), DRAWN)


def test_colors_and_transparency_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"mask\.png: the mask's opaque pixels are black .* save it without"):
        load_mask(sample(tmp_path, rgba((0, 0, 0, 255), (255, 255, 255, 0))), SIZE)


@pytest.mark.parametrize("colors", [(0, 0, 0, 128, 0, 0), (0, 0, 0, 64, 0, 0), (0, 0, 0, 9, 9, 9), (0, 0, 0, 0, 0, 64)])
def test_a_palette_mask_marks_what_is_not_black(colors: tuple[int, ...], tmp_path: Path) -> None:
    mask = Image.fromarray(DRAWN.astype(np.uint8), "P")
    mask.putpalette(colors)
    assert np.array_equal(load_mask(sample(tmp_path, mask), SIZE), DRAWN)


def test_every_class_of_a_palette_is_defective(tmp_path: Path) -> None:
    classes = DRAWN.astype(np.uint8)
    classes[30:40, 10:30] = 2
    mask = Image.fromarray(classes, "P")
    mask.putpalette((0, 0, 0, 64, 0, 0, 255, 255, 0))
    assert np.array_equal(load_mask(sample(tmp_path, mask), SIZE), classes > 0)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("value", [1, 255, 1000, 65535])
def test_16_bit_masks_mark_their_only_value(value: int, suffix: str, tmp_path: Path) -> None:
    given = sample(tmp_path, Image.fromarray(DRAWN.astype(np.uint16) * np.uint16(value)), f"mask.{suffix}")
    assert np.array_equal(load_mask(given, SIZE), DRAWN)


def test_big_endian_16_bits_are_not_clipped(tmp_path: Path) -> None:
    given = sample(tmp_path, Image.fromarray((DRAWN * 40_000 + ~DRAWN * 300).astype(">u2")), "mask.tif")
    assert np.array_equal(load_mask(given, SIZE), DRAWN)


@pytest.mark.parametrize("value", [0.5, 1.0, 255.0])
def test_floating_point_masks_mark_their_only_value(value: float, tmp_path: Path) -> None:
    given = sample(tmp_path, Image.fromarray(DRAWN.astype(np.float32) * np.float32(value)), "mask.tif")
    assert np.array_equal(load_mask(given, SIZE), DRAWN)


def test_what_resizing_loses_is_counted(tmp_path: Path) -> None:
    pixels = DRAWN.copy()
    pixels[[1, 5, 41, 47], [3, 60, 0, 63]] = True
    read = read_mask(sample(tmp_path, Image.fromarray(pixels)), (12, 16))
    taken = np.array(Image.fromarray(pixels).resize((16, 12), Image.Resampling.NEAREST))
    assert np.array_equal(read.pixels, taken)
    assert (read.marked, read.is_full) == (204, False)
    inside = sum(bool(taken[y // 4, x // 4]) for y, x in ((1, 3), (5, 60), (41, 0), (47, 63)))
    assert read.lost == 4 - inside > 0


@pytest.mark.parametrize("size", [(24, 32), (13, 17), (48, 64), (100, 150)])
def test_regions_are_lost_only_if_none_of_their_pixels_is_taken(size: tuple[int, int], tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for _ in range(5):
        y, x = random.integers(0, 48), random.integers(0, 64)
        pixels = np.zeros(SIZE, bool)
        pixels[y, x] = True
        read = read_mask(sample(tmp_path, Image.fromarray(pixels)), size)
        assert read.lost == int(not read.pixels.any())


def test_masks_that_mark_nothing_or_everything_say_so(tmp_path: Path) -> None:
    empty = read_mask(sample(tmp_path, Image.new("RGBA", SIZE[::-1], (255, 255, 255, 0))), (8, 8))
    full = read_mask(sample(tmp_path, Image.new("L", SIZE[::-1], 255)), (8, 8))
    assert (empty.marked, empty.is_full, full.is_full, full.lost) == (0, False, True, 0)


@pytest.mark.parametrize(
    "name", ["000_mask.PNG", "000_mask.Tiff", "000_MASK.png", "000.PNG", "000_mask.jfif", "000_mask.webp", "000.bmp"]
)
def test_masks_are_found_under_every_suffix_and_case(name: str, tmp_path: Path) -> None:
    for folder, file in (("train/good", "1.png"), ("test/dent", "000.png"), ("ground_truth/dent", name)):
        (tmp_path / folder).mkdir(parents=True)
        kind = Image.EXTENSION[Path(name).suffix.lower()]
        Image.new("L", (40, 36), 255).save(tmp_path / folder / file, kind)
    images = mvtec(tmp_path.parent, tmp_path.name)
    assert images.test[0].mask == tmp_path / f"ground_truth/dent/{name}"
    assert load_mask(images.test[0], (36, 40)).all()


def test_the_mask_of_exactly_the_images_name_comes_first(tmp_path: Path) -> None:
    for file in ("train/good/1.png", "test/dent/a.png", "test/dent/A.png"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (40, 36)).save(tmp_path / file)
    (tmp_path / "ground_truth/dent").mkdir(parents=True)
    for name in ("A_mask.png", "a_mask.png", "a_mask.bmp"):
        Image.new("L", (40, 36)).save(tmp_path / "ground_truth/dent" / name)
    with pytest.warns(InputWarning, match="1 in ground_truth/dent"):
        images = mvtec(tmp_path.parent, tmp_path.name)
    found = [sample.mask.name for sample in images.test if sample.mask]
    assert found == ["A_mask.png", "a_mask.png"]
