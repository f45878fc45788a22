"""Image and mask files: every kind that is read, every fault that is named."""

import io
import os
import struct
import tempfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmsflow import InputError
from fastmsflow.data import Sample, list_images, load_image, load_mask, read_image
from fastmsflow.data.image_io import image_size_of

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


def test_cmyk_and_ycck_jpegs_have_their_colours(tmp_path: Path) -> None:
    """Adobe's JPEGs hold inverted inks; YCCK ones moreover as luminance and colour differences."""
    inks = np.zeros((48, 64, 4), np.uint8)
    inks[:, :32] = (200, 40, 90, 20)
    inks[:, 32:] = (0, 0, 0, 255)
    light = 255 - inks.astype(float)
    expected = (light[..., :3] * light[..., 3:] / 255).round().astype(int)
    options = {"quality": 100, "subsampling": 0}
    cmyk = saved(tmp_path, Image.fromarray(inks, "CMYK"), "cmyk.jpg", **options)

    # Pillow writes no YCCK: its channels as if they were inks, then Adobe's marker says what they are.
    ycc = np.asarray(Image.fromarray(inks[..., :3]).convert("YCbCr"))
    stored = np.dstack([ycc, 255 - inks[..., 3]])
    buffer = io.BytesIO()
    Image.fromarray(255 - stored, "CMYK").save(buffer, "JPEG", **options)
    content = bytearray(buffer.getvalue())
    content[content.index(b"Adobe") + 11] = 2
    (tmp_path / "ycck.jpg").write_bytes(content)
    for path in (cmyk, tmp_path / "ycck.jpg"):
        assert np.abs(np.asarray(read_image(path)).astype(int) - expected)[:, [4, 60]].max() <= 4


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright_as_viewers_show_them(orientation: int, suffix: str, tmp_path: Path) -> None:
    pixels = np.zeros((48, 64), np.uint8)
    pixels[:24, :32] = 200  # upper left; where it is when upright:
    right, low = ((False, False), (True, False), (True, True), (False, True),
                  (False, False), (True, False), (True, True), (False, True))[orientation - 1]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, Image.fromarray(pixels), f"image.{suffix}", exif=exif)
    read = np.asarray(read_image(path))[..., 0]
    assert read.shape == ((48, 64) if orientation < 5 else (64, 48))
    height, width = read.shape
    quarter = read[(height // 2 if low else 0) :, (width // 2 if right else 0) :][: height // 2, : width // 2]
    assert quarter.mean() > 180
    assert read.mean() < 60
    mask = saved(tmp_path, Image.new("L", (width, height), 255), "mask.png")
    assert load_mask(Sample(path, 1, mask), (32, 32)).all()


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_several_frames_are_refused_and_one_is_read(suffix: str, tmp_path: Path) -> None:
    first, second = Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)
    path = saved(tmp_path, first, f"image.{suffix}", save_all=True, append_images=[second])
    with pytest.raises(InputError, match="holds 2 frames or pages; save each as a file of its own"):
        read_image(path)
    assert read_image(saved(tmp_path, first, f"one.{suffix}")).size == (64, 48)


def test_a_phone_s_preview_behind_the_photograph_is_passed_over(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(COLOUR), "image.jpg", format="MPO", save_all=True,
                 append_images=[Image.fromarray(COLOUR[::4, ::4])])  # fmt: skip
    with Image.open(path) as image:
        assert (image.format, image.n_frames) == ("MPO", 2)
    assert read_image(path).size == (64, 48)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_that_are_no_numbers_are_named(value: float, tmp_path: Path) -> None:
    pixels = GREY.astype(np.float32)
    pixels[3, 5:8] = value
    path = saved(tmp_path, Image.fromarray(pixels), "nan.tif")
    with pytest.raises(InputError, match=r"nan\.tif: 3 pixels are NaN or infinite; .* 8 or 16 bits"):
        read_image(path)


def peak_kib() -> int:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def test_40000_by_40000_is_refused_by_its_header(tmp_path: Path) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 1, 0, 0, 0, 0)
    row = zlib.compressobj()
    rows = b"".join(row.compress(bytes(5001)) for _ in range(40_000)) + row.flush()
    path = tmp_path / "huge.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    # The peak from here on: earlier tests' would hide it.
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_kib()
    with pytest.raises(InputError, match=r"too large to decode \(more than 179 megapixels\); scale it down or cut"):
        read_image(path)
    assert peak_kib() - before < 50_000  # KiB; its rows alone are 200 MB


def test_pipes_devices_and_links_do_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "broken.png").symlink_to("nowhere.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    faults = {
        "pipe.png": "a pipe or a device, not a file",
        "broken.png": "a link to a file that is not there",
        "loop.png": "no such file",
    }
    for name, message in faults.items():
        with pytest.raises(InputError, match=rf"{name}: {message}"):
            read_image(tmp_path / name)
    with pytest.raises(InputError, match="/dev/zero: a pipe or a device"):
        read_image("/dev/zero")


def test_eps_is_not_handed_to_another_program(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not an image that can be read"):
        read_image(saved(tmp_path, Image.fromarray(COLOUR), "image.png", format="EPS"))


def test_damaged_bytes_are_named_whatever_the_decoder_makes_of_them(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for suffix in ("png", "jpg", "webp", "bmp", "gif", "ppm"):
        whole = np.fromfile(saved(tmp_path, Image.fromarray(COLOUR), f"image.{suffix}"), np.uint8)
        path = tmp_path / f"damaged.{suffix}"
        for _ in range(60):
            damaged = whole.copy()
            damaged[generator.integers(0, min(len(whole), 300), 4)] = generator.integers(0, 256, 4)
            path.write_bytes(damaged[: generator.integers(1, 2 * len(whole))].tobytes())
            try:
                read_image(path)
            except InputError as error:
                assert str(error).startswith(f"{path}: ")


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
        "zero bytes": (folder / "zero.png", r"empty \(0 bytes\), not an image"),
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


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(np.uint8, 1), (np.uint8, 38), (np.uint8, 255), (np.uint16, 1), (np.uint16, 65535), (np.float32, 1)],
)
def test_a_mask_of_two_values_marks_the_larger(dtype: type, value: int, tmp_path: Path) -> None:
    mask = np.zeros((48, 64), dtype)
    mask[10:20, 10:20] = value
    path = saved(tmp_path, Image.fromarray(mask), "mask.tif")
    assert load_mask(Sample(saved(tmp_path, Image.fromarray(COLOUR)), 1, path), (48, 64)).sum() == 100


def test_a_soft_edge_is_cut_at_one_half_in_8_and_16_bits(tmp_path: Path) -> None:
    mask = np.zeros((48, 64), np.uint16)
    mask[10:20, 10:20] = 65535
    mask[20, 10:20] = 33_000
    mask[21, 10:20] = 32_000
    for values in (mask, (mask // 257).astype(np.uint8)):
        assert load_mask(masked(tmp_path, values), (48, 64)).sum() == 110


def test_a_mask_that_would_mark_nothing_is_refused_with_the_remedy(tmp_path: Path) -> None:
    mask = np.zeros((48, 64), np.uint8)
    mask[10:20, 10:20], mask[30:40, 10:20] = 1, 2
    with pytest.raises(InputError, match=r"mask\.png: the mask's values go up to 2, .* above 127; save it with 255"):
        load_mask(masked(tmp_path, mask), (48, 64))
    assert load_mask(masked(tmp_path, mask, above=0), (48, 64)).sum() == 200


def test_a_mask_of_nan_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(np.full((48, 64), np.nan, np.float32)), "mask.tif")
    with pytest.raises(InputError, match=r"mask\.tif: 3072 pixels are NaN"):
        load_mask(Sample(saved(tmp_path, Image.fromarray(COLOUR)), 1, path), (48, 64))


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


def test_two_links_to_a_folder_give_its_images_once(tmp_path: Path) -> None:
    (tmp_path / "b/c").mkdir(parents=True)
    for i in range(5):
        (tmp_path / f"b/c/{i}.png").touch()
    (tmp_path / "z").symlink_to(tmp_path / "b/c")
    (tmp_path / "0").symlink_to(tmp_path / "b/c")
    assert list_images(tmp_path) == [tmp_path / f"0/{i}.png" for i in range(5)]


def test_names_of_every_kind_come_back_as_they_are(tmp_path: Path) -> None:
    names = ["new\nline.png", os.fsdecode(b"\xff.png"), "é.png", "a;'b.png"]
    for name in (*names, ".hidden.png"):
        (tmp_path / name).touch()
    assert list_images(tmp_path) == sorted(tmp_path / name for name in names)


def test_links_to_folders_are_followed_and_loops_end(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for path in (inside / "a/1.png", outside / "2.png"):
        path.parent.mkdir(parents=True)
        path.touch()
    (inside / "a/loop").symlink_to(inside)
    (inside / "linked").symlink_to(outside)
    assert list_images(inside) == [inside / "a/1.png", inside / "linked/2.png"]


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="no users here")
def test_a_folder_that_cannot_be_read_is_named_not_passed_over() -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "shut").mkdir()
        (root / "shut/1.png").touch()
        (root / "2.png").touch()
        root.chmod(0o755)
        (root / "shut").chmod(0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root reads everything
        try:
            with pytest.raises(InputError, match=r"shut: this folder cannot be read \(Permission denied\); change its"):
                list_images(root)
        finally:
            os.seteuid(user)
            (root / "shut").chmod(0o700)


@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
def test_the_size_of_a_turned_png_is_the_upright_one_wherever_its_orientation_stands(before, tmp_path: Path) -> None:
    content = b"eXIf" + b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    chunk = struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
    path = saved(tmp_path, Image.fromarray(GREY))
    start, end = path.read_bytes().split(before)
    path.write_bytes(start[:-4] + chunk + start[-4:] + before + end)
    assert image_size_of(path) == read_image(path).size == (48, 64)
