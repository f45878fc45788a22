"""The pictures and tables of an evaluated test set, and of new images."""

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

from ..data import ImageSet, Sample, list_images, load_image, load_mask
from ..errors import InputError
from ..files import written_aside
from ..model import MSFlow
from .heat_maps import Panel, gallery, save_heat_map
from .plots import plot_scores

# Heat maps show the additive map: the one made for localisation. It lies between 0 and the number of levels.
HEAT_SCALE = (0.0, 3.0)
CAPTION = "additive score map (0: normal, 3: abnormal at every level)"


def as_pixels(image: torch.Tensor) -> np.ndarray:
    """(3, H, W) in [0, 1] -> (H, W, 3) uint8."""
    return (rearrange(image, "c h w -> h w c").numpy() * 255).round().astype(np.uint8)


def write_test_report(
    out: Path,
    images: ImageSet,
    image_size: tuple[int, int],
    score: np.ndarray,
    log_score: np.ndarray,
    score_map: np.ndarray,
) -> None:
    """``scores.csv``, ``scores.png`` (histogram) and ``heatmaps.png`` (examples of every height of score) into ``out``.

    ``score``, ``log_score``: (N,) in the order of ``images.test``; ``score_map``: (N, H, W).
    """
    labels = np.array([sample.label for sample in images.test])
    rows = zip(images.test, score, log_score, strict=True)
    write_table(
        out / "scores.csv",
        ("image", "label", "kind", "score", "log_score"),
        ((sample.image, sample.label, sample.kind, float(s), float(log)) for sample, s, log in rows),
    )
    plot_scores(out / "scores.png", labels, log_score, f"{images.name}: image scores of the test set")
    chosen = [*_spread(np.flatnonzero(labels == 1), log_score, 8), *_spread(np.flatnonzero(labels == 0), log_score, 4)]
    panels = [_panel(images.test[i], image_size, log_score[i], score_map[i]) for i in chosen]
    gallery(out / "heatmaps.png", panels, HEAT_SCALE, CAPTION)


def write_predictions(
    model: MSFlow, paths: Sequence[Path], out: Path, batch_size: int, progress: Callable[[int], None]
) -> tuple[list[tuple[Path, float, float]], list[str]]:
    """Scores every image of ``paths`` (files and folders); a heat map of each and ``scores.csv`` go into ``out``.

    -> ([(image, score, log score), highest first], [one line for each file that could not be read]).
    Errors: InputError where not one image can be read.
    """
    files = [file for path in paths for file in (list_images(path) if path.is_dir() else [path])]
    device = next(model.parameters()).device
    scored: list[tuple[Path, float, float]] = []
    faults: list[str] = []
    names: set[str] = set()
    for start in range(0, len(files), batch_size):
        kept, pixels = [], []
        for file in files[start : start + batch_size]:
            try:
                pixels.append(load_image(file, model.image_size))
                kept.append(file)
            except InputError as error:
                faults.append(str(error))
        if kept:
            with torch.no_grad():
                scores = model.scores(torch.stack(pixels).to(device, memory_format=torch.channels_last))
            # Counted from the highest possible likelihood, not the batch's: comparable between images.
            heat = (len(model.flow.channels) - scores.likelihood_add).cpu().numpy()
            for i, file in enumerate(kept):
                save_heat_map(
                    out / f"{_unused(file.stem, names)}_heatmap.png", as_pixels(pixels[i]), heat[i], HEAT_SCALE
                )
                scored.append((file, float(scores.score[i]), float(scores.log_score[i])))
        progress(min(start + batch_size, len(files)))
    if not scored:
        raise InputError(faults[0])
    scored.sort(key=lambda row: row[2], reverse=True)
    write_table(out / "scores.csv", ("image", "score", "log_score"), scored)
    return scored, faults


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """CSV, written aside and renamed."""
    with written_aside(path) as aside, aside.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def _spread(indices: np.ndarray, score: np.ndarray, count: int) -> list[int]:
    """``count`` of ``indices``, evenly spaced from the highest score to the lowest: no flattering choice."""
    ordered = indices[np.argsort(-score[indices], kind="stable")]
    return ordered[np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().astype(int)].tolist()


def _panel(sample: Sample, image_size: tuple[int, int], log_score: float, score_map: np.ndarray) -> Panel:
    mask = load_mask(sample, image_size).numpy() if sample.mask is not None else None
    title = f"{sample.kind}  {sample.image.stem}  log score {log_score:.2f}"
    return Panel(as_pixels(load_image(sample.image, image_size)), score_map, title, mask)


def _unused(stem: str, names: set[str]) -> str:
    name, copy = stem, 1
    while name in names:
        copy += 1
        name = f"{stem}_{copy}"
    names.add(name)
    return name
