"""The documentation: its examples run, its commands exist, its links lead somewhere, its reference is what the
docstrings say."""

import importlib.util
import re
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer

from fastmsflow.cli import app
from fastmsflow.nn.position import position_code
from tests.helpers.few_tiles import few_tiles
from tests.helpers.live_freia import live_flows
from tests.helpers.pages import COMMANDS, EXAMPLES, PAGES, Block, run_up_to
from tests.helpers.pages_folder import CHANNELS, pages_folder
from tests.helpers.paths import ROOT

GRIDS = ((4, 4), (2, 2), (1, 1))
# Commands that take seconds on the files below; the others train, download or need a GPU, or are docs/migration.md's,
# which run in test_migration.py.
RUN = ("predict runs/mine/best.safetensors", "convert official.pt own.safetensors")


# Those of docs/engines.md run in test_engines.py.
ELSEWHERE = "engines.md"


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
        "conditions": [position_code(64, *grid, torch.float32, "cpu").repeat(2, 1, 1, 1) for grid in GRIDS],
        "batches": [features(), features()],
        "features": features(),
        "freia_flows": freia_flows,
        "freia_fusion": freia_fusion,
    }
    return {page: {"run": [], **given} for page in PAGES}


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes what examples do small: few images, an epoch of training, no processes that read."""
    monkeypatch.setattr("fastmsflow.data.textures", lambda kind, root: few_tiles(Path(root)))
    if importlib.util.find_spec("anomalib"):
        data, engine = map(importlib.import_module, ("anomalib.data", "anomalib.engine"))
        monkeypatch.setattr(data, "MVTecAD", partial(data.MVTecAD, num_workers=0))
        made = engine.Engine
        monkeypatch.setattr(engine, "Engine", lambda **options: made(**{**options, "max_epochs": 1}))


@pytest.mark.parametrize("example", [b for b in EXAMPLES if b.page.name != ELSEWHERE], ids=str)
def test_an_example_runs(
    example: Block, folder: Path, namespaces, small_steps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    if " ".join(args).startswith(RUN):
        from fastmsflow.__main__ import main

        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["fastmsflow", *args])
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = page.read_text()
    headings = {
        re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings
        elif "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.fixture(scope="module")
def reference():
    """docs/api.py; the reference is compared where its tools are (Python 3.11 or later)."""
    pytest.importorskip("griffe2md", reason="needs griffe2md")
    pytest.importorskip("black", reason="needs black")
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        return importlib.import_module("api")
    finally:
        sys.path.pop(0)


def test_the_reference_is_what_the_docstrings_say(reference) -> None:
    assert reference.rendered() == reference.PAGE.read_text(), "run python docs/api.py"


def test_every_public_name_is_in_the_reference_with_a_docstring(reference) -> None:
    root, page = reference.package(), reference.PAGE.read_text()
    public = [
        "",
        "inference",
        "nn.extractor",
        "calibration",
        "training",
        *(name for name in map(str, root.exports) if root[name].is_module),
    ]
    public += [f"integrations.{name}" for name in root["integrations"].modules]
    faults = []
    for path in public:
        module = root[path] if path else root
        faults += [] if module.exports else [f"{module.path} has no __all__"]
        for name in map(str, module.exports or ()):
            obj = module[name]
            if not obj.is_module and not re.search(rf"^### `fastmsflow[.\w]*\.{name}`$", page, re.MULTILINE):
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
