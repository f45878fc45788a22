"""Every option of a verb from a YAML file, and all of them into one."""

import difflib
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from ..errors import InputError

# Not of a run, but of one call: in no configuration that is saved.
CALL_ONLY = frozenset({"config", "quiet", "as_json", "resume"})


def _read(ctx: typer.Context, path: Path | None) -> Path | None:
    """The file's values become the defaults of the verb's options; what stands in the command line counts more.

    Errors: InputError where it is no mapping of the verb's options, with the nearest name for a misspelt one.
    """
    if path is None:
        return None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}; give one 'option: value' a line")
    names = {str(p.name) for p in ctx.command.params} - {"config", "help"}
    # As in the command line, where it has another name than the function's parameter.
    spelt = {option.lstrip("-").replace("-", "_"): str(p.name) for p in ctx.command.params for option in p.opts}
    values = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        name = spelt.get(name, name)
        if name not in names:
            shown = sorted({spell for spell, of in spelt.items() if of in names} - {"help"})
            close = difflib.get_close_matches(name, shown, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(shown)}"
            raise InputError(f"{path}: {ctx.info_name} has no option {str(key)!r}{hint}")
        values[name] = value
    ctx.default_map = {**(ctx.default_map or {}), **values}
    return path


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        callback=_read,
        is_eager=True,
        dir_okay=False,
        exists=True,
        help="YAML file of options, one 'name: value' a line; options given here count more.",
    ),
]


def resolved(ctx: typer.Context) -> dict[str, Any]:
    """What every option came to, by its name in the command line: what ``--config`` reads."""
    values = {}
    for parameter in ctx.command.params:
        name = str(parameter.name)
        value = ctx.params.get(name)
        if name in CALL_ONLY or value is None or name == "help":
            continue
        spelt = next((o.lstrip("-") for o in parameter.opts if o.startswith("--")), name)
        values[spelt] = _plain(value)
    return values


def source_of(ctx: typer.Context, name: str) -> str:
    """Tells the source of the parameter ``name``: COMMANDLINE, DEFAULT_MAP (a file) or DEFAULT."""
    return getattr(ctx.get_parameter_source(name), "name", "DEFAULT")


def chosen(ctx: typer.Context) -> set[str]:
    """The parameters that the command line names, and those that a file gives another value than their default: one
    that a run wrote names all of them."""
    found = set()
    for parameter in ctx.command.params:
        name = str(parameter.name)
        source = source_of(ctx, name)
        changed = source != "DEFAULT_MAP" or ctx.params.get(name) != parameter.default
        if source != "DEFAULT" and changed:
            found.add(name)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
