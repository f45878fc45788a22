"""fastmsflow calibrate: sets a model's threshold for a rate of false alarms."""

from pathlib import Path
from typing import Annotated

from ..calibration import FALSE_ALARMS
from ..number_range import RATE
from .imports import import_packages
from .options import OUTPUT, Dtype, ModelPath, Workers, argument, option
from .output import console, print_json, print_line, progress_bar


def calibrate(
    *,
    model: ModelPath,
    images: Annotated[
        list[Path], argument("IMAGES...", "Good images, or folders of them, that MODEL was not trained on.")
    ],
    false_alarms: Annotated[
        float, option(None, "Share of good images that may be called defective.", range=RATE)
    ] = FALSE_ALARMS,
    out: Annotated[Path | None, option(OUTPUT, "File for the calibrated model. Default: MODEL itself.")] = None,
    workers: Workers = 0,
    dtype: Dtype = "auto",
) -> None:
    """Sets MODEL's threshold for a rate of false alarms, from good images alone."""
    console.print("loading torch and timm ...", style="dim")
    import_packages("torch", "timm")
    from ..data.file_search import list_images
    from ..evaluation.calibrate_model import calibrate_on_files
    from ..inference.loading import load_model
    from ..models.checkpoint import read_checkpoint

    network = load_model(model)
    # An image that is given twice counts once.
    files = list(dict.fromkeys(file for path in images for file in (list_images(path) if path.is_dir() else [path])))
    with progress_bar("scoring good images", len(files)) as bar:
        calibration = calibrate_on_files(
            network, files, false_alarms=false_alarms, dtype=dtype, workers=workers, progress=bar
        )
    # Before anything is written, since too few images are an error.
    threshold, region = calibration.threshold(), calibration.region_threshold()
    network.calibration = calibration
    network.save(out or model, **read_checkpoint(model)[1].get("notes", {}))
    print_line(f"threshold of an image: {threshold}")
    print_line(f"threshold of a region: {region}")
    print_line(f"kept in {out or model}")
    print_json({"model": str(out or model), "threshold": threshold.as_dict(), "region": region.as_dict()})
