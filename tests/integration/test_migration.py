"""docs/migration.md to the letter: its commands in their order, on a small set in the MVTec AD layout, and the figures
that they print beside those of the script."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from timm import create_model
from torch import Tensor

from fastmsflow import MSFlow, UnavailableError
from fastmsflow.compat import build_msflow_model, numerical_check
from fastmsflow.nn.feature_extractor import FeatureExtractor
from fastmsflow.training import Recipe, checkpointing, train
from tests.helpers.few_tiles import few_tiles
from tests.helpers.noise_images import noise_set
from tests.helpers.pages import COMMANDS
from tests.helpers.paths import ROOT
from tests.helpers.published_script import Record, Script, Settings
from tests.helpers.tolerances import SCRIPT_METRICS

pytestmark = pytest.mark.slow

SIDE = 64
CONDITIONS, BLOCKS = (64, 64, 64), (2, 5, 8)
# These make a command of the page cheap, and spare it downloads: another backbone, smaller images, fewer passes.
SMALLER = {"wide_resnet50_2": "resnet18", "512": str(SIDE)}
FOR_TRAINING = ("--extractor", "resnet18", "--image-size", SIDE, "--meta-epochs", 1, "--sub-epochs", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the page names."""
    folder = tmp_path_factory.mktemp("migration")
    tiles = few_tiles(folder / "data/mvtec") / "brick"
    tiles = tiles.rename(tiles.with_name("bottle"))
    for name, kind in (("good_images", "train/good"), ("new_images", "test/hole")):
        shutil.copytree(tiles / kind, folder / name)
    torch.manual_seed(0)
    torch.save(create_model("resnet18", pretrained=False).state_dict(), folder / "weights.pth")
    return folder


@pytest.fixture(scope="module")
def script(folder: Path) -> Record:
    """Runs a script of the published kind, whose checkpoint is official.pt."""
    backbone = FeatureExtractor("resnet18", weights=folder / "weights.pth", image_size=(SIDE, SIDE)).eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def extractor(normalised: Tensor) -> list[Tensor]:
        return backbone(normalised * std[:, None, None] + mean[:, None, None])

    config = SimpleNamespace(c_conds=CONDITIONS, parallel_blocks=BLOCKS, clamp_alpha=1.9)
    settings = Settings((SIDE, SIDE), CONDITIONS, meta_epochs=1, sub_epochs=4)
    torch.manual_seed(0)
    flows = build_msflow_model(config, backbone.channels)
    run = Script(flows, extractor, folder / "data/mvtec/bottle", settings)
    run.run()
    run.save(folder / "official.pt")
    return run.record


@pytest.fixture(scope="module")
def interrupted(folder: Path) -> None:
    """A run's folder before it has finished."""
    out, unfinished = folder / "runs/whole", folder / "runs/interrupted"
    model = MSFlow("test_resnet.r160_in1k", pretrained=False, image_size=(32, 32), blocks=(1, 1, 1))
    recipe = Recipe(batch_size=4, meta_epochs=2, sub_epochs=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpointing, "SAVE_SECONDS", 0.0)
        images = noise_set(folder / "noise", train=8)
        train(model, images, recipe, out, report=lambda result: shutil.copytree(out, unfinished) and None)


PAGE = [p.values[0] for p in COMMANDS if str(p.id).startswith("migration.md:")]


def without_triton(backend: str, x: Tensor) -> bool:
    if backend == "triton":
        raise UnavailableError("no GPU is here")
    return False


def smaller(args: list[str]) -> list[object]:
    words: list[object] = [SMALLER.get(word, word) for word in args]
    if args[0] == "train":
        words += FOR_TRAINING
    if args[0] in ("train", "verify") or args[:2] == ["convert", "official.pt"]:
        words += ["--extractor-weights", "weights.pth"]
    return words


def test_every_command_of_the_page_runs_and_its_figures_are_the_scripts(
    folder: Path, script: Record, interrupted: None, command: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(PAGE) >= 9, "the page's commands were not found"
    monkeypatch.chdir(folder)
    # In Triton's interpreter, which the tests run on, `verify` would take hours for a model of this size.
    monkeypatch.setattr(numerical_check, "uses_triton", without_triton)
    printed = {}
    for args in PAGE:
        code, printed[" ".join(args)] = command(*smaller(args))
        assert code == 0, (args, printed[" ".join(args)])
    converted = next(text for line, text in printed.items() if line.startswith("evaluate own.safetensors"))
    (row,) = json.loads((folder / "evaluation/metrics.json").read_text())
    found = (row["image_auroc"], row["pixel_auroc"], row["aupro_published"])
    assert found == pytest.approx(script.metrics[-1], abs=SCRIPT_METRICS)
    for name, value in zip(("image AUROC", "pixel AUROC", "AUPRO (published)"), found, strict=True):
        line = next(line for line in converted.splitlines() if f"│ {name} " in line)
        assert f"{value:.4f}" in line if value is not None else "-" in line
    assert "without an optimizer's state" in printed["convert own.safetensors official_again.pt"]
    assert "with the optimizer's state" in printed["convert runs/interrupted/state.ckpt resumable.pt"]
    assert "optimizer" in torch.load(folder / "resumable.pt", weights_only=True)
    assert len(list((folder / "heat_maps").glob("*_heatmap.png"))) == 3
    recipe = json.loads((folder / "runs/bottle/results.json").read_text())
    assert recipe["images"]["train"] == 24, "--hold-out 0 trains on all the good images"


def test_the_page_names_the_script_that_it_stands_for() -> None:
    page = (ROOT / "docs/migration.md").read_text()
    assert (
        "tests/integration/test_published_script.py" in page
        and (ROOT / "tests/integration/test_published_script.py").is_file()
    )
