"""Packages are listed by hand so that ``kernels/`` at the top level is installed as ``fastmsflow.kernels``.

``fastmsflow/kernels`` is a symbolic link to it for running in place; the walk below does not follow it.
"""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def packages() -> list[str]:
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "fastmsflow").rglob("__init__.py")}
    return sorted(found | {"fastmsflow.kernels"})


setup(packages=packages(), package_dir={"fastmsflow.kernels": "kernels"})
