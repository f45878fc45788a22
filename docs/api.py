"""Writes docs/api.md from the docstrings: ``python docs/api.py``. Reads the sources; imports nothing of them."""

from collections.abc import Iterator
from pathlib import Path

import griffe
from griffe2md import ConfigDict, render_object_docs

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"
MODULES = (
    "",
    "scoring",
    "inference",
    "metrics",
    "data",
    "compat",
    "backend",
    "nn.feature_extractor",
    "calibration",
    "training",
)
HEADER = """\
# Reference

Made from the docstrings by `python docs/api.py`; change it there. In shapes B and N count images, l levels, C channels;
H and W are in pixels. Whatever takes a `backend` takes `"auto"`, `"triton"` or `"torch"`: see `fastmsflow.backend`.

"""
LAYOUT: ConfigDict = {
    "docstring_style": None,
    "members_order": "source",
    "show_signature_annotations": True,
    "line_length": 100,
    "show_object_full_path": False,
    "show_submodules": False,
    "show_if_no_docstring": False,
    "summary": False,
    # Their links would lead nowhere; of what is inherited, only our own is shown.
    "show_bases": False,
    "filters": ["!^_(?!_call__$)"],
    "inherited_members": ["save_pretrained", "from_pretrained"],
}


def package() -> griffe.Module:
    loader = griffe.GriffeLoader(search_paths=[ROOT], docstring_parser=None)
    loaded = loader.load("fastmsflow")
    loader.resolve_aliases(external=False)
    assert isinstance(loaded, griffe.Module)
    return loaded


def public(root: griffe.Module) -> Iterator[tuple[griffe.Module, list[str]]]:
    """The public modules and, of each, what its ``__all__`` names, but for modules and what stood in one before."""
    bridges = (f"integrations.{name}" for name in sorted(root["integrations"].modules))
    seen: set[str] = set()
    for path in (*MODULES, *bridges):
        module = root[path] if path else root
        names = [str(name) for name in module.exports or () if not module[str(name)].is_module]
        new = [name for name in names if module[name].canonical_path not in seen]
        seen |= {module[name].canonical_path for name in new}
        if new:
            yield module, new


def rendered() -> str:
    pages = (
        render_object_docs(module, {**LAYOUT, "members": names}, format_md=True) for module, names in public(package())
    )
    return HEADER + "\n".join(pages)


if __name__ == "__main__":
    PAGE.write_text(rendered())
