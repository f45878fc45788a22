"""Triton's interpreter without work that these tests do not need, which is about half of its time."""

import inspect
from dataclasses import replace
from typing import Any


def hasten_interpreter() -> None:
    """Leaves out a second, 64-bit computation of every integer, and looks once for the names that the interpreter
    replaces, not at every call of a function.

    No test's tensors reach 32 bits but those of test_offsets.py, which looks at the result itself.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    if not (hasattr(interpreter, "_patch_attr") and hasattr(interpreter, "_LangPatchScope")):
        return
    places = (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base)
    found = {place: [n for n, value in inspect.getmembers(place) if tl.core.is_builtin(value)] for place in places}

    def patch_builtin(place: Any, builder: Any, scope: Any) -> None:
        for name in found[place]:
            member = getattr(place, name)
            # A function that has been replaced is no longer Triton's own.
            if tl.core.is_builtin(member):
                interpreter._patch_attr(place, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin
