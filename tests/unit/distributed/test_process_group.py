"""Tests how processes find each other, what they say when they do not, and who of them speaks."""

import os
import re
import socket
from collections.abc import Callable, Sequence

import pytest
import torch

from fastmsflow import InputError, UnavailableError, __main__
from fastmsflow.distributed import process_group
from fastmsflow.distributed.process_group import (
    RANK_VARIABLES,
    ErrorOnAnotherRank,
    PeerLost,
    ProcessGroup,
    is_peer_lost,
)

TEXTS = (
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:2783",
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:446] Read error [127.0.0.1]:2783: Connection reset by peer",
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:241] writev [127.0.0.1]:2783: Broken pipe",
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
)


@pytest.mark.parametrize("text", TEXTS)
def test_a_connection_that_broke_is_known(text: str) -> None:
    assert is_peer_lost(RuntimeError(text)) and is_peer_lost(torch.distributed.DistBackendError(text))


@pytest.mark.parametrize(
    "error",
    [
        BrokenPipeError(32, "Broken pipe"),
        RuntimeError("CUDA out of memory"),
        InputError("Broken pipe"),
        ErrorOnAnotherRank("x"),
    ],
)
def test_an_error_of_its_own_is_not_taken_for_one(error: Exception) -> None:
    assert not is_peer_lost(error)


@pytest.mark.parametrize("rank", [0, 1])
def test_more_processes_than_gpus_are_one_line_in_each_of_them(rank: int, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="2 processes, but this machine has 1 GPUs; start as many"):
        ProcessGroup(rank, 2, rank, 2).join()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(InputError, match="2 processes, but this machine has 1 GPUs; start as many"):
        ProcessGroup(rank, 2, rank, 2).join_apart()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    with pytest.raises(InputError, match="2 processes, but CUDA_VISIBLE_DEVICES names 1 GPUs; start as many"):
        ProcessGroup(rank, 2, rank, 2).join_apart()


@pytest.mark.parametrize(
    ("host", "port", "line"),
    [
        (None, "29400", "set MASTER_ADDR to its address"),
        ("localhost", "abc", "MASTER_PORT is 'abc'; it must be a number from 1 to 65535"),
        ("localhost", "70000", "MASTER_PORT is '70000'; it must be a number from 1 to 65535"),
        ("no-such-machine.invalid", "29400", "MASTER_ADDR is 'no-such-machine.invalid', and no machine is known"),
    ],
)
def test_where_to_meet_is_checked_before_anyone_waits(host: str | None, port: str, line: str, monkeypatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    if host is not None:
        monkeypatch.setenv("MASTER_ADDR", host)
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(InputError, match=line):
        ProcessGroup(0, 2, 0, 1).join()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_waits_in_vain_says_for_what(rank: int, monkeypatch) -> None:
    monkeypatch.setattr(process_group, "JOIN_TIMEOUT", 1)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**dict(zip(RANK_VARIABLES, (str(rank), "2", "0", "1"), strict=True)), "MASTER_ADDR": "localhost"}
    for name, value in {**environment, "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"2 processes did not meet at localhost:{port} within 1 s") as told:
        ProcessGroup.here().join()
    assert "\n" not in str(told.value)


@pytest.fixture
def end(monkeypatch) -> Callable[[Exception], object]:
    """Returns what ``main`` exits with after an error in the process of this local rank."""

    def of(error: Exception, local_rank: int = 0, joined: bool = False, met: bool = False) -> object:
        def fail() -> None:
            raise error

        def leave(code: int) -> None:
            raise Left(code)

        monkeypatch.setattr("fastmsflow.cli.app", fail)
        monkeypatch.setattr(__main__, "_joined", lambda: joined)
        monkeypatch.setattr(__main__, "has_joined", lambda: joined or met)
        monkeypatch.setattr(__main__, "SILENT_SECONDS", 0)
        monkeypatch.setattr(os, "_exit", leave)
        monkeypatch.setenv("RANK", str(local_rank + 2))
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        with pytest.raises((SystemExit, Left)) as ended:
            __main__.main()
        return ended.value.args[0]

    return of


class Left(BaseException):
    """In place of the process's end."""


@pytest.mark.parametrize("error", [InputError("no"), UnavailableError("no")])
def test_before_they_have_joined_one_process_a_machine_speaks(error: Exception, end) -> None:
    assert end(error, local_rank=0) == "fastmsflow: process 2: no"
    assert end(error, local_rank=1) == 1
    # What happens to one of them alone is told by that one.
    assert end(OSError("no"), local_rank=1) == "fastmsflow: process 3: no"
    assert end(error, local_rank=1, met=True) == "fastmsflow: process 3: no"


def test_processes_that_have_joined_leave_without_waiting_for_each_other(end, capsys) -> None:
    assert end(InputError("no"), local_rank=1, joined=True) == 1
    assert capsys.readouterr().err == "fastmsflow: process 3: no\n"
    assert end(ErrorOnAnotherRank("no"), local_rank=1, joined=True) == 1
    assert capsys.readouterr().err == ""
    assert end(ZeroDivisionError("no"), local_rank=1, joined=True) == 1
    assert capsys.readouterr().err.endswith("ZeroDivisionError: no\n")


@pytest.mark.parametrize("error", [PeerLost(TEXTS[0]), RuntimeError(TEXTS[1])])
def test_a_process_whose_others_have_gone_silently_says_so_in_one_line(error: Exception, end, capsys) -> None:
    assert end(error, joined=True) == 1
    said = capsys.readouterr().err
    assert said.startswith("fastmsflow: process 2: another process has gone (") and said.count("\n") == 1


@pytest.mark.parametrize(
    "values", ["0001", "0-101", "5101", "-1101", "0191", "0100", ("0", "9" * 20, "0", "1"), "0102"]
)
def test_an_environment_that_contradicts_itself_is_one_line(
    values: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = values if isinstance(values, tuple) else re.findall(r"-?\d", str(values))
    for name, value in zip(RANK_VARIABLES, given, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"the environment says RANK={given[0]}, WORLD_SIZE={given[1]}, .*; a rank is"):
        ProcessGroup.here()
