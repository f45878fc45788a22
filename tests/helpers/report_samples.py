"""A small page of results for tests: forty parts, their scores overlapping and tied."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastmsflow.visualization.html_report import Report, ReportRow

SIDE = 64
RNG = np.random.default_rng(9826)
KINDS = ["good"] * 24 + ["crack"] * 9 + ["hole"] * 7
LABELS = np.array([int(kind != "good") for kind in KINDS])
# Ties within and across the classes; the classes overlap.
SCORES = np.round(np.exp(RNG.normal(1 + 0.9 * LABELS, 0.5)), 2)
SCORES[30] = SCORES[3]
NAMES = [f"part{i}.png" for i in range(len(KINDS))]


def mask_of(label: int) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), bool)
    mask[16:32, 8:48] = bool(label)
    return mask


def rows(masks: bool = True) -> Iterator[ReportRow]:
    for i, (kind, label, score) in enumerate(zip(KINDS, LABELS, SCORES, strict=True)):
        pixels = np.full((SIDE, SIDE, 3), 40 + 4 * i, np.uint8)
        heat = np.full((SIDE, SIDE), 2.5)
        heat[24:40, 24:56] = 7.5
        mask = mask_of(label) if masks else None
        yield ReportRow(Path("some/folder") / NAMES[i], int(label), kind, float(score), pixels, heat, mask)


def page(**changes: Any) -> Report:
    whole = Report(
        title="parts, test set",
        rows=rows(),
        heat_scale=(0.0, 10.0),
        heat_caption="nats a pixel",
        threshold=3.0,
        threshold_note="5% false alarms asked",
        region_threshold=5.0,
        pro=(np.linspace(0, 0.3, 50), np.linspace(0, 0.9, 50)),
        metrics={"last": {"image AUROC": 0.91, "AUPRO": None}, "best on test": {"image AUROC": 0.93}},
        settings={"lr": 1e-3, "model": {"extractor": "resnet18", "image_size": [64, 64]}, "nothing": float("nan")},
        versions={"fastmsflow": "0.1.0"},
        fingerprint="sha256:1234",
        licence="CC0",
        pixel_note="Pixel threshold: 4 nats.",
    )
    return dataclasses.replace(whole, **changes)


ROW = next(rows())
