"""What holds for every test."""

import os

import pytest
import torch

# Read when a kernel is decorated, so set before: without a GPU the kernels run in Triton's interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small tensors gain nothing from more, and on a shared machine waiting for each other costs them seconds."""
    torch.set_num_threads(1)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills every new buffer with NaN, so that what a kernel leaves unwritten shows."""
    empty = torch.empty

    def nan(*args, **kwargs):
        buffer = empty(*args, **kwargs)
        return buffer.fill_(float("nan")) if buffer.is_floating_point() else buffer

    monkeypatch.setattr(torch, "empty", nan)
