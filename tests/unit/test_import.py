"""Tests what ``import fastmsflow`` costs and touches, and what an installation holds."""

import json
import statistics
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

OPTIONAL = ["timm", "sklearn", "scipy", "lightning", "PIL", "matplotlib", "typer", "rich", "triton"]


def test_import_takes_at_most_1_2_times_import_torch() -> None:
    # In one process and by processor time, so that a busy machine changes little. Without trio, which comes with the
    # tests' selenium: huggingface_hub takes 50 ms to import it where it is, and fastmsflow does not bring it.
    code = (
        "import sys, time; sys.modules['trio'] = None; start = time.process_time();"
        "import torch; between = time.process_time();"
        "import fastmsflow; fastmsflow.MSFlow; end = time.process_time();"
        "print((end - start) / (between - start))"
    )
    ratios = [float(printed(code)) for _ in range(5)]
    assert statistics.median(ratios) <= 1.2, ratios


def printed(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_brings_no_optional_package_and_touches_no_gpu() -> None:
    code = (
        "import sys, json, fastmsflow; fastmsflow.MSFlow, fastmsflow.backend, fastmsflow.scoring; import torch;"
        f"print(json.dumps([[m for m in {OPTIONAL} if m in sys.modules], torch.cuda.is_initialized()]))"
    )
    assert json.loads(printed(code)) == [[], False]


def test_every_public_name_is_there() -> None:
    import fastmsflow

    for name in fastmsflow.__all__:
        assert getattr(fastmsflow, name) is not None
    assert "MSFlow" in dir(fastmsflow)
    with pytest.raises(AttributeError, match="no attribute 'Flow'"):
        _ = fastmsflow.Flow


def test_kernels_are_the_folder_at_the_top_level() -> None:
    import fastmsflow.kernels

    assert (ROOT / "kernels" / "__init__.py").samefile(fastmsflow.kernels.__file__)


def test_setup_lists_every_package_once_and_no_other(monkeypatch) -> None:
    captured: dict = {}
    monkeypatch.setattr("setuptools.setup", lambda **options: captured.update(options))
    exec(compile((ROOT / "setup.py").read_text(), str(ROOT / "setup.py"), "exec"), {"__file__": str(ROOT / "setup.py")})
    there = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "fastmsflow").glob("**/__init__.py")}
    assert sorted(captured["packages"]) == sorted(there | {"fastmsflow.kernels"})
    assert captured["package_dir"] == {"fastmsflow.kernels": "kernels"}


def test_the_licence_is_apache_2() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text()


def test_the_command_line_without_its_extra_says_what_to_install(monkeypatch) -> None:
    from fastmsflow.__main__ import main

    for name in [name for name in sys.modules if name.startswith("fastmsflow.cli")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit, match=r"needs typer: pip install 'fastmsflow\[train\]'"):
        main()
