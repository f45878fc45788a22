"""JSON of strangers: a value of another type than is written there is one line that names its key."""

from typing import Annotated, Any, Literal, TypedDict

import pytest

from fastmsflow import InputError
from fastmsflow.schema import Within, read_json


class Part(TypedDict, total=False):
    note: str | None
    free: dict[str, Any]


class Whole(Part):
    size: Annotated[list[Annotated[int, Within(1, 99)]], Within(2, 2)]
    rate: Annotated[float, Within(0)]
    kind: Literal["a", "b"]
    on: bool
    parts: list[Part]


GOOD = '{"size": [1, 2], "rate": 1, "kind": "a", "on": true, "parts": [{"note": null}], "more": 1}'


def read(content: str | bytes) -> Any:
    return read_json(content, Whole, "x.json: no whole", "write it again")


def test_what_is_as_written_is_read_and_numbers_become_floats() -> None:
    assert read(GOOD) == {
        "size": [1, 2], "rate": 1.0, "kind": "a", "on": True, "parts": [{"note": None}], "more": 1
    }  # fmt: skip
    assert type(read(GOOD)["rate"]) is float


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("[1, 2]", "5", "size is 5, not a list"),
        ("[1, 2]", "[1]", "size is a list of 1, not a list of 2 to 2"),
        ("[1, 2]", "[1, 100]", r"size\[1\] is 100, not a whole number of 1 to 99"),
        ("[1, 2]", "[1, true]", r"size\[1\] is True, not a whole number"),
        ("[1, 2]", "[1, 2.0]", r"size\[1\] is 2.0, not a whole number"),
        ("1,", "-1,", r"size\[0\] is -1"),
        ('"rate": 1', '"rate": NaN', "rate is nan, not a number within bounds"),
        ('"rate": 1', '"rate": 1e999', "rate is inf, not a number within bounds"),
        ('"rate": 1', f'"rate": 1{"0" * 400}', r"rate is 1000.*\(401 characters\), not a number"),
        ('"rate": 1', f'"rate": {"9" * 5000}', "not JSON: Exceeds the limit"),
        ('"rate": 1', '"rate": false', "rate is False, not a number"),
        ('"a"', '"c"', "kind is 'c', not one of a, b"),
        ('"a"', '"\\ud800"', r"kind is '\\ud800', not one of"),
        ('"a"', "{}", "kind is an object, not one of"),
        ("true", "1", "on is 1, not true or false"),
        ("null", "[]", r"parts\[0\].note is a list of 0, not text"),
        ('{"note": null}', "7", r"parts\[0\] is 7, not an object"),
        ('"rate": 1,', "", "rate is missing"),
        (GOOD, "[]", "it is a list of 0, not an object"),
        (GOOD, "{", "not JSON: Expecting property name"),
        (GOOD, "[" * 100_000, "not JSON: maximum recursion depth"),
        ('"more"', '"free": [1], "more"', "free is a list of 1, not an object"),
    ],
)
def test_what_is_of_another_type_is_one_line_with_its_key(before: str, after: str, message: str) -> None:
    changed = GOOD.replace(before, after, 1)
    assert changed != GOOD
    with pytest.raises(InputError, match=rf"^x\.json: no whole \(.*{message}.*\); write it again$"):
        read(changed)


def test_bytes_that_are_no_text_are_named() -> None:
    with pytest.raises(InputError, match="not JSON: 'utf-8' codec"):
        read(b'{"a": "\xff"}')


def test_a_value_and_a_message_of_ten_megabytes_are_cut() -> None:
    with pytest.raises(InputError) as caught:
        read(GOOD.replace('"a"', f'"{"x" * 10_000_000}"'))
    assert len(str(caught.value)) < 300
    error = InputError("y" * 10_000_000)
    assert len(str(error)) < 5000 and "(10000000 characters)" in str(error)
    # An error that goes from process to process is made again.
    assert str(InputError(str(error))) == str(error)


def test_a_key_that_is_there_twice_is_refused_at_any_depth() -> None:
    for content in (f'{GOOD[:-1]}, "rate": 2}}', GOOD.replace('"note": null', '"note": null, "note": "x"')):
        with pytest.raises(InputError, match=r"x\.json: no whole \(not JSON: '(rate|note)' is there twice\); write"):
            read(content)
