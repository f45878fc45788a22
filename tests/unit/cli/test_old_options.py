"""Option names of version 0.1: they work in the command line and in files, and the help does not show them."""

from pathlib import Path

import pytest
import yaml

from fastmsflow.cli.options import OLD_SPELLINGS
from fastmsflow.files import write_yaml

# Old name -> a value, and the field of the settings that it sets.
TRAIN = {
    "--memory": ("recompute", "memory", "recompute"),
    "--accumulate": (4, "accumulate", 4),
    "--warm-up": (5, "warm_up", 5),
    "--warm-up-share": (0.2, "warm_up_share", 0.2),
    "--lr-of": ("fusion=1e-05", "lr_of", {"fusion": 1e-5}),
    "--skip-faults": ("faults.jsonl", "skip_faults", Path("faults.jsonl")),
}


@pytest.fixture
def job_of(command, monkeypatch):
    """Runs `train` as far as its job -> the job."""
    jobs = []
    monkeypatch.setattr("fastmsflow.cli.train.train_one", lambda job, group: jobs.append(job))

    def run(*args: object):
        assert command("train", "data", "--out", "run", *args) == (0, "")
        return jobs[-1]

    return run


def setting(job, name: str) -> object:
    return getattr(job.recipe, name) if hasattr(job.recipe, name) else getattr(job.data, name)


def test_every_old_name_is_tested() -> None:
    assert {*TRAIN, "--most"} == set(OLD_SPELLINGS)


@pytest.mark.parametrize("old", TRAIN)
def test_both_names_set_the_same_in_the_command_line_and_in_a_file(old: str, job_of, tmp_path: Path) -> None:
    value, name, expected = TRAIN[old]
    new = OLD_SPELLINGS[old]
    options = []
    for spelling in (old, new):
        key = spelling.lstrip("-")
        content = {key: [value] if old == "--lr-of" else value}
        for file_key in (key, key.replace("-", "_")):
            (tmp_path / "c.yaml").write_text(yaml.safe_dump({file_key: content[key]}))
            assert setting(job_of("--config", tmp_path / "c.yaml"), name) == expected
        assert setting(job_of(f"{spelling}={value}"), name) == expected
        job = job_of(spelling, value)
        assert setting(job, name) == expected
        options.append(job.options)
    # A run writes the old name, which earlier versions read as well.
    assert options[0] == options[1]
    assert old.lstrip("-") in options[0] and new.lstrip("-") not in options[0]
    write_yaml(tmp_path / "config.yaml", options[0])
    assert setting(job_of("--config", tmp_path / "config.yaml"), name) == expected


def test_a_file_with_both_names_of_an_option_is_refused(command, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("accumulate: 2\naccumulate-grad-batches: 4\n")
    code, text = command("train", "data", "--out", tmp_path / "run", "--config", tmp_path / "c.yaml")
    assert code == 1
    assert "'accumulate-grad-batches' is another spelling of an option in this file; leave one out" in text


def test_the_old_name_of_verifys_limit_works(command, monkeypatch, tmp_path: Path) -> None:
    given = []

    def stop(*_: object, max_images: int, **__: object) -> None:
        given.append(max_images)
        raise ZeroDivisionError

    monkeypatch.setattr("fastmsflow.compat.verify.to_verify", stop)
    (tmp_path / "c.yaml").write_text("most: 3\n")
    for args in (("--most", 3), ("--max-images", 3), ("--config", tmp_path / "c.yaml")):
        with pytest.raises(ZeroDivisionError):
            command("verify", "model.safetensors", *args)
    assert given == [3, 3, 3]


@pytest.mark.parametrize("verb", ["train", "verify"])
def test_the_help_shows_no_old_name(verb: str, command) -> None:
    code, text = command(verb, "--help")
    words = {word.strip(".,;:()") for word in text.split()}
    assert code == 0
    assert not words & set(OLD_SPELLINGS)


def test_what_stands_behind_two_dashes_is_no_option(command, tmp_path: Path) -> None:
    code, text = command("train", "--out", tmp_path / "run", "--", "--memory")
    assert code == 1 and "--memory" in text


def test_every_field_of_the_settings_is_an_option_in_a_panel(command) -> None:
    code, text = command("train", "--help")
    panels = [line.split("─ ")[1].split(" ─")[0] for line in text.splitlines() if line.startswith("╭─ ")]
    assert code == 0
    assert panels == [
        "Arguments", "Data", "Model", "Optimization", "Memory and speed", "Validation", "Output and resume",
        "Distributed", "Advanced",
    ]  # fmt: skip
