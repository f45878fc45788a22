"""Options of a verb from a YAML file (``--config``), and the options of a run as such a file."""

import difflib
import inspect
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
import yaml

from ..errors import InputError
from .options import OLD_SPELLINGS, OUTPUT, new_spelling, option

# Options of one call, which no saved configuration holds.
CALL_ONLY = frozenset({"config", "quiet", "as_json", "resume"})
FILE_KEYS = {new.lstrip("-"): old.lstrip("-") for old, new in OLD_SPELLINGS.items()}
"""Option name -> its name in the files that runs write, which every version reads."""


def _read(ctx: typer.Context, path: Path | None) -> Path | None:
    """Makes the file's values the defaults of the verb's options; the command line overrides them.

    Raises: InputError if the file is no mapping of the verb's options, with the nearest name for a misspelt one.
    """
    if path is None:
        return None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}; give one 'option: value' a line")
    parameters = [p for p in ctx.command.params if p.name != "config"]
    # Options may have another name in the command line than the function's parameter has.
    parameter_of = {option.lstrip("-").replace("-", "_"): str(p.name) for p in parameters for option in p.opts}
    values: dict[str, Any] = {}
    for key, value in content.items():
        option = new_spelling(str(key).replace("_", "-")).replace("-", "_")
        name = parameter_of.get(option, option)
        if name not in parameter_of.values():
            close = difflib.get_close_matches(name, parameter_of, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(sorted(parameter_of))}"
            raise InputError(f"{path}: {ctx.info_name} has no option {str(key)!r}{hint}")
        if name in values:
            raise InputError(f"{path}: {str(key)!r} is another spelling of an option in this file; leave one out")
        kind = _number_kind(ctx, name)
        for item in value if isinstance(value, list) else [value]:
            # typer would make 2 of 2.5, and 1 of true.
            if (kind and isinstance(item, bool)) or (kind is int and isinstance(item, float)):
                raise InputError(f"{path}: {key} is {item!r}; it must be a {'whole ' if kind is int else ''}number")
        values[name] = value
    ctx.default_map = {**(ctx.default_map or {}), **values}
    return path


def _number_kind(ctx: typer.Context, name: str) -> type | None:
    """Returns the kind of number that the parameter ``name`` takes, int or float, also as a list; None for others."""
    annotation = get_args(inspect.signature(ctx.command.callback or _read).parameters[name].annotation)[0]
    return next((kind for kind in (int, float) if kind in (annotation, *get_args(annotation))), None)


Config = Annotated[
    Path | None,
    option(
        OUTPUT,
        "YAML file of options, one 'name: value' a line; the command line overrides it.",
        "--config",
        callback=_read,
        is_eager=True,
        dir_okay=False,
        exists=True,
    ),
]


def resolved_options(ctx: typer.Context) -> dict[str, Any]:
    """Returns the value of every option under the name that ``--config`` reads, for the configuration of a run."""
    values = {}
    for parameter in ctx.command.params:
        name = str(parameter.name)
        value = ctx.params.get(name)
        if name not in CALL_ONLY and value is not None:
            option = next((o.lstrip("-") for o in parameter.opts if o.startswith("--")), name)
            values[FILE_KEYS.get(option, option)] = _as_yaml(value)
    return values


def source_of(ctx: typer.Context, name: str) -> str:
    """Returns the source of the parameter ``name``: COMMANDLINE, DEFAULT_MAP (a file) or DEFAULT."""
    return getattr(ctx.get_parameter_source(name), "name", "DEFAULT")


def chosen_options(ctx: typer.Context) -> set[str]:
    """Returns the parameters that the command line names and those that a file changes from their default.

    A file that a run wrote names all parameters.
    """
    chosen = set()
    for parameter in ctx.command.params:
        name = str(parameter.name)
        source = source_of(ctx, name)
        changed = source != "DEFAULT_MAP" or ctx.params.get(name) != parameter.default
        if source != "DEFAULT" and changed:
            chosen.add(name)
    return chosen


def _as_yaml(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_as_yaml(item) for item in value] if isinstance(value, (list, tuple)) else value
