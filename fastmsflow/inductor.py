"""PyTorch's compiler, Inductor: asks for the C++ compiler that it needs, and tells its errors in one line."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

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
