"""fastmsflow train: trains a model on good images, or one model for each class of a set."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ..calibration import pixel_threshold
from ..distributed.launcher import launch
from ..distributed.process_group import ProcessGroup
from ..errors import InputError
from ..files import shown
from ..number_range import (
    OVERLAP,
    PROCESSES,
    SCALE,
    SIDE,
    TOP_SHARES,
    parse_image_size,
    parse_whole_numbers,
)
from ..recipe import ADVANCED, DataConfig, Recipe
from .config_file import chosen_options, resolved_options, source_of
from .imports import import_packages
from .options import (
    DISTRIBUTED,
    MODEL,
    OUTPUT,
    Category,
    Extractor,
    ExtractorWeights,
    Layers,
    LevelStrides,
    Out,
    Resume,
    Source,
    option,
)
from .options import image_size as image_size_of
from .output import (
    add_metrics,
    add_pixel_error,
    console,
    errors,
    format_metric,
    print_error,
    print_json,
    print_line,
)
from .recipe_options import settings_from, with_options_of

if TYPE_CHECKING:
    from ..data import ImageSet, ShardSet
    from ..models.msflow import MSFlow
    from ..training import TrainingResult
    from ..training.every_class import EveryClassResult
    from ..training.training_job import TrainingJob


@with_options_of(DataConfig, Recipe, defaults={"hold_out": 0.1})
def train(
    ctx: typer.Context,
    *,
    source: Source,
    category: Category = None,
    extractor: Extractor = "wide_resnet50_2.tv_in1k",
    extractor_weights: ExtractorWeights = None,
    layers: Layers = None,
    level_strides: LevelStrides = None,
    image_size: Annotated[
        str | None,
        image_size_of(
            "Images are resized to N x N, or to HxW, height times width, e.g. 512x768. Default: the set's size (512;"
            " sample sets 256)."
        ),
    ] = None,
    tile: Annotated[
        int | None,
        option(
            MODEL,
            "Cut images, at their own size, into overlapping tiles of N x N, in place of resizing them: for small"
            " defects in large images. Default: whole images.",
            metavar="N",
            range=SIDE,
        ),
    ] = None,
    overlap: Annotated[
        float | None,
        option(MODEL, "Share of a tile's side that neighbors have in common. Default: 0.25.", range=OVERLAP),
    ] = None,
    scale: Annotated[
        float | None,
        option(MODEL, "Factor of an image's sides before it is cut into tiles. Default: 1.", range=SCALE),
    ] = None,
    position: Annotated[
        str | None,
        option(
            MODEL,
            "Place that the model is told of a pixel: in its tile, for textures; or image: in the whole image, for"
            " parts that lie in the same place in all images. Default: tile.",
            metavar="tile|image",
        ),
    ] = None,
    top_share: Annotated[
        float | None,
        option(
            MODEL,
            "Share of an image's pixels, the least likely ones, that its score averages; for small defects in large"
            " tiled images e.g. 0.001. Default: 0.03, as published.",
            range=TOP_SHARES,
        ),
    ] = None,
    pool: Annotated[str, option(MODEL, "Pool on the extractor's features: avg, max or none.")] = "avg",
    standardise: Annotated[
        bool, option(MODEL, "Standardize each feature channel: fewer epochs needed, but not the published recipe.")
    ] = False,
    start_from: Annotated[
        Path | None,
        option(
            MODEL,
            "Start from the weights of this checkpoint. One of ours (.safetensors) brings its extractor, layers, image"
            " size or tiles, pool and standardization; --extractor, --image-size or --tile, and --pool describe an"
            " official one (.pt).",
            metavar="CHECKPOINT",
        ),
    ] = None,
    out: Out,
    logger: Annotated[list[str], option(OUTPUT, "csv, tensorboard or wandb, into --out/logs; repeatable.")] = [],  # noqa: B006 - typer copies it
    resume: Resume = False,
    profile: Annotated[
        bool, option(ADVANCED, "Trace a few steps into --out/profile.json, for Perfetto.", "--profile")
    ] = False,
    devices: Annotated[
        int,
        option(DISTRIBUTED, "Processes on this machine, each on its own GPU where there are GPUs.", range=PROCESSES),
    ] = 1,
    nodes: Annotated[
        int,
        option(
            DISTRIBUTED,
            "Machines. Start the same command on each, with the address of the first one in MASTER_ADDR, and its port"
            " in MASTER_PORT if 29400 is taken.",
            range=PROCESSES,
        ),
    ] = 1,
    **settings: Any,
) -> None:
    """Trains on the good images of SOURCE; evaluates on its test images, where there are any.

    The defaults are the published recipe (arXiv 2308.15300), except for --hold-out. With --class all, each class is a
    run of its own, in OUT/CLASS; the same command again continues where it stopped.
    """
    refuse_unused_options(ctx)
    settings |= _warm_up(ctx, settings["warmup"], settings["warmup_share"])
    group = launch(devices, nodes, lambda line: print_line(line, "dim"))
    from ..data.class_selection import is_every_class

    every_class = is_every_class(source, category)
    if every_class:
        group.join_apart()
    # After the processes have joined: Lightning asks for this one's rank when it is imported.
    import_packages("torch", "timm", "lightning.pytorch")
    from ..training.training_job import TrainingJob

    tiles = {"tile": tile, "overlap": overlap, "scale": scale, "position": position, "top_share": top_share}
    job = TrainingJob(
        source=source,
        category=category,
        out=out,
        recipe=settings_from(Recipe, settings),
        data=settings_from(DataConfig, settings),
        model={
            "extractor": extractor,
            "extractor_weights": extractor_weights,
            "standardise": standardise,
            "pool": pool,
            **_levels(layers=layers, level_strides=level_strides),
        },
        image_size=None if image_size is None else parse_image_size(str(image_size)),
        tiles=_tiles(ctx, tiles),
        options=resolved_options(ctx),
        resume=resume,
        loggers=logger,
        start_from=start_from,
        chosen=frozenset(name for name in ctx.params if source_of(ctx, name) != "DEFAULT"),
        changed=frozenset(chosen_options(ctx)),
        profile=profile,
    )
    if every_class:
        _train_all(job, group)
    else:
        train_one(job, group)


def _levels(**texts: str | None) -> dict[str, Any]:
    """Returns the options of the levels that were given, as a model takes them."""
    return {name: parse_whole_numbers(text, name) for name, text in texts.items() if text is not None}


def _warm_up(ctx: typer.Context, passes: float, share: float | None) -> dict[str, Any]:
    """Returns ``--warmup`` and ``--warmup-share`` as a Recipe takes them, and puts them into the run's configuration.

    The command line overrides also the other one of the two in a file.

    Raises: InputError if the command line has both, or a share is given as passes, as older files do.
    """
    typed = [name for name in ("warmup", "warmup_share") if source_of(ctx, name) == "COMMANDLINE"]
    if len(typed) == 2:
        raise InputError(f"--warmup {passes:g} and --warmup-share {share} are lengths of one warm-up; give one")
    if typed == ["warmup"]:
        share = None
    elif typed == ["warmup_share"]:
        passes = Recipe.warm_up
    if not float(passes).is_integer():
        raise InputError(
            f"--warmup {passes:g}: it counts passes; give a whole number, or --warmup-share {passes:g}"
            f" (in a file: 'warmup-share: {passes:g}') for a share of them"
        )
    lengths = {"warmup": int(passes), "warmup_share": share}
    ctx.params |= lengths
    return lengths


def refuse_unused_options(ctx: typer.Context) -> None:
    """Raises InputError if an option was chosen that would have no effect."""
    chosen = chosen_options(ctx)
    if "cache_dtype" in chosen and ctx.params["feature_cache"] is None:
        raise InputError("--cache-dtype is of the features in --feature-cache; give that too, or leave it out")
    if chosen >= {"tile", "image_size"}:
        raise InputError("--tile is the size of what the model is shown; leave --image-size out")
    if "tile" not in chosen and ctx.params.get("start_from") is None:
        for name in ("overlap", "scale", "position", "top_share", "tile_jitter"):
            if name in chosen:
                raise InputError(f"--{name.replace('_', '-')} is of tiles; give --tile too, or leave it out")


def _tiles(ctx: typer.Context, options: dict[str, Any]) -> dict[str, Any]:
    """Returns the options of tiles that were given, and puts the others' defaults into the run's configuration.

    Raises: InputError if a value is not one of its option.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if "tile" in given:
        from ..tiling import Tiling  # imports torch

        ctx.params |= Tiling(**given).config
    return given


def train_one(job: "TrainingJob", group: ProcessGroup) -> None:
    """Trains one model, by all processes of ``group`` together, and prints the results."""
    group.join()
    console.quiet |= not group.first
    console.print("loading torch, timm and lightning ...", style="dim")
    import torch

    from ..data import ImageSet
    from ..training.run_directory import STATE_FILE

    images = group.broadcast_from_rank0(job.open_images)
    print_line(f"{images.name}: {_counts(images)}")
    if isinstance(images, ImageSet) and images.licence:
        console.print(images.licence, style="dim")
    torch.manual_seed(job.recipe.seed)
    with group.raise_on_any_rank():
        model = job.build_model(job.image_size_for(images))
    if job.resume and not (job.out / STATE_FILE).exists():
        print_line(f"{job.out}: no state to go on from; the run begins anew")
    with _interruptible(group):
        result = job.run(model, images, console=console, group=group)
    _print_metrics(result)
    _print_threshold(model)
    if group.first:
        _print_end(job, result, model)
    group.leave()


def _counts(images: "ImageSet | ShardSet") -> str:
    """Returns the numbers of images of each part of a set, in words."""
    from ..data import ImageSet

    if not isinstance(images, ImageSet):
        return f"{images.manifest.images} training images"
    own = f", {len(images.validation)} validation images" if images.validation else ""
    return f"{len(images.train)} training images{own}, {len(images.test)} test images"


def _train_all(job: "TrainingJob", group: ProcessGroup) -> None:
    """Trains a model for each class, each by one of the processes, which have joined apart, and prints the results."""
    if group.first:
        console.print("loading torch, timm and lightning ...", style="dim")
    from ..training.every_class import train_every_class

    with _interruptible(group):
        result = train_every_class(job, group, console, _print_failure)
    if result is not None:
        _print_every_class(result, job.out)


@contextmanager
def _interruptible(group: ProcessGroup) -> Iterator[None]:
    """Ends the command with one line after Ctrl-C."""
    from ..training.callbacks.preemption import RESUME_FROM_LAST

    try:
        yield
    except KeyboardInterrupt as interrupt:
        if group.first:
            print_line(f"interrupted; {RESUME_FROM_LAST}", where=errors)
        raise typer.Exit(130) from interrupt


def _print_end(job: "TrainingJob", result: "TrainingResult", model: "MSFlow") -> None:
    speed, unit = result.speed, "images" if model.tiling is None else "tiles"
    print_line(
        f"features {result.seconds['features']:.0f} s, training {result.seconds['training']:.0f} s"
        f" ({speed.get('images_per_second', 0):.3g} {unit}/s, {speed.get('data_wait', 0):.0%} of it waiting for them);"
        f" in {job.out}: {', '.join(sorted(path.name for path in job.out.iterdir() if path.name[0] != '.'))}"
    )
    left_out = result.left_out
    if left_out is not None and left_out.faults:
        line = f"{left_out.images} images left out by faults in {left_out.faults} images or shards: see "
        print_line(f"{line}{job.data.skip_faults}", "yellow")
    content: dict[str, Any] = {
        "metrics": result.summary(),
        "nll": result.losses,
        "seconds": result.seconds,
        "speed": speed,
    }
    pixel = pixel_threshold(model.calibration)
    content["pixel_threshold"] = pixel and pixel.as_dict()
    print_json({"out": str(job.out), **content, "left_out": left_out and left_out._asdict()})


def _print_metrics(result: "TrainingResult") -> None:
    if result.test_result is None:
        return
    choices = result.by_choice()
    table = Table("metric", *choices)
    cells = {
        metric: [
            f"{format_metric(chosen[how]['value'])} ({chosen[how]['epoch']})" if how in chosen else ""
            for how in choices
        ]
        for metric, chosen in result.summary().items()
    }
    add_metrics(table, cells)
    add_pixel_error(table, [m.evaluation.pixel_error for m in result.epoch_results if m.evaluation is not None])
    console.print(table)
    console.print("(epoch); best on test: each metric's own epoch, chosen by the test set, so optimistic", style="dim")


def _print_threshold(model: "MSFlow") -> None:
    calibration = model.calibration
    if calibration is None:
        console.print("no threshold: no images were held out; `fastmsflow calibrate` sets one", style="dim")
    elif calibration.is_enough():
        print_line(f"threshold: {calibration.threshold()}")
    else:
        print_line(f"no threshold: {calibration.shortage()}", "yellow")
    if calibration is not None:
        print_line(f"pixel threshold: {calibration.pixel_threshold()}")


def _print_failure(name: str, reason: str) -> None:
    print_error(f"{escape(shown(name))}: failed:", reason)


def _print_every_class(result: "EveryClassResult", out: Path) -> None:
    """Prints and writes one table of all classes. Raises: typer.Exit if a class failed."""
    header, lines = result.as_table(format_metric)
    table = Table(*header)
    for line in lines:
        table.add_row(*map(escape, line), style="red" if line[1] == "failed" else None)
    console.print(table)
    console.print(result.summary, style="dim")
    result.write(out, format_metric)
    print_line(f"written to {out}")
    rows = [row.as_dict() for row in (*result.rows, *result.mean)]
    content = {"rows": rows, "seconds": result.seconds, "failed": result.failures}
    print_json({"out": str(out), "wall_seconds": result.wall_seconds, **content})
    if result.failures:
        for name, reason in result.failures.items():
            _print_failure(name, reason)
        count = f"{len(result.failures)} of {len(result.classes)} classes failed"
        errors.print(f"[red]{count}; the same command tries them again[/red]")
        raise typer.Exit(1)
