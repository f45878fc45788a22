"""What holds for every test."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small tensors gain nothing from more, and on a shared machine waiting for each other costs them seconds."""
    torch.set_num_threads(1)
