"""Tests what is published: the source archive and the wheel, their contents, and the wheel at work in an environment of
its own."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest

import fastmsflow
from tests.helpers.paths import ROOT

pytest.importorskip("build", reason="needs build")

pytestmark = pytest.mark.slow

VERSION = fastmsflow.__version__
LOCAL = ("*_cache", "__pycache__", "*.egg-info", "build", "dist", "runs", "results", ".*", "*venv*")

IN_THE_ENVIRONMENT = """\
import sys
from pathlib import Path

import fastmsflow, fastmsflow.kernels
for module in (fastmsflow, fastmsflow.kernels):
    assert Path(module.__file__).is_relative_to(sys.prefix), module.__file__
"""
# The demo from end to end, on a few photographs and smaller: its own features take half a minute.
DEMO = """\
from dataclasses import replace

from fastmsflow.__main__ import main
from fastmsflow.data.layouts import elpv as layout

def few(kind):
    images = elpv(kind)
    return replace(images, train=images.train[:4], test=(*images.test[:2], *images.test[-2:]), image_size=(64, 64))

elpv, layout.elpv = layout.elpv, few
sys.argv = ["fastmsflow", "demo", "--meta-epochs", "1", "--sub-epochs", "1"]
main()
"""
KERNEL = """\
import torch

from fastmsflow.scoring import score_log_likelihoods

logp = [-torch.rand(2, side, side, generator=torch.Generator().manual_seed(side)) for side in (12, 6, 3)]
ours, reference = (score_log_likelihoods(logp, (24, 24), backend=backend) for backend in ("triton", "torch"))
for a, b in zip(ours, reference):
    torch.testing.assert_close(a, b)
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Returns what the command printed; it sees no tree of ours, and fails loudly."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The archive and the wheel made of it, as ``python -m build`` makes them; and a wheel made of the tree."""
    folder = tmp_path_factory.mktemp("built")
    # A build leaves files in the tree, and finds those that others left.
    shutil.copytree(ROOT, folder / "tree", symlinks=True, ignore=shutil.ignore_patterns(*LOCAL))
    for target, options in (("release", ()), ("direct", ("--wheel",))):
        run(sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", folder / target, cwd=folder / "tree")
    [archive], [wheel] = (folder / "release").glob("*.tar.gz"), (folder / "release").glob("*.whl")
    [direct] = (folder / "direct").glob("*.whl")
    return {"archive": archive, "wheel": wheel, "direct": direct}


def wheel_files(path: Path) -> dict[str, bytes]:
    with ZipFile(path) as wheel:
        return {name: wheel.read(name) for name in wheel.namelist()}


def sources() -> set[str]:
    """The files of ``fastmsflow/`` and ``kernels/``, by their paths in the tree."""
    files = [path for folder in ("fastmsflow", "kernels") for path in (ROOT / folder).rglob("*") if path.is_file()]
    # Whether rglob follows the link to kernels depends on the Python.
    files = [path for path in files if path.suffix != ".pyc" and ROOT / "fastmsflow/kernels" not in path.parents]
    return {path.relative_to(ROOT).as_posix() for path in files}


def test_the_archive_holds_what_a_build_needs_each_file_once(built) -> None:
    with tarfile.open(built["archive"]) as archive:
        members = [member for member in archive.getmembers() if not member.isdir()]
    assert all(member.isfile() for member in members), "links"
    names = [member.name.removeprefix(f"fastmsflow-{VERSION}/") for member in members]
    assert len(names) == len(set(names))
    about = {
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "pyproject.toml",
        "setup.py",
        "setup.cfg",
        "MANIFEST.in",
        "PKG-INFO",
    }
    assert {name for name in names if not name.startswith("fastmsflow.egg-info/")} == sources() | about


def test_the_wheel_holds_the_package_with_its_kernels_and_nothing_else(built) -> None:
    names = set(wheel_files(built["wheel"]))
    about = {name for name in names if name.startswith(f"fastmsflow-{VERSION}.dist-info/")}
    assert f"fastmsflow-{VERSION}.dist-info/licenses/LICENSE" in about
    installed = {f"fastmsflow/{name}" if name.startswith("kernels/") else name for name in sources()}
    assert names - about == installed


def test_a_wheel_of_the_archive_is_a_wheel_of_the_tree(built) -> None:
    assert wheel_files(built["wheel"]) == wheel_files(built["direct"])


def test_the_version_stands_in_one_place(built) -> None:
    metadata = wheel_files(built["wheel"])[f"fastmsflow-{VERSION}.dist-info/METADATA"].decode()
    assert Parser().parsestr(metadata)["Version"] == VERSION
    stated = [path for path in sources() if VERSION in (ROOT / path).read_text()]
    assert stated == ["fastmsflow/_version.py"]
    assert VERSION not in (ROOT / "pyproject.toml").read_text()
    assert f"## {VERSION}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.fixture(scope="module")
def environment(built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment that holds the wheel; PyTorch and the like are read from where the tests run."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    [packages] = folder.glob("lib/python*/site-packages")
    # Entries of a .pth come last, and .pth files there (an editable fastmsflow's) are not read.
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "others.pth").write_text("\n".join(others))
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--ignore-installed",
        built["wheel"], cwd=folder)  # fmt: skip
    return folder


def test_the_installed_wheel_runs_a_kernel_and_the_demo(environment: Path, tmp_path: Path, monkeypatch) -> None:
    """One process for both, since it imports for seconds."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    run(environment / "bin/python", "-I", "-c", IN_THE_ENVIRONMENT + KERNEL + DEMO, cwd=tmp_path)
    assert {"last.safetensors", "scores.csv", "heatmaps.png"} <= {p.name for p in (tmp_path / "runs/demo").iterdir()}


def test_the_installed_command_tells_its_version(environment: Path, tmp_path: Path) -> None:
    assert run(environment / "bin/fastmsflow", "--version", cwd=tmp_path) == f"fastmsflow {VERSION}\n"
