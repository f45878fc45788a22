"""Encoded JPEG files become, many at once, the pixels that Pillow makes of them; others go Pillow's way."""

import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchcodec.decoders
from PIL import Image
from skimage import data as photographs

from fastmsflow import InputError, UnavailableError
from fastmsflow.data import ImageFileDataset, ShardedImages, write_shards
from fastmsflow.data.image_io import as_tensor, decode_image
from fastmsflow.data.jpeg_decoder import check_decoder, decode_batch, encoded_or_pixels, is_plain_jpeg
from fastmsflow.data.reader_pool import ReaderPool
from fastmsflow.distributed.process_group import SINGLE_PROCESS
from fastmsflow.training import DataConfig
from fastmsflow.training.loaders import ImageLoader, ShardLoader
from fastmsflow.training.samplers import SequentialBatchSampler
from fastmsflow.training.training_plan import _make_decoder
from tests.helpers.tolerances import JPEG_DECODERS

CPU = torch.device("cpu")


def jpeg(pixels: np.ndarray, mode: str = "RGB", **options) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(content, "JPEG", quality=95, **options)
    return content.getvalue()


PHOTOGRAPH = photographs.astronaut()[:300, 100:420]
PLAIN = jpeg(PHOTOGRAPH)


@pytest.mark.filterwarnings("error::DeprecationWarning")
def test_jpeg_files_decode_as_by_pillow() -> None:
    """At their own size, where no filter differs; one of another size among them, and a grey one."""
    files = [PLAIN, jpeg(photographs.camera()[:300, :320], "L"), jpeg(photographs.astronaut()[:200, :200])]
    pixels, faults = decode_batch(
        [encoded_or_pixels(file, "a", (300, 320)) for file in files], ["a"] * 3, (300, 320), CPU
    )
    assert (pixels.shape, faults) == ((3, 3, 300, 320), {})
    for image, file in zip(pixels[:2], files[:2], strict=True):
        off = (image - as_tensor(decode_image(file, "a"), (300, 320))).abs()
        assert off.max() <= JPEG_DECODERS["decoded"]


def test_a_smaller_image_differs_from_lanczos_by_little() -> None:
    ((pixels,), _) = decode_batch([encoded_or_pixels(PLAIN, "a", (96, 96))], ["a"], (96, 96), CPU)
    off = (pixels - as_tensor(decode_image(PLAIN, "a"), (96, 96))).abs()
    assert off.mean() <= JPEG_DECODERS["mean of resized"]
    assert pixels.min() >= 0 and pixels.max() <= 1


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(PHOTOGRAPH, exif=exif)


def png() -> bytes:
    content = io.BytesIO()
    Image.fromarray(PHOTOGRAPH).save(content, "PNG")
    return content.getvalue()


@pytest.mark.parametrize(
    "content", [turned(), png(), jpeg(PHOTOGRAPH, "CMYK")], ids=["to be turned", "PNG", "four colours"]
)
def test_what_decoders_differ_in_is_left_to_pillow(content: bytes) -> None:
    assert not is_plain_jpeg(content)
    given = encoded_or_pixels(content, "a", (64, 64))
    assert torch.equal(given, as_tensor(decode_image(content, "a"), (64, 64)))
    assert torch.equal(decode_batch([given], ["a"], (64, 64), CPU)[0][0], given)


@pytest.mark.parametrize("content", [PLAIN[: len(PLAIN) // 2], b"", PLAIN[:10]], ids=["cut off", "empty", "a header"])
def test_a_damaged_file_is_named_before_it_reaches_the_decoder(content: bytes) -> None:
    with pytest.raises(InputError, match=r"^bad\.jpg: "):
        encoded_or_pixels(content, "bad.jpg", (64, 64))


def broken(content: bytes = PLAIN) -> bytes:
    """Breaks the tables of codes: a decoder refuses the file, and its header does not show why."""
    at = content.index(b"\xff\xc4")
    return content[: at + 4] + b"\xff" * 20 + content[at + 24 :]


def test_damage_that_only_the_decoder_sees_is_told_of_the_file_that_has_it() -> None:
    files = [encoded_or_pixels(file, "", (64, 64)) for file in (PLAIN, broken(), png(), PLAIN)]
    pixels, faults = decode_batch(files, ["a", "b.jpg", "c", "d"], (64, 64), CPU)
    assert list(faults) == [1] and str(faults[1]).startswith("b.jpg: damaged or truncated")
    alone, _ = decode_batch(files[:1], ["a"], (64, 64), CPU)
    assert torch.equal(pixels, torch.stack([alone[0], files[2], alone[0]]))
    none, faults = decode_batch(files[1:2], ["b"], (64, 64), CPU)
    assert (none.shape, list(faults)) == ((0, 3, 64, 64), [0])


def test_damage_that_decoders_only_warn_of_gives_the_pixels_that_pillow_gives() -> None:
    """Codes that are none, in the middle of the image."""
    middle = 2 * len(PLAIN) // 3
    content = PLAIN[:middle] + b"\x55" * 40 + PLAIN[middle + 40 :]
    expected = as_tensor(decode_image(content, "a"), (300, 320))
    assert not torch.equal(expected, as_tensor(decode_image(PLAIN, "a"), (300, 320)))
    pixels, faults = decode_batch([encoded_or_pixels(content, "a", (300, 320))], ["a"], (300, 320), CPU)
    assert not faults
    assert (pixels[0] - expected).abs().max() <= JPEG_DECODERS["decoded"]


def test_what_the_devices_decoder_refuses_and_pillow_takes_is_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's decoder may refuse what libjpeg reads."""
    refused, decode = jpeg(PHOTOGRAPH[::-1].copy()), torchcodec.decoders.decode_jpeg

    def some(files: list[torch.Tensor], *args: object, **options: object) -> object:
        if any(bytes(file.numpy()) == refused for file in files):
            raise RuntimeError("nvjpegDecodeBatched failed: 2")
        return decode(files, *args, **options)

    monkeypatch.setattr(torchcodec.decoders, "decode_jpeg", some)
    files = [encoded_or_pixels(file, "a", (64, 64)) for file in (PLAIN, refused)]
    pixels, faults = decode_batch(files, ["a", "b"], (64, 64), CPU)
    assert not faults
    assert torch.equal(pixels[1], as_tensor(decode_image(refused, "b"), (64, 64)))


def test_memory_that_runs_out_is_no_fault_of_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torchcodec.decoders, "decode_jpeg", full)
    with pytest.raises(torch.OutOfMemoryError):
        decode_batch([encoded_or_pixels(PLAIN, "a", (64, 64))], ["a"], (64, 64), CPU)


class OnAGpu:
    """A model as far as a decoder knows it."""

    image_size = (64, 64)

    def parameters(self) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(device=torch.device("cuda"))


def test_without_torchcodec_a_run_says_what_to_install_before_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(UnavailableError, match=r"need TorchCodec: pip install 'fastmsflow\[jpeg\]'$"):
        _make_decoder(OnAGpu(), DataConfig(stream=True, decode_on_gpu=True), False)


def test_a_torchcodec_without_nvjpeg_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyPI's wheels for Windows have no nvJPEG."""
    check_decoder(CPU)

    def refuse(*args: object, **options: object) -> object:
        raise RuntimeError("torchcodec was not compiled with nvJPEG support\nand more")

    monkeypatch.setattr(torchcodec.decoders, "decode_jpeg", refuse)
    with pytest.raises(UnavailableError, match=r"no JPEG files on cuda here \(.* nvJPEG support\); leave .* out$"):
        check_decoder(torch.device("cuda"))


def test_files_are_handed_on_encoded(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(PLAIN)
    item = ImageFileDataset([tmp_path / "a.jpg"], (64, 64), encoded=True)[0]
    assert item["image"].dtype == torch.uint8 and bytes(item["image"].numpy()) == PLAIN
    assert item["source"] == str(tmp_path / "a.jpg")


# In training, by the processor in a GPU's place


def decode(images: list[torch.Tensor], names: list[str]) -> tuple[torch.Tensor, dict[int, InputError]]:
    return decode_batch(images, names, (64, 64), CPU)


@pytest.fixture
def some_broken(tmp_path: Path) -> list[Path]:
    """Six images, the second and third of which the decoder refuses."""
    files = [tmp_path / f"images/{i}.jpg" for i in range(6)]
    files[0].parent.mkdir()
    for i, file in enumerate(files):
        file.write_bytes(broken() if i in (1, 2) else PLAIN)
    return files


def test_a_file_that_cannot_be_decoded_ends_a_run_of_files_by_its_name(some_broken: list[Path]) -> None:
    images = ImageFileDataset(some_broken, (64, 64), encoded=True)
    with pytest.raises(InputError, match=rf"^{some_broken[1]}: damaged"):
        list(ImageLoader(images, SequentialBatchSampler(6, 2, SINGLE_PROCESS, split="train"), ReaderPool(), decode))


def test_images_of_shards_that_cannot_be_decoded_are_named_or_left_out(some_broken: list[Path], tmp_path: Path) -> None:
    write_shards(some_broken, tmp_path / "set", images_per_shard=3)

    def loader(batch_size: int, **options: object) -> ShardLoader:
        def opened(epoch: int) -> ShardedImages:
            return ShardedImages(tmp_path / "set", (64, 64), shuffle=False, encoded=True, **options)

        return ShardLoader(opened, batch_size, None, decode=decode)

    with pytest.raises(InputError, match=r"000000\.tar: 1\.jpg: damaged"):
        list(loader(2))
    log = tmp_path / "faults.jsonl"
    # Alone in their batches, there is nothing to be given away.
    for batch_size, expected in ((2, [[0], [3], [4, 5]]), (1, [[0], [3], [4], [5]])):
        log.unlink(missing_ok=True)
        batches = list(loader(batch_size, skip_faults=log))
        assert [batch.numbers for batch in batches] == expected
        assert [len(batch.inputs) for batch in batches] == list(map(len, expected))
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert [(re.search(r"000000\.tar: (\d)", line["fault"])[1], line["lost"]) for line in lines] == [
            ("1", 1),
            ("2", 1),
        ]
