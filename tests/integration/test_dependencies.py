"""Tests what pyproject.toml lets be installed, without any version known to be bad, and what is done without Triton."""

import csv
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from PIL import Image
from skimage import data as photographs

from fastmsflow import MSFlow
from fastmsflow.data.image_io import load_image
from tests.helpers.paths import ROOT

tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements() -> Iterator[Requirement]:
    for lines in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        yield from map(Requirement, lines)


@pytest.mark.parametrize(
    ("package", "bad", "good"),
    [
        # Malicious uploads, GHSA-w37p-236h-pfx3.
        ("lightning", ["2.6.2", "2.6.3"], ["2.6.0", "2.6.1", "2.6.4"]),
        # Two processes may hold one lock.
        ("filelock", ["3.12.0", "3.25.2", "3.29.4"], ["4.0.0", "4.3.1"]),
        ("huggingface_hub", ["0.23.0", "0.29.3"], ["0.30.0", "2.4.0"]),
        # Decodes no images.
        ("torchcodec", ["0.15.0"], ["0.16.0", "0.17.0"]),
    ],
)
def test_bad_versions_are_excluded_wherever_a_package_is_asked_for(
    package: str, bad: list[str], good: list[str]
) -> None:
    asked = [requirement.specifier for requirement in requirements() if requirement.name == package]
    assert asked
    for versions in asked:
        assert not [version for version in bad if version in versions]
        assert all(version in versions for version in good)


@pytest.mark.parametrize(
    ("platform", "machine", "expected"),
    [
        ("linux", "x86_64", ["triton"]),
        ("win32", "AMD64", ["triton-windows"]),
        ("win32", "ARM64", []),
        ("darwin", "arm64", []),
    ],
)
def test_each_platform_gets_the_triton_that_there_is_for_it(platform: str, machine: str, expected: list[str]) -> None:
    here = {"sys_platform": platform, "platform_machine": machine}
    found = [r for r in requirements() if r.name.startswith("triton") and (r.marker is None or r.marker.evaluate(here))]
    assert [requirement.name for requirement in found] == expected


WITHOUT_TRITON = """\
import sys

sys.modules["triton"] = None  # an import of it fails, as where it is not installed
from fastmsflow.__main__ import main

main()
"""


def test_predict_works_where_triton_cannot_be_imported(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i in range(3):
        Image.fromarray(photographs.brick()[i * 70 : i * 70 + 80, 60:156]).save(images / f"{i}.png")
    torch.manual_seed(0)
    model = MSFlow("test_efficientnet", pretrained=False, image_size=(64, 64), blocks=(1, 1, 1)).eval()
    model.save(tmp_path / "model.safetensors")
    command = ["predict", tmp_path / "model.safetensors", images, "--out", tmp_path / "out", "--no-heat-maps"]
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON, *command], check=True, cwd=ROOT)
    with (tmp_path / "out/scores.csv").open() as file:
        found = {row["image"]: float(row["absolute_score"]) for row in csv.DictReader(file)}
    names = sorted(images.iterdir())
    with torch.no_grad():
        expected = model.scores(torch.stack([load_image(name, (64, 64)) for name in names])).absolute_score
    assert [found[str(name)] for name in names] == pytest.approx(expected.tolist(), rel=1e-4)
