"""`train` and `demo`: how long the warm-up is, by the command line, by a file and by the configuration of a run."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console

from fastmsflow import InputError
from fastmsflow.files import write_yaml
from fastmsflow.training import Recipe
from fastmsflow.training.lightning_module import MSFlowLightningModule
from fastmsflow.training.train import say_if_short
from tests.helpers.noise_images import noise_set

SHORT = (
    "--extractor", "test_resnet.r160_in1k", "--image-size", 32, "--meta-epochs", 2, "--sub-epochs", 2, "--hold-out", 0,
)  # fmt: skip
SHARE = ("--warmup-share", 0.5)
NOTHING_TO_DO = SimpleNamespace(run=lambda on_failure: None)
LINE = (
    "the run ends inside the warm-up, after 4 of its 12 passes; the learning rate reaches 0.33 of --lr; give a shorter"
    " --warmup, or --warmup-share 0.12"
)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("warm_up")
    noise_set(root, train=6)
    return root / "train"


@pytest.fixture
def recipe_of(command, monkeypatch, tmp_path):
    """Runs a verb as far as its job -> the recipe, having left the configuration in ``config.yaml``."""
    jobs = []
    for verb in ("train", "demo"):
        monkeypatch.setattr(f"fastmsflow.cli.{verb}.train_one", lambda job, group: jobs.append(job))

    def run(*args: object) -> Recipe:
        code, text = command(*args)
        assert (code, text) == (0, "")
        write_yaml(tmp_path / "config.yaml", jobs[-1].options)
        return jobs[-1].recipe

    return run


def length(recipe: Recipe) -> tuple[int, float | None]:
    return recipe.warm_up, recipe.warm_up_share


def test_the_published_warm_up_is_the_default_of_train_and_its_share_that_of_demo(recipe_of) -> None:
    assert length(recipe_of("train", "data", "--out", "run")) == (12, None)
    assert length(recipe_of("train", "data", "--out", "run", "--warmup", 5)) == (5, None)
    assert length(recipe_of("train", "data", "--out", "run", "--warmup-share", 0.2)) == (12, 0.2)
    assert length(recipe_of("demo", "--out", "run")) == (12, 0.12)


@pytest.mark.parametrize(
    ("first", "then", "expected"),
    [
        ((), (), (12, None)),
        (("--warmup", 5), (), (5, None)),
        (("--warmup-share", 0.2), (), (12, 0.2)),
        ((), ("--warmup-share", 0.2), (12, 0.2)),
        (("--warmup", 5), ("--warmup-share", 0.2), (12, 0.2)),
        (("--warmup-share", 0.2), ("--warmup", 12), (12, None)),
        (("--warmup-share", 0.2), ("--warmup", 5), (5, None)),
    ],
    ids=str,
)
def test_the_command_lines_warm_up_takes_the_place_of_a_files(
    first: tuple, then: tuple, expected: tuple, recipe_of, tmp_path: Path
) -> None:
    recipe_of("train", "data", "--out", "run", *first)
    again = ("train", "--config", tmp_path / "config.yaml")
    assert length(recipe_of(*again, *then)) == expected
    assert length(recipe_of(*again)) == expected


def test_an_older_configuration_is_taken_with_a_share_on_the_command_line(recipe_of, tmp_path: Path) -> None:
    (tmp_path / "older.yaml").write_text("warm-up: 0.12\n")
    args = ("train", "data", "--out", "run", "--config", tmp_path / "older.yaml", "--warmup-share", 0.12)
    assert length(recipe_of(*args)) == (12, 0.12)


@pytest.mark.slow
def test_a_short_run_says_that_it_ends_in_its_warm_up(images: Path, weights: Path, command, tmp_path: Path) -> None:
    run = ("train", images, *SHORT, "--extractor-weights", weights)
    code, text = command(*run, "--out", tmp_path / "short")
    assert (code, text.count(LINE)) == (0, 1)
    code, text = command(*run, *SHARE, "--out", tmp_path / "shared")
    assert (code, text.count("warm-up")) == (0, 0)
    assert command(*run, "--out", tmp_path / "quiet", "--quiet") == (0, "")


def test_the_line_counts_the_warm_up_that_was_given() -> None:
    def said(**options) -> str:
        where = Console(file=io.StringIO(), width=40)
        say_if_short(Recipe(sub_epochs=1, **options), where)
        return where.file.getvalue()

    assert "after 8 of its 12 passes; the learning rate reaches 0.62 of --lr" in said(meta_epochs=8)
    assert "after 1 of its 12 passes; the learning rate reaches 0.10 of --lr" in said(meta_epochs=1)
    assert "after 12 of its 12 passes; the learning rate reaches 0.93 of --lr" in said(meta_epochs=12)
    assert "after 10 of its 10 passes; the learning rate reaches 0.91" in said(meta_epochs=10, warm_up_share=1.0)
    # A milestone may cut the warm-up short.
    early = "the first milestone comes before the warm-up's end; the learning rate reaches 0.93 of --lr"
    assert early in said(meta_epochs=13) and early in said(meta_epochs=17)
    assert said(meta_epochs=19) == said(meta_epochs=8, warm_up_share=0.12) == ""


@pytest.mark.slow
@pytest.mark.usefixtures("no_downloads")
@pytest.mark.parametrize("warm_up", [(), ("--warmup", 2), SHARE], ids=str)
def test_a_run_goes_on_by_the_configuration_that_it_left(
    warm_up: tuple, images: Path, weights: Path, command, monkeypatch, tmp_path: Path
) -> None:
    run = ("train", images, *SHORT, "--extractor-weights", weights, "--quiet", *warm_up)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert command(*run, "--out", whole) == (0, "")
    step = MSFlowLightningModule.training_step

    def until_the_third_pass(self, batch, batch_index):
        if self.current_epoch == 2:
            raise InputError("pulled the plug")
        return step(self, batch, batch_index)

    with monkeypatch.context() as patch:
        patch.setattr(MSFlowLightningModule, "training_step", until_the_third_pass)
        code, text = command(*run, "--out", broken)
    assert (code, "pulled the plug" in text) == (1, True)
    resume = ("train", "--config", broken / "config.yaml", "--resume", "--quiet")
    code, text = command(*resume, "--warmup", 3)
    assert code == 1
    assert "to be resumed, a run needs the settings that it began with: recipe.warm_up was" in text
    assert command(*resume) == (0, "")
    first, again = (json.loads((out / "results.json").read_text()) for out in (whole, broken))
    assert again["recipe"] == first["recipe"]
    assert again["nll"] == first["nll"]
    config, recipe = yaml.safe_load((broken / "config.yaml").read_text()), first["recipe"]
    assert (config["warm-up"], config.get("warm-up-share")) == (recipe["warm_up"], recipe["warm_up_share"])


@pytest.mark.parametrize(("rank", "count"), [(0, 1), (1, 0)])
def test_processes_that_share_out_classes_say_it_once(
    rank: int, count: int, command, monkeypatch, tmp_path: Path
) -> None:
    """Their runs print nothing."""
    world = SimpleNamespace(size=2, rank=rank, first=rank == 0, join_apart=lambda: None)
    monkeypatch.setattr("fastmsflow.cli.train.launch", lambda devices, nodes, notify: world)
    monkeypatch.setattr("fastmsflow.training.every_class._ClassRuns", lambda *args, **named: NOTHING_TO_DO)
    code, text = command("train", "textures", "--class", "all", "--out", tmp_path, *SHORT)
    assert (code, text.count(LINE)) == (0, count)
