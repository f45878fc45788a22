"""The pages of the documentation, and the code in them."""

import ast
import importlib
import re
import shlex
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.helpers.paths import ROOT

PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        yield Block(page, line, match[2], textwrap.dedent(match[3]))


EXAMPLES = [b for page in PAGES for b in blocks(page) if b.language == "python"]
COMMANDS = [
    pytest.param(words[1:], id=f"{block}: {shlex.join(words[1:])[:60]}")
    for page in PAGES
    for block in blocks(page)
    if not block.language
    for line in block.text.replace("\\\n", "").splitlines()
    for command in line.split("&&")
    if command.lstrip().startswith("fastmsflow ") and (words := shlex.split(command, comments=True))
]


def missing(example: Block) -> str | None:
    """Returns what the example needs and is not here."""
    for module in imported_modules(example):
        try:
            importlib.import_module(module)
        except ImportError:
            return module
    return "a JVM" if "pyspark" in example.text and shutil.which("java") is None else None


def imported_modules(example: Block) -> set[str]:
    """Returns the names of the modules of other packages that the example imports."""
    nodes = list(ast.walk(ast.parse(example.text)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return {name for name in names if name.partition(".")[0] != "fastmsflow"}


def run_up_to(example: Block, names: dict[str, Any]) -> None:
    """Runs ``example`` and, since a page's examples build on each other, those before it that have not run yet.

    ``names`` has the page's variables, and under ``run`` the examples that have run.
    """
    if lacking := missing(example):
        pytest.skip(f"needs {lacking}")
    for block in (b for b in EXAMPLES if b.page == example.page and b.line <= example.line):
        if block in names["run"] or missing(block):
            continue
        # The empty lines make a traceback show the page's own.
        exec(compile("\n" * block.line + block.text, str(block.page), "exec"), names)
        names["run"].append(block)
