"""Every number that an option takes: the help says its range, and the command line, a file and Python refuse others."""

import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
from typer.main import get_command

from fastmsflow import InputError
from fastmsflow.cli import app
from fastmsflow.recipe import DataConfig, Recipe

VERBS: dict[str, Any] = get_command(app).commands
# An option whose numbers stand behind the names of parts.
PART_RATES = "part_lr"
RANGE = re.compile(r"Range: (.*)\.$")


def kinds_of(command: Any, name: str) -> set[type]:
    annotation = get_args(inspect.signature(command.callback).parameters[name].annotation)[0]
    return {annotation, *get_args(annotation)}


def options() -> list[Any]:
    return [
        pytest.param(verb, parameter, int in kinds_of(command, parameter.name), id=f"{verb} {parameter.opts[0]}")
        for verb, command in VERBS.items()
        for parameter in command.params
        if kinds_of(command, parameter.name) & {int, float} or parameter.name == PART_RATES
    ]


def outside(text: str, is_whole: bool) -> list[str]:
    """The numbers just beyond a range as the help says it, and those that no option takes."""
    step = 1 if is_whole else 1e-6
    wrong = ["nan", "inf", "-inf"] if not is_whole else [str(10**30), str(-(10**30))]
    numbers = [float(number) for number in re.findall(r"\d[\d.e+]*", text)]
    for number, below, above in (
        (numbers[:1], not text.startswith("above"), text.startswith("above")),
        (numbers[1:], "below" in text, "below" not in text),
    ):
        for bound in number:
            is_low = bound == numbers[0] and number == numbers[:1]
            past = bound - step if is_low else bound + step
            wrong.append(f"{past:.16g}")
            if (is_low and above) or (not is_low and below):
                wrong.append(f"{bound:.10g}")
    return wrong


@pytest.mark.parametrize(("verb", "parameter", "is_whole"), options())
def test_a_number_has_a_range_in_the_help_and_one_out_of_it_is_refused_in_one_line(
    verb: str, parameter: Any, is_whole: bool, command
) -> None:
    found = RANGE.search(parameter.help)
    assert found, f"the help of {verb} {parameter.opts[0]} says no range"
    for number in outside(found[1], is_whole):
        value = f"fusion={number}" if parameter.name == PART_RATES else number
        given = f"{parameter.opts[0]}={value}"
        names = ["x"] if verb == "train" else ["x", "y"]
        code, printed = command(verb, *names, given, *(["--out", "z"] if verb in ("train", "shard") else []))
        assert (code, len(printed.splitlines())) == (1, 1), (given, printed)
        assert printed.startswith(f"fastmsflow: {parameter.opts[0]}") and "it must be" in printed, printed


def test_a_range_is_asked_for_of_numbers_of_every_verb_that_has_some() -> None:
    assert {param.values[0] for param in options()} >= {
        "demo", "train", "evaluate", "calibrate", "predict", "shard", "convert", "verify", "benchmark",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "refusal"),
    [
        ("workers: -1", "--workers is -1; it must be a whole number, 0 to 1024"),
        ("workers: true", "config.yaml: workers is True; it must be a whole number"),
        ("batch-size: 2.5", "config.yaml: batch-size is 2.5; it must be a whole number"),
        ("batch-size: 0", "--batch-size is 0; it must be a whole number, 1 or more"),
        ("image-size: 0", "--image-size is 0; it must be a whole number, 32 to 65536"),
        ("lr: .nan", "--lr is nan; it must be above 0"),
        ("lr: .inf", "--lr is inf; it must be above 0"),
        ("lr: true", "config.yaml: lr is True; it must be a number"),
        ("milestones: [0.5, 1.5]", "--milestones is 1.5; it must be from 0 to 1"),
        ("milestones: [true]", "config.yaml: milestones is True; it must be a number"),
        ("ema: 0", "--ema is 0.0; it must be above 0, below 1"),
        ("lr-of: [fusion=inf]", "--part-lr fusion is inf; it must be above 0"),
    ],
)
def test_a_file_is_held_to_the_same_ranges(line: str, refusal: str, tmp_path: Path, command) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"{line}\n")
    code, printed = command("train", "nowhere", "--out", tmp_path / "out", "--config", file)
    assert (code, len(printed.splitlines())) == (1, 1), printed
    assert refusal in printed


WRONG = (float("nan"), float("inf"), float("-inf"), True, "1", -1, 10**400)


@pytest.mark.parametrize(
    ("settings", "name"),
    [(cls, field.name) for cls in (Recipe, DataConfig) for field in fields(cls) if field.metadata["range"] is not None],
)
@pytest.mark.parametrize("number", WRONG, ids=[str(number)[:8] for number in WRONG])
def test_python_is_held_to_the_same_ranges(settings: type, name: str, number: object) -> None:
    value = {"milestones": (number,), "lr_of": {"fusion": number}}.get(name, number)
    with pytest.raises(InputError) as raised:
        settings(**{name: value})
    assert str(raised.value).startswith(name) and len(str(raised.value)) < 200


def test_every_number_of_a_run_has_a_range() -> None:
    kinds = {cls: {field.name: str(field.type) for field in fields(cls)} for cls in (Recipe, DataConfig)}
    ranged = {cls: {field.name for field in fields(cls) if field.metadata["range"] is not None} for cls in kinds}
    for cls, types in kinds.items():
        assert {name for name, kind in types.items() if re.search(r"int\b|float\b", kind)} == ranged[cls]
