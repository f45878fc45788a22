"""fastmsflow calibrate: sets a model's threshold for a rate of false alarms."""

from pathlib import Path
from typing import Annotated

from ..calibration import FALSE_ALARMS
from ..errors import InputError
from ..files import file_stamp, shown, written_aside
from ..number_range import FALSE_PIXEL_RATES, RATE
from ..pixel_calibration import FALSE_PIXELS
from ..recipe import FALSE_PIXELS_HELP
from .imports import import_packages
from .options import OUTPUT, Dtype, ModelPath, Overlap, Scale, Tile, TopShare, Workers, argument, option
from .output import console, print_json, print_line, progress_bar


def calibrate(
    *,
    model: ModelPath,
    images: Annotated[
        list[str], argument("IMAGES...", "Good images, or folders of them, that MODEL was not trained on.")
    ],
    false_alarms: Annotated[
        float, option(None, "Share of good images that may be called defective.", range=RATE)
    ] = FALSE_ALARMS,
    false_pixels: Annotated[
        float, option(None, FALSE_PIXELS_HELP, metavar="RATE", range=FALSE_PIXEL_RATES)
    ] = FALSE_PIXELS,
    tile: Tile = None,
    overlap: Overlap = None,
    scale: Scale = None,
    top_share: TopShare = None,
    out: Annotated[Path | None, option(OUTPUT, "File for the calibrated model. Default: MODEL itself.")] = None,
    workers: Workers = 0,
    dtype: Dtype = "auto",
) -> None:
    """Sets MODEL's threshold for a rate of false alarms, from good images alone."""
    console.print("loading torch and timm ...", style="dim")
    import_packages("torch", "timm")
    from ..data.file_search import files_of
    from ..data.shards.shard_set import refuse_shards
    from ..evaluation.calibrate_model import calibrate_on_files
    from ..inference.loading import load_model
    from ..inference.tiled_models import TileOptions, retile
    from ..models.checkpoint import read_config

    for path in images:
        refuse_shards(path)
    before = file_stamp(model)
    network = load_model(model)
    # Its thresholds are made anew.
    network.calibration = None
    network = retile(network, TileOptions(tile, overlap, scale, top_share))
    # An image that is given twice counts once.
    files = files_of(map(Path, images))
    with progress_bar("scoring good images", len(files)) as bar:
        calibration = calibrate_on_files(
            network,
            files,
            false_alarms=false_alarms,
            false_pixels=false_pixels,
            dtype=dtype,
            workers=workers,
            progress=bar,
        )
    # Before anything is written, since too few images are an error.
    threshold, region, pixel = (calibration.threshold(), calibration.region_threshold(), calibration.pixel_threshold())
    network.calibration = calibration
    notes = read_config(model).get("notes", {})
    with written_aside(out or model) as aside:
        network.save(aside, **notes)
        if file_stamp(model) != before:
            raise InputError(f"{shown(model)}: another process has replaced it meanwhile; calibrate it again")
    print_line(f"threshold of an image: {threshold}")
    print_line(f"threshold of a region: {region}")
    print_line(f"threshold of a pixel: {pixel}")
    # A model does not record the images that it was trained on.
    print_line(
        f"this holds if {shown(model)} was trained on none of these images: those it was trained on score too well,"
        " and the thresholds are too low",
        "dim",
    )
    print_line(f"kept in {out or model}")
    thresholds = {"threshold": threshold.as_dict(), "region": region.as_dict(), "pixel": pixel.as_dict()}
    print_json({"model": str(out or model), **thresholds})
