"""PyTorch's compiler, Inductor: asks for the C++ compiler that it needs, and tells its errors in one line."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import fx

from .errors import UnavailableError


def check_cpp_compiler() -> None:
    """Raises UnavailableError if Inductor finds no C++ compiler."""
    # The import takes a second.
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UnavailableError(
            "torch.compile needs a C++ compiler, and there is none: install g++ or set CXX to another, or leave"
            " compile=True out"
        ) from error


@contextmanager
def compiler_errors() -> Iterator[None]:
    """Turns an error of Inductor in the block into an UnavailableError."""
    # The import takes a second.
    from torch._inductor.exc import InductorError

    try:
        yield
    except InductorError as error:
        why = str(error).partition("\n")[0]
        raise UnavailableError(
            f"torch's compiler failed ({why}); it needs a C++ compiler, and free space in {tempfile.gettempdir()}"
        ) from error


def protect_constants(graph: fx.Graph) -> None:
    """Keeps Inductor from adding a convolution into a frozen constant, of which the next call takes the sum.

    torch 2.14 does so where both have one shape: at batch 1, with a condition's map. A view is not added into.
    """
    for constant in graph.find_nodes(op="get_attr"):
        for user in list(constant.users):
            if user.target is torch.ops.aten.add.Tensor and user.meta["val"].shape == constant.meta["val"].shape:
                with graph.inserting_before(user):
                    dims = list(range(user.meta["val"].dim()))
                    view = graph.call_function(torch.ops.aten.permute.default, (constant, dims))
                view.meta["val"] = constant.meta["val"]
                user.replace_input_with(constant, view)
