"""Layers and rectangles on the command line, from training to reports, and what is none of them."""

import json
from pathlib import Path

import pytest
import timm
import torch
import yaml
from typer.main import get_command

from fastmsflow import MSFlow
from fastmsflow.cli import app
from fastmsflow.number_range import image_size_option, parse_image_size

DESCRIPTION = "test_vit, layers 1, 3, 5 (strides 16, 32, 32)"
QUICK = ("--meta-epochs", 1, "--sub-epochs", 1, "--workers", 0, "--quiet")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a small transformer in timm's format."""
    path = tmp_path_factory.mktemp("weights") / "vit.pth"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        torch.save(timm.create_model("test_vit").state_dict(), path)
    return path


@pytest.mark.slow
def test_layers_of_a_transformer_and_a_rectangle_go_from_training_to_reports(
    vit: Path, mvtec: Path, command, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(
        f"extractor: test_vit\nextractor-weights: {vit}\nlayers: [1, -3, 5]\nlevel-strides: 1,2,2\nimage-size: [64, 96]"
        "\npool: none\n"
    )
    run, out = tmp_path / "run", tmp_path / "predictions"
    code, printed = command(
        "train", mvtec, "--class", "tile", "--config", tmp_path / "config.yaml", "--out", run, *QUICK
    )
    assert code == 0, printed
    model = MSFlow.load(run / "last.safetensors")
    assert (model.image_size, model.config["layers"]) == ((64, 96), [1, 3, 5])
    assert [level.shape[2:] for level in model.features(torch.rand(1, 3, 64, 96))] == [(4, 6), (2, 3), (2, 3)]
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert (written["layers"], written["level-strides"], written["image-size"]) == ("1,-3,5", "1,2,2", "64x96")
    assert DESCRIPTION in (run / "report.html").read_text()

    images = mvtec / "tile/test"
    code, printed = command("predict", run / "last.safetensors", images, "--out", out, "--workers", 0, "--json")
    assert json.loads(printed)["extractor"] == DESCRIPTION
    code, printed = command("evaluate", run, mvtec, "--class", "tile", "--out", tmp_path / "evaluation")
    assert code == 0 and f"extractor: {DESCRIPTION}" in printed
    assert DESCRIPTION in (tmp_path / "evaluation/report.html").read_text()
    code, printed = command("verify", run / "last.safetensors", images, "--image-size", "96x64")
    assert code == 1 and "is a model of 64x96; --image-size is for official checkpoints" in printed
    code, printed = command("predict", run / "last.safetensors", images, "--out", out, "--tile", 100)
    assert code == 1 and "test_vit has patches of 16; 100 is no multiple: give 96 or 112" in printed


def test_checkpoints_of_other_layers_are_not_evaluated_as_of_one_run(mvtec: Path, command, tmp_path: Path) -> None:
    for name, layers in (("last", (0, 1, 2)), ("best", (0, 1, 3))):
        MSFlow("test_vit", False, (32, 32), blocks=(1, 1, 1), layers=layers).save(tmp_path / f"{name}.safetensors")
    code, printed = command("evaluate", tmp_path, mvtec, "--class", "tile", "--out", tmp_path / "evaluation")
    assert code == 1 and "its checkpoints are not of one run; evaluate each by its file" in printed


@pytest.mark.parametrize("verb", ["train", "convert", "verify"])
def test_the_help_says_that_the_height_comes_first(verb: str) -> None:
    (size,) = [p for p in get_command(app).commands[verb].params if p.name == "image_size"]
    assert "HxW" in size.help and "height" in size.help and size.metavar == "N|HxW"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--image-size", "512x"), "--image-size 512x: give N or HxW"),
        (("--image-size", "x512"), "--image-size x512: give N or HxW"),
        (("--image-size", "1x2x3"), "--image-size 1x2x3: give N or HxW"),
        (("--image-size", "64.5"), "--image-size 64.5: give N or HxW"),
        (("--image-size", "big\n"), r"--image-size big\n: give N or HxW"),
        (("--image-size", "64x31"), "--image-size is 31; it must be a whole number, 32 to 65536"),
        (("--image-size=-64"), "--image-size is -64; it must be"),
        (("--layers", "2,5"), "--layers 2,5: give three whole numbers with commas, e.g. 2,5,8"),
        (("--layers", "a,b,c"), "--layers a,b,c: give three whole numbers"),
        (("--level-strides", "1,2,4.5"), "--level-strides 1,2,4.5: give three whole numbers"),
        (("--layers", "5,2,3"), "layers are 5, 2, 3; give three different ones in ascending order"),
        (("--layers", "1,2,6"), "layers are 1, 2, 6; test_vit has 0 to 5"),
        (("--level-strides", "4,2,1"), "level_strides are 4, 2, 1; give them in ascending order"),
        (("--image-size", "100x96"), "test_vit has patches of 16; 100 is no multiple: give 96 or 112"),
        (("--tile", 100), "test_vit has patches of 16; 100 is no multiple: give 96 or 112"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_size_or_choice_of_layers_is_one_line_and_writes_nothing(
    options: tuple | str, says: str, vit: Path, mvtec: Path, command, tmp_path: Path
) -> None:
    options = (options,) if isinstance(options, str) else options
    size = () if {"--image-size", "--tile"} & set(options) or "=" in options[0] else ("--image-size", 64)
    extractor = ("--extractor", "test_vit", "--extractor-weights", vit)
    code, printed = command("train", mvtec / "tile", "--out", tmp_path / "run", *extractor, *size, *options, "--quiet")
    assert code == 1 and len(printed.splitlines()) == 1 and says in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "size", "written"), [("64", (64, 64), 64), ("64x96", (64, 96), "64x96"), ("96X96", (96, 96), 96)]
)
def test_a_size_is_read_with_its_height_first_and_written_as_short_as_it_can_be(text, size, written) -> None:
    assert parse_image_size(text) == size
    assert image_size_option(size) == written
