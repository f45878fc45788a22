"""Shards: written whole or not at all, streamed by rank and worker, resumed."""

import json
import os
import subprocess
import tarfile
from itertools import chain, islice, pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from fastmsflow import InputError
from fastmsflow.data import ImageDataset, Sample, ShardedImages, write_shards
from tests.helpers.disks import small_disk
from tests.helpers.shards import IMAGES, ORDER, PER_SHARD, SHARDS, SIZE, numbers, refused_in_a_worker

# Writing


def test_a_shard_holds_the_files_bytes_and_their_names(jpeg_files: list[Path], jpeg_shards: Path) -> None:
    found = {}
    for path in sorted(jpeg_shards.glob("0*.tar")):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            for image, told in zip(members[::2], members[1::2], strict=True):
                assert Path(image.name).stem == Path(told.name).stem
                name = json.load(tar.extractfile(told))["name"]
                found[name] = tar.extractfile(image).read()
    assert found == {str(file.relative_to(file.parents[1])): file.read_bytes() for file in jpeg_files}


def test_webdataset_itself_reads_the_shards(jpeg_shards: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    urls = [str(path) for path in sorted(jpeg_shards.glob("0*.tar"))]
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert [sample["json"]["index"] for sample in read] == list(range(IMAGES))
    assert read[0]["jpg"].size == (36, 40)


def test_the_manifest_has_totals_and_checksums(jpeg_shards: Path) -> None:
    manifest = json.loads((jpeg_shards / "manifest.json").read_text())
    assert (manifest["images"], len(manifest["shards"])) == (IMAGES, SHARDS)
    assert manifest["bytes"] == sum(path.stat().st_size for path in jpeg_shards.glob("0*.tar"))
    for shard in manifest["shards"]:
        printed = subprocess.run(["sha256sum", jpeg_shards / shard["name"]], capture_output=True, text=True, check=True)
        assert printed.stdout.split()[0] == shard["sha256"]


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(
    jpeg_files: list[Path], jpeg_shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "set"
    child = os.fork()
    if not child:
        write_shards(jpeg_files, out, PER_SHARD, progress=lambda done: os._exit(9) if done == 15 else None)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert sorted(path.name for path in out.glob("0*.tar")) == ["000000.tar", "000001.tar", "000002.tar"]
    assert not (out / "manifest.json").exists()
    before = {path: path.stat().st_mtime_ns for path in out.glob("0*.tar")}

    seen: list[int] = []
    write_shards(jpeg_files, out, PER_SHARD, progress=seen.append)

    assert seen == [12, *range(13, IMAGES + 1)]
    assert before.items() <= {path: path.stat().st_mtime_ns for path in out.glob("0*.tar")}.items()
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in jpeg_shards.iterdir()}


@pytest.mark.parametrize("cut", ["journal", "shard"])
def test_what_a_power_cut_left_half_written_is_written_again(
    cut: str, jpeg_files: list[Path], jpeg_shards: Path, tmp_path: Path
) -> None:
    def stop(done: int) -> None:
        if done == 15:
            raise KeyboardInterrupt

    out = tmp_path / "set"
    with pytest.raises(KeyboardInterrupt):
        write_shards(jpeg_files, out, PER_SHARD, progress=stop)
    assert not list(out.glob(".*.tar")), "a half-written shard is left"
    half = out / ("unfinished.jsonl" if cut == "journal" else "000001.tar")
    half.write_bytes(half.read_bytes()[:-30])

    write_shards(jpeg_files, out, PER_SHARD)

    assert (out / "manifest.json").read_bytes() == (jpeg_shards / "manifest.json").read_bytes()


def test_a_full_disk_is_named_and_nothing_half_written_is_left(jpeg_files: list[Path], tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        with pytest.raises(InputError, match="disk is full"):
            write_shards(jpeg_files, disk / "set", PER_SHARD)
        assert not list((disk / "set").glob(".*aside*"))
        assert not (disk / "set/manifest.json").exists()


def test_a_set_is_not_written_over_nor_mixed_with_another(
    jpeg_files: list[Path], jpeg_shards_copy: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="holds shards already"):
        write_shards(jpeg_files, jpeg_shards_copy, PER_SHARD)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/unfinished.jsonl").write_text('{"fingerprint": "another", "images_per_shard": 7}\n')
    with pytest.raises(InputError, match="unfinished shards of other images, or of 7 a shard"):
        write_shards(jpeg_files, tmp_path / "begun", PER_SHARD)


def test_two_writers_do_not_share_a_folder(jpeg_files: list[Path], tmp_path: Path) -> None:
    def another(done: int) -> None:
        write_shards(jpeg_files, tmp_path / "set", PER_SHARD)

    with pytest.raises(InputError, match="another process is writing"):
        write_shards(jpeg_files, tmp_path / "set", PER_SHARD, progress=another)


def test_an_image_listed_twice_is_an_error(jpeg_files: list[Path], tmp_path: Path) -> None:
    again = Path(os.path.relpath(jpeg_files[3]))
    with pytest.raises(InputError, match=r"é\.03\.jpg: listed twice"):
        write_shards([*jpeg_files, again], tmp_path / "set")


def test_what_is_no_image_is_left_out_and_listed(jpeg_files: list[Path], tmp_path: Path) -> None:
    bad = {"empty.jpg": b"", "text.png": b"hello", "cut.jpg": jpeg_files[0].read_bytes()[:-400]}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    paths = [jpeg_files[0], *(tmp_path / name for name in bad), tmp_path / "none.jpg", jpeg_files[1]]

    by_header = write_shards(paths, tmp_path / "by header", 2)
    decoded = write_shards(paths, tmp_path / "decoded", 2, decode=True)

    # The third pair of files is whole but for the missing one, the second is not: its shard is not there.
    assert [len(by_header.skipped), by_header.images, len(by_header.shards)] == [3, 3, 3]
    assert [len(decoded.skipped), decoded.images] == [4, 2]
    assert [shard.name for shard in decoded.shards] == ["000000.tar", "000002.tar"]
    assert "empty.jpg: empty (0 bytes)" in by_header.skipped[0]
    assert "cut.jpg: damaged or truncated" in decoded.skipped[2]
    assert numbers(ShardedImages(tmp_path / "decoded", SIZE, shuffle=False)) == [0, 1]
    with pytest.raises(InputError, match="none of 1 files can be read"):
        write_shards([tmp_path / "text.png"], tmp_path / "nothing")


def test_names_of_every_kind_come_back_as_they_were(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    names = [
        "a b.jpg",
        "a.b.c.jpg",
        "no suffix",
        "x.json",
        "new\nline.jpg",
        os.fsdecode(b"\xff.jpg"),
        "l" * 200 + ".JPG",
    ]
    for name in names:
        Image.new("RGB", (32, 32)).save(folder / name, "JPEG")
    write_shards([folder / name for name in names], tmp_path / "out")
    assert [item["name"] for item in ShardedImages(tmp_path / "out", SIZE, shuffle=False)] == names


# Reading


def test_items_are_the_files_as_image_dataset_has_them(jpeg_files: list[Path], jpeg_shards: Path) -> None:
    plain = ImageDataset([Sample(file, 0) for file in jpeg_files], SIZE)
    streamed = list(ShardedImages(jpeg_shards, SIZE, shuffle=False))
    assert [item["index"] for item in streamed] == list(range(IMAGES))
    assert [item["name"] for item in streamed] == [str(file.relative_to(file.parents[1])) for file in jpeg_files]
    assert all(torch.equal(item["image"], plain[item["index"]]["image"]) for item in streamed)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 2), (3, 0), (3, 2), (12, 0)])
def test_ranks_and_workers_share_out_every_image_once(world_size: int, workers: int, jpeg_shards: Path) -> None:
    ranks = [
        ShardedImages(jpeg_shards, SIZE, rank=rank, world_size=world_size, workers=workers)
        for rank in range(world_size)
    ]
    read = [numbers(images, workers) for images in ranks]
    assert sorted(chain(*read)) == list(range(IMAGES))
    assert tuple(map(len, read)) == ranks[0].images_of_ranks
    assert max(map(len, read)) - min(map(len, read)) <= PER_SHARD


def test_an_epoch_has_its_own_order_and_always_the_same(jpeg_shards: Path) -> None:
    images = ShardedImages(jpeg_shards, SIZE, seed=3, buffer=7)
    first = numbers(images)
    images.set_epoch(1)
    assert numbers(images) != first
    assert numbers(ShardedImages(jpeg_shards, SIZE, seed=3, buffer=7)) == first
    assert numbers(ShardedImages(jpeg_shards, SIZE, seed=4, buffer=7)) != first


def test_the_order_is_the_one_that_earlier_versions_resume_into(jpeg_shards: Path) -> None:
    assert numbers(ShardedImages(jpeg_shards, SIZE, seed=3, buffer=7))[:8] == ORDER


def test_neighbours_are_torn_apart(jpeg_shards: Path) -> None:
    order = numbers(ShardedImages(jpeg_shards, SIZE, buffer=16))
    assert sum(b == a + 1 for a, b in pairwise(order)) < 10


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batches", [0, 1, 4, 7, 23])
def test_a_resumed_epoch_goes_on_as_if_never_interrupted(workers: int, batches: int, jpeg_shards: Path) -> None:
    def fresh() -> ShardedImages:
        return ShardedImages(jpeg_shards, SIZE, workers=workers, seed=1, epoch=2, buffer=6)

    whole = numbers(fresh(), workers)
    images, before = fresh(), []
    for batch in islice(DataLoader(images, 2, num_workers=workers), batches):
        images.seen(batch)
        before += batch["index"].tolist()
    resumed = fresh()
    resumed.resume(json.loads(json.dumps(images.state())))
    assert before + numbers(resumed, workers) == whole


def test_resuming_opens_no_shard_that_is_used_up(jpeg_shards_copy: Path) -> None:
    images = ShardedImages(jpeg_shards_copy, SIZE, shuffle=False)
    for item in islice(images, 3 * PER_SHARD + 1):
        images.seen(item)
    for used in ("000000.tar", "000001.tar", "000002.tar"):
        (jpeg_shards_copy / used).unlink()
    resumed = ShardedImages(jpeg_shards_copy, SIZE, shuffle=False)
    resumed.resume(images.state())
    assert numbers(resumed) == list(range(3 * PER_SHARD + 1, IMAGES))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"world_size": 3}, "world_size was 2, is 3"),
        ({"workers": 2}, "workers was 1, is 2"),
        ({"rank": 1}, "rank was 0, is 1"),
        ({"seed": 5}, "seed was 0, is 5"),
        ({"buffer": 5}, "buffer was 1000, is 5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_resume_that_would_lose_images_is_refused(other: dict, message: str, jpeg_shards: Path) -> None:
    state = ShardedImages(jpeg_shards, SIZE, world_size=2).state()
    with pytest.raises(InputError, match=f"{message}; set them back, or begin epoch 1"):
        ShardedImages(jpeg_shards, SIZE, **{"world_size": 2, **other}).resume(state)


def test_a_resume_on_other_shards_is_refused(jpeg_files: list[Path], jpeg_shards: Path, tmp_path: Path) -> None:
    write_shards(jpeg_files[1:], tmp_path / "other", PER_SHARD)
    with pytest.raises(InputError, match="shards was"):
        ShardedImages(tmp_path / "other", SIZE).resume(ShardedImages(jpeg_shards, SIZE).state())


def test_more_ranks_than_shards_is_an_error_that_says_what_to_write(jpeg_shards: Path) -> None:
    with pytest.raises(InputError, match=r"16 ranks, 12 shards.*--images-per-shard 2 or less"):
        ShardedImages(jpeg_shards, SIZE, world_size=16)


def test_a_loader_of_other_workers_is_refused(jpeg_shards: Path) -> None:
    with refused_in_a_worker(r"give ShardedImages\(workers=2\)"):
        numbers(ShardedImages(jpeg_shards, SIZE), workers=2)


def test_persistent_workers_are_refused(jpeg_shards: Path) -> None:
    loader = DataLoader(ShardedImages(jpeg_shards, SIZE, workers=1), num_workers=1, persistent_workers=True)
    list(loader)
    with refused_in_a_worker("leave out persistent_workers"):
        list(loader)


# The command


def test_shard_speaks_json_and_its_shards_are_read(jpeg_files: list[Path], tmp_path: Path, command) -> None:
    (tmp_path / "text.png").write_text("no image")
    args = (
        "shard",
        jpeg_files[0].parents[1],
        tmp_path / "text.png",
        "--images-per-shard",
        10,
        "--out",
        tmp_path / "set",
    )
    code, printed = command(*args, "--json")
    result = json.loads(printed[: printed.rindex("}") + 1])
    assert (code, result["images"], result["shards"]) == (1, IMAGES, 5)
    assert "text.png: not an image" in result["skipped"][0]
    assert f"skipped {result['skipped'][0]}" in printed
    assert len(numbers(ShardedImages(tmp_path / "set", SIZE))) == IMAGES
    code, printed = command(*args)
    assert (code, "holds shards already" in printed) == (1, True)


def test_shard_takes_a_configuration_and_is_quiet(jpeg_files: list[Path], tmp_path: Path, command) -> None:
    (tmp_path / "shard.yaml").write_text(f"out: {tmp_path}/set\nimages-per-shard: 20\n")
    assert command("shard", jpeg_files[0].parents[1], "--config", tmp_path / "shard.yaml", "--quiet") == (0, "")
    assert len(list((tmp_path / "set").glob("0*.tar"))) == 3
