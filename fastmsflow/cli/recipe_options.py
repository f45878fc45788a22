"""Options of ``train`` built from the fields of Recipe and DataConfig: a new field there is a new option here."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, replace
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from ..errors import InputError
from ..recipe import DataConfig, Recipe
from .options import PANELS, option

Command = TypeVar("Command", bound=Callable[..., None])
Settings = TypeVar("Settings", Recipe, DataConfig)


def with_options_of(
    *classes: type, defaults: Mapping[str, Any], only: Sequence[str] | None = None
) -> Callable[[Command], Command]:
    """Replaces the ``**`` parameter of a command by an option for each field of the dataclasses ``classes``.

    ``defaults``: defaults of the command that differ from the dataclass's, by field; ``only``: the fields that become
    options, None for all of them.
    """

    def decorate(command: Command) -> Command:
        own = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in inspect.signature(command).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        chosen = [(cls, field) for cls in classes for field in fields(cls) if only is None or field.name in only]
        built = [_parameter(cls, field, defaults) for cls, field in chosen]
        set_parameters(command, sorted([*own, *built], key=_panel_number))
        return command

    return decorate


def set_parameters(command: Callable[..., None], parameters: Sequence[inspect.Parameter]) -> None:
    """Makes typer build the options of ``command`` from ``parameters``."""
    setattr(command, "__signature__", inspect.Signature(parameters))  # noqa: B010 - no such attribute
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


def _panel_number(parameter: inspect.Parameter) -> int:
    """Returns the place of a parameter's panel in the help, which shows panels in the order of their parameters."""
    infos = get_args(parameter.annotation)
    panel = next((info.rich_help_panel for info in infos if hasattr(info, "rich_help_panel")), None)
    return -1 if panel is None else PANELS.index(panel)


def option_name(field: "Field[Any]") -> str:
    """Returns the parameter of the command line for a field."""
    return field.metadata.get("name", field.name)


def settings_from(cls: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Returns the dataclass ``cls`` with the values of its options.

    Raises: InputError, which names options and not fields, if ``cls`` refuses a value.
    """
    annotations = get_type_hints(cls)
    try:
        return cls(**{f.name: _field_value(annotations[f.name], values[option_name(f)]) for f in fields(cls)})
    except InputError as error:
        options = {f.name: _option(f) for f in fields(cls) if option_name(f) != f.name}
        raise InputError(re.sub(r"\w+", lambda word: options.get(word[0], word[0]), str(error))) from error


def _parameter(cls: type, field: "Field[Any]", defaults: Mapping[str, Any]) -> inspect.Parameter:
    annotation = field.metadata.get("type", get_type_hints(cls)[field.name])
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    default = defaults.get(field.name, default)
    name = option_name(field)
    if get_origin(annotation) is Mapping:
        annotation, default = list[str], []
    elif get_origin(annotation) is tuple:
        annotation, default = list[get_args(annotation)[0]], list(default)  # type: ignore[misc]
    numbers = field.metadata["range"]
    if numbers is not None and annotation is float:
        # A share that is given in the place of a warm-up's passes has an error of its own.
        numbers = replace(numbers, is_whole=False)
    described = option(
        field.metadata["panel"],
        field.metadata["help"],
        _option(field),
        range=numbers,
        metavar=field.metadata.get("metavar"),
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, described]
    )


def _option(field: "Field[Any]") -> str:
    return f"--{option_name(field).replace('_', '-')}"


def _field_value(annotation: Any, value: Any) -> Any:
    if get_origin(annotation) is Mapping:
        return part_rates(value)
    return tuple(value) if get_origin(annotation) is tuple else value


def part_rates(assignments: Sequence[str]) -> dict[str, float]:
    """Parses ``PART=RATE`` texts. Raises: InputError if one has another form, or a part comes twice."""
    rates: dict[str, float] = {}
    for text in assignments:
        part, _, rate = text.partition("=")
        if part in rates:
            raise InputError(f"--part-lr {text}: {part} has the rate {rates[part]} already; give one of the two")
        try:
            rates[part] = float(rate)
        except ValueError as error:
            raise InputError(f"--part-lr {text}: give PART=RATE, e.g. fusion=1e-5") from error
    return rates
