"""Tells whether the Hugging Face hub can be reached, and keeps huggingface_hub from trying where it cannot."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants

TIMEOUT = 5.0  # seconds


def hub_answers() -> bool:
    """Tells whether the hub answers one request within a short timeout."""
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception:  # of requests, httpx or whatever huggingface_hub is built on
        return False
    return True


@contextmanager
def hub_offline(offline: bool) -> Iterator[None]:
    """Restricts huggingface_hub to its cache in the block, if ``offline``."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
