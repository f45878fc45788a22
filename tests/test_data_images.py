"""Image and mask files: every kind that is read, every fault that is named."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmsflow import InputError
from fastmsflow.data import Sample, list_images, load_image, load_mask, read_image

GREY = np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1))  # (48, 64)
COLOUR = np.stack([GREY, 255 - GREY, GREY // 2], axis=-1)


def saved(folder: Path, image: Image.Image, name: str = "image.png", **options) -> Path:
    path = folder / name
    image.save(path, **options)
    return path


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "CMYK", "I;16", "I"])
def test_every_mode_is_read_as_8_bit_rgb(mode: str, tmp_path: Path) -> None:
    sixteen = (GREY.astype(np.uint16) * 257).astype(np.int32 if mode == "I" else np.uint16)
    image = Image.fromarray(sixteen) if mode.startswith("I") else Image.fromarray(COLOUR).convert(mode)
    read = read_image(saved(tmp_path, image, "image.tif"))
    assert (read.mode, read.size) == ("RGB", (64, 48))
    if mode.startswith("I"):
        assert np.array_equal(np.asarray(read)[..., 0], GREY)


def test_grey_is_repeated_to_three_channels(tmp_path: Path) -> None:
    read = np.asarray(read_image(saved(tmp_path, Image.fromarray(GREY))))
    assert np.array_equal(read, np.repeat(GREY[..., None], 3, axis=-1))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)
    read = np.asarray(read_image(saved(tmp_path, Image.fromarray(values))))[..., 0]
    assert (read.min(), read.max()) == (0, 255)
    assert len(np.unique(read)) == 256


def test_a_palette_with_transparency_keeps_its_colours(tmp_path: Path) -> None:
    palette = Image.fromarray(COLOUR).quantize(16)
    path = saved(tmp_path, palette, transparency=3)
    assert np.array_equal(np.asarray(read_image(path)), np.asarray(palette.convert("RGB")))


def test_load_image_is_lanczos_in_0_to_1(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(COLOUR))
    loaded = load_image(path, (32, 40))
    expected = np.asarray(Image.fromarray(COLOUR).resize((40, 32), Image.Resampling.LANCZOS)) / 255
    assert loaded.shape == (3, 32, 40)
    assert loaded.dtype == torch.float32
    assert np.allclose(loaded.permute(1, 2, 0).numpy(), expected, atol=1e-6)


def test_a_large_photograph_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.new("L", (10_000, 10_000), 7), "large.jpg")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(path, (32, 32)).shape == (3, 32, 32)


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    good = saved(folder, Image.fromarray(COLOUR), "good.png").read_bytes()
    jpeg = saved(folder, Image.fromarray(COLOUR), "good.jpg").read_bytes()
    contents = {
        "zero.png": b"",
        "text.png": b"hello",
        "cut.png": good[: len(good) // 2],
        "cut.jpg": jpeg[:-200],
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "folder.png").mkdir()
    saved(folder, Image.fromarray(COLOUR[:31]), "small.png")
    saved(folder, Image.fromarray(GREY.astype(np.float32)), "float.tif")
    saved(folder, Image.fromarray(GREY.astype(np.int32) * 1000), "deep.tif")
    return {
        "zero bytes": (folder / "zero.png", "not an image"),
        "no image": (folder / "text.png", "not an image"),
        "truncated PNG": (folder / "cut.png", "damaged or truncated"),
        "truncated JPEG": (folder / "cut.jpg", "damaged or truncated"),
        "a folder": (folder / "folder.png", "a folder"),
        "missing": (folder / "none.png", "no such file"),
        "smaller than the stride": (folder / "small.png", "64x31 pixels, less than the extractor's stride of 32"),
        "floating point": (folder / "float.tif", "8 or 16 bits"),
        "more than 16 bits": (folder / "deep.tif", "8 or 16 bits"),
    }


@pytest.mark.parametrize(
    "fault",
    ["zero bytes", "no image", "truncated PNG", "truncated JPEG", "a folder", "missing", "smaller than the stride",
     "floating point", "more than 16 bits"],
)  # fmt: skip
def test_a_bad_file_is_one_line_that_names_it(fault: str, tmp_path: Path) -> None:
    path, message = bad_files(tmp_path)[fault]
    with pytest.raises(InputError, match=message) as caught:
        load_image(path, (32, 32))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch) -> None:
    path = saved(tmp_path, Image.fromarray(COLOUR))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match="too large"):
        read_image(path)


def test_every_16_bit_value_becomes_the_nearest_of_8_bits(tmp_path: Path) -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    read = np.asarray(read_image(saved(tmp_path, Image.fromarray(values))))[..., 0]
    assert np.array_equal(read, (values.astype(int) + 128) // 257)


def masked(folder: Path, mask: np.ndarray, above: int = 127) -> Sample:
    return Sample(
        saved(folder, Image.fromarray(COLOUR)), 1, saved(folder, Image.fromarray(mask), "mask.png"), "spot", above
    )


def test_a_mask_is_resized_by_nearest_neighbour_and_cut_at_one_half(tmp_path: Path) -> None:
    mask = np.zeros((48, 64), np.uint8)
    mask[:24, :32] = 255
    mask[24:, 32:] = 127
    expected = torch.zeros(24, 32, dtype=torch.bool)
    expected[:12, :16] = True
    assert torch.equal(load_mask(masked(tmp_path, mask), (24, 32)), expected)


def test_a_label_map_is_cut_above_zero(tmp_path: Path) -> None:
    mask = np.zeros((48, 64), np.uint8)
    mask[10:20, 10:20] = 3
    assert load_mask(masked(tmp_path, mask, above=0), (48, 64)).sum() == 100


def test_no_mask_means_nothing_is_marked(tmp_path: Path) -> None:
    assert not load_mask(Sample(tmp_path / "unread.png", 0), (8, 8)).any()


def test_a_mask_of_another_size_names_both_files(tmp_path: Path) -> None:
    sample = masked(tmp_path, np.zeros((10, 12), np.uint8))
    with pytest.raises(InputError, match=r"mask\.png: the mask is 12x10, its image image\.png 64x48"):
        load_mask(sample, (8, 8))


def test_a_mask_whose_image_is_gone_or_too_large_names_the_image(tmp_path: Path, monkeypatch) -> None:
    sample = masked(tmp_path, np.zeros((10, 12), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match=r"image\.png: too large"):
        load_mask(sample, (8, 8))
    sample.image.unlink()
    with pytest.raises(InputError, match=r"image\.png: no such file"):
        load_mask(sample, (8, 8))


def test_images_are_listed_sorted_below_a_folder_without_hidden_ones(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "deep/c.Tiff", ".hidden.png", ".cache/d.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [str(p.relative_to(tmp_path)) for p in list_images(tmp_path)] == ["a.jpg", "b.PNG", "deep/c.Tiff"]


def test_a_folder_without_images_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no images"):
        list_images(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        list_images(tmp_path / "none")
