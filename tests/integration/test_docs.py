"""Tests that the documentation's examples run, its commands exist, its links lead somewhere, and its site is built
strictly and names everything public."""

import importlib
import re
import subprocess
import sys
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
import typer

from fastmsflow.cli import app
from fastmsflow.nn.positional_encoding import positional_encoding_2d
from tests.helpers.live_freia import live_flows
from tests.helpers.pages import COMMANDS, EXAMPLES, PAGES, Block, run_up_to
from tests.helpers.pages_folder import CHANNELS, pages_folder
from tests.helpers.paths import ROOT

GRIDS = ((4, 4), (2, 2), (1, 1))
# Commands that take seconds on the files below; the others train, download or need a GPU, or are docs/migration.md's,
# which run in test_migration.py.
RUN = ("predict runs/mine/best.safetensors", "convert official.pt own.safetensors")


# Their examples run in test_engines.py, test_deployment.py and test_mvtec_ad_2.py, and that of anomalib in
# test_anomalib.py.
ELSEWHERE = ("engines.md", "deployment.md", "mvtec_ad_2.md")
HERE = [b for b in EXAMPLES if b.page.name not in ELSEWHERE and "import Engine" not in b.text]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pages_folder(tmp_path_factory.mktemp("docs"))


@pytest.fixture(scope="module")
def namespaces() -> dict[Path, dict[str, Any]]:
    """The variables of each page's examples, which are read from its beginning: what a page says that it has."""

    def features() -> list[torch.Tensor]:
        return [torch.randn(2, c, *grid) for c, grid in zip(CHANNELS, GRIDS, strict=True)]

    freia_flows, freia_fusion = live_flows()
    given = {
        "c": SimpleNamespace(c_conds=(64, 64, 64), parallel_blocks=(1, 1, 1), clamp_alpha=1.9),
        "c_feats": list(CHANNELS),
        "conditions": [
            positional_encoding_2d(64, *grid, dtype=torch.float32, device="cpu").repeat(2, 1, 1, 1) for grid in GRIDS
        ],
        "batches": [features(), features()],
        "features": features(),
        "freia_flows": freia_flows,
        "freia_fusion": freia_fusion,
    }
    elsewhere = [example for example in EXAMPLES if example not in HERE]
    return {page: {"run": list(elsewhere), **given} for page in PAGES}


@pytest.mark.slow
@pytest.mark.parametrize("example", HERE, ids=str)
def test_an_example_runs(example: Block, folder: Path, namespaces, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    run_up_to(example, namespaces[example.page])


@pytest.mark.parametrize("args", COMMANDS)
def test_a_command_exists_and_runs_where_that_is_cheap(
    args: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = typer.main.get_command(app)
    verb, *rest = args
    assert verb in group.commands
    # Raises a UsageError where an option does not exist or an argument is missing.
    group.commands[verb].make_context(verb, list(rest))
    # Not every chip has bfloat16; those of OpenVINO take long, and others run in test_predict_openvino.py.
    elsewhere = {"bfloat16", "openvino", "--int8"} & set(args)
    if " ".join(args).startswith(RUN) and not elsewhere:
        from fastmsflow.__main__ import main

        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["fastmsflow", *args])
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        address, _, fragment = target.partition("#")
        file = page.parent / address if address else page
        assert file.exists(), target
        assert not fragment or fragment in headings(file), target


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    found = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the site, strictly: a page, link or name that does not exist fails the build."""
    pytest.importorskip("mkdocs", reason="needs mkdocs")
    pytest.importorskip("mkdocstrings_handlers.python", reason="needs mkdocstrings, for Python 3.11 or later")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr
    return folder


class Anchors(HTMLParser):
    """Collects the ids of an HTML page, and the files that the page refers to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.targets: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids.update(value for name, value in attrs if name == "id" and value)
        target = given.get("src") or (given.get("href") if tag in ("a", "link") else None)
        if target is not None:
            self.targets.append(target)


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Anchors]:
    """The built pages by file; 404.html is left out, because its links start at the root of a server."""
    return {page: Anchors(page) for page in sorted(site.rglob("*.html")) if page.name != "404.html"}


@pytest.mark.slow
def test_the_links_of_the_site_lead_somewhere(site: Path, pages: dict[Path, Anchors]) -> None:
    broken = []
    for page, anchors in pages.items():
        for target in anchors.targets:
            address, _, fragment = unquote(target).partition("#")
            if urlsplit(address).scheme or address.startswith("//"):
                continue
            file = page if not address else page.parent / address
            file = (file / "index.html" if file.is_dir() else file).resolve()
            there = fragment in pages[file].ids if fragment and file in pages else file.is_file()
            broken += [] if there else [f"{page.relative_to(site)}: {target}"]
    assert broken == []


@pytest.mark.slow
def test_every_page_is_on_the_site(pages: dict[Path, Anchors], site: Path) -> None:
    sources = [page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md")]
    built = {page.relative_to(site) for page in pages}
    expected = {s.with_suffix(".html") if s.stem == "index" else s.with_suffix("") / "index.html" for s in sources}
    assert expected <= built


@pytest.mark.slow
def test_every_public_name_is_in_the_reference_with_a_docstring(pages: dict[Path, Anchors]) -> None:
    griffe = importlib.import_module("griffe")
    loader = griffe.GriffeLoader(search_paths=[ROOT], docstring_parser=None)
    root = loader.load("fastmsflow")
    loader.resolve_aliases(external=False)
    ids = set().union(*(anchors.ids for anchors in pages.values()))
    public = [
        "",
        "inference",
        "nn.feature_extractor",
        "calibration",
        "training",
        *(name for name in map(str, root.exports) if root[name].is_module),
    ]
    public += [f"integrations.{name}" for name in root["integrations"].modules]
    modules = [root[path] if path else root for path in public]
    # A name that several modules export has its place at one of them.
    places: dict[str, set[str]] = defaultdict(set)
    for module in modules:
        for name in map(str, module.exports or ()):
            places[module[name].canonical_path].add(f"{module.path}.{name}")
    faults = []
    for module in modules:
        faults += [] if module.exports else [f"{module.path} has no __all__"]
        for name in map(str, module.exports or ()):
            obj = module[name]
            if not obj.is_module and not places[obj.canonical_path] & ids:
                faults.append(f"{obj.path} is not in the reference")
            faults += [f"{member.path} has no docstring" for member in [obj, *stated(obj)] if not member.has_docstring]
    assert faults == []


def stated(obj: Any) -> list[Any]:
    """Methods and properties that a class states itself; fields too, where they are its constructor."""
    if not obj.is_class:
        return []
    members = [member for name, member in obj.members.items() if not name.startswith("_")]
    fields = "dataclass" in obj.labels or "NamedTuple" in map(str, obj.bases)
    return [m for m in members if m.is_function or "property" in m.labels or (fields and m.is_attribute)]
