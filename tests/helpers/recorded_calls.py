"""Records which of PyTorch's operators are called, those that others call included."""

from collections.abc import Callable

import pytest
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity, profile


def recorded_calls(function: Callable[[], object]) -> EventList:
    """Calls ``function`` -> its calls of operators, with the shapes of their inputs."""
    with pytest.MonkeyPatch.context() as patch:
        # The profiler reads it once in a process; otherwise it would print lines of its own, in later tests too.
        patch.setenv("KINETO_LOG_LEVEL", "6")
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
            function()
    return found.events()
