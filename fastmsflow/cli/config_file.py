"""Options of a verb from a YAML file (``--config``), and the options of a run as such a file."""

import difflib
import inspect
import re
import unicodedata
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
import yaml

from ..errors import InputError, cut
from ..files import shown
from ..readable_file import check_file
from .options import OLD_SPELLINGS, OUTPUT, SEPARATORS, Command, new_spelling, option

# Options of one call, which no saved configuration holds.
CALL_ONLY = frozenset({"config", "quiet", "as_json", "resume"})
FILE_KEYS = {new.lstrip("-"): old.lstrip("-") for old, new in OLD_SPELLINGS.items()}
"""Option name -> its name in the files that runs write, which every version reads."""
MOST_BYTES = 2**20
"""The size in bytes of the largest file that is read."""
LONGEST = 4096
"""The length of the longest text; no path is longer."""
ONE_A_LINE = "give one 'option: value' a line"
INT, FLOAT, TIMESTAMP = (f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp"))


class ConfigurableCommand(Command):
    """A verb whose options a file may hold, but for commands to run and places in the network."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the verb. Raises: InputError if the file, and not the command line, names such a place."""
        for name, value in (ctx.default_map or {}).items():
            texts = value if isinstance(value, list) else [value]
            place = next((text for text in texts if isinstance(text, str) and _is_remote(text)), None)
            if place is not None and source_of(ctx, name) == "DEFAULT_MAP":
                raise InputError(
                    f"{shown(ctx.params['config'])}: {name} is {shown(cut(place))}, and files that people hand on may"
                    " name no commands and no URLs; give it on the command line"
                )
        return super().invoke(ctx)


def _is_remote(text: str) -> bool:
    return "://" in text or text.strip().lower().startswith("pipe:")


def _read(ctx: typer.Context, path: Path | None) -> Path | None:
    """Makes the file's values the defaults of the verb's options; the command line overrides them.

    Raises: InputError if the file is no mapping of the verb's options, with the nearest name for a misspelt one, or a
    value is none of its option.
    """
    if path is None:
        return None
    parameters = [p for p in ctx.command.params if p.name != "config"]
    # Options may have another name in the command line than the function's parameter has.
    parameter_of = {option.lstrip("-").replace("-", "_"): p for p in parameters for option in p.opts}
    named = {str(p.name): p for p in parameters}
    values: dict[str, Any] = {}
    for key, value in _load(path).items():
        option = new_spelling(key.replace("_", "-")).replace("-", "_")
        parameter = parameter_of.get(option) or named.get(option)
        if parameter is None:
            close = difflib.get_close_matches(cut(option), parameter_of, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(sorted(parameter_of))}"
            raise InputError(f"{path}: {ctx.info_name} has no option {cut(key)!r}{hint}")
        name = str(parameter.name)
        if name in values:
            raise InputError(f"{path}: {key!r} is another spelling of an option in this file; leave one out")
        if isinstance(value, list) and name in SEPARATORS:
            value = SEPARATORS[name].join(map(str, value))
        if value is not None:
            _check(ctx, path, parameter, value)
        values[name] = value
    ctx.default_map = {**(ctx.default_map or {}), **values}
    return path


def _check(ctx: typer.Context, path: Path, parameter: Any, value: Any) -> None:
    """Raises: InputError if ``value`` is none of the option or argument ``parameter``."""
    key, kind = parameter.opts[0].lstrip("-"), _number_kind(ctx, str(parameter.name))
    for item in value if isinstance(value, list) else [value]:
        # typer would make 2 of 2.5, and 1 of true.
        if (kind and isinstance(item, bool)) or (kind is int and isinstance(item, float)):
            raise InputError(f"{path}: {key} is {item!r}; it must be a {'whole ' if kind is int else ''}number")
    many = parameter.multiple if hasattr(parameter, "multiple") else parameter.nargs != 1
    fault = None
    if isinstance(value, list) != (many or parameter.nargs != 1):
        fault = "give a list" if many else "give one value, not a list"
    elif isinstance(value, bool) != bool(getattr(parameter, "is_flag", False)) and parameter.name not in SEPARATORS:
        fault = "give true or false" if parameter.is_flag else "YAML reads this as true or false; put it in quotes"
    else:
        try:
            parameter.process_value(ctx, value)
        except Exception as error:  # each type of option has its own
            fault = str(getattr(error, "message", error))
    if fault is not None:
        given = shown(cut(str(value)))
        raise InputError(f"{path}: {key} is {given}: {' '.join(fault.split())}")


def _load(path: Path) -> dict[str, Any]:
    """Returns the file's options: texts, numbers, true, false, nothing, or lists of these.

    Raises: InputError if it holds anything else, an option twice, or a number that is another one in YAML 1.1.
    """
    check_file(path, ONE_A_LINE)
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise InputError(f"{path}: larger than {MOST_BYTES / 2**20:g} MiB; {ONE_A_LINE}")
        text = content.decode()
        _refuse_structure(path, text)
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            kind = "a list" if isinstance(node, yaml.SequenceNode) else "no options"
            raise InputError(f"{path}: holds {kind}; {ONE_A_LINE}")
        result: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise InputError(f"{path}: line {key.start_mark.line + 1}: no option's name; {ONE_A_LINE}")
            if key.value in result:
                raise InputError(f"{path}: {cut(key.value)!r} is there twice; leave one out")
            for item in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                _refuse_other_reading(path, item)
            result[key.value] = loader.construct_object(value, deep=True)
        return result
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {ONE_A_LINE}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML ({cut(' '.join(str(error).split()))})") from error


def _refuse_structure(path: Path, text: str) -> None:
    """Raises: InputError for what no option is: a few bytes of it may grow without end, or nest too deep to be read."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        fault = None
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            fault = "anchors and aliases"
        elif getattr(event, "tag", None) is not None:
            fault = "tags"
        elif depth > 2 or (depth > 1 and isinstance(event, yaml.MappingStartEvent)):
            fault = "values within values"
        if fault is not None:
            line = event.start_mark.line + 1 if event.start_mark is not None else 1
            raise InputError(f"{path}: line {line}: {fault} are not taken; {ONE_A_LINE}")


def _refuse_other_reading(path: Path, node: Any) -> None:
    """Raises: InputError for a text without quotes that YAML 1.1 takes for another number, or for a date."""
    text = str(node.value)
    if len(text) > LONGEST or any(unicodedata.category(c) == "Cc" for c in text):
        raise InputError(
            f"{path}: line {node.start_mark.line + 1}: {shown(cut(text))} is longer than {LONGEST} characters, or holds"
            " control characters; no option does"
        )
    number = {INT: r"[-+]?(0|[1-9][0-9]*)", FLOAT: r"[^:_]*", TIMESTAMP: r"(?!)"}.get(node.tag)
    if number is not None and not re.fullmatch(number, text):
        raise InputError(
            f"{path}: line {node.start_mark.line + 1}: YAML reads {cut(text)} as another number, or as a date; put it"
            " in quotes, or write the number in decimal digits"
        )
    if node.tag == INT and len(text) > 20:
        raise InputError(f"{path}: line {node.start_mark.line + 1}: {cut(text)} is too large for any option")


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
