"""Triton's interpreter without work that these tests do not need, which is more than half of its time."""

import functools
import inspect
from dataclasses import replace
from typing import Any


def hasten_interpreter() -> None:
    """Leaves out a second, 64-bit computation of every integer, and looks once for the names that the interpreter
    replaces: not at every call of a function, and not in a function that another one calls.

    No test's tensors reach 32 bits but those of test_offsets.py, which looks at the result itself.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    _remember_types(tl.core, interpreter)
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

    @functools.cache
    def modules(function: Any) -> list[Any]:
        return [module for module in (tl, tl.core) if any(value is module for value in function.__globals__.values())]

    def patch_lang(function: Any) -> Any:
        # The caller has patched it if no function is Triton's own any more.
        is_done = not any(tl.core.is_builtin(module.load) for module in modules(function))
        return interpreter._LangPatchScope() if is_done else patch_all(function)

    patch_all = interpreter._patch_lang
    interpreter._patch_builtin, interpreter._patch_lang = patch_builtin, patch_lang


def _remember_types(core: Any, interpreter: Any) -> None:
    """Looks up what the interpreter works out for every value: its type's text and sizes, and numpy's type."""
    new_block, find_dtype = core.block_type.__init__, interpreter._get_np_dtype
    blocks: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
    shapes: dict[str, tuple[Any, Any]] = {}
    dtypes: dict[str, Any] = {}

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, tuple([getattr(size, "value", size) for size in shape])
        if key not in blocks:
            new_block(self, element_ty, shape)
            blocks[key] = vars(self).copy()
        vars(self).update(blocks[key])

    def tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name not in shapes:
            new_tensor(self, handle, type)
            shapes[type.name] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[type.name]

    def np_dtype(type: Any) -> Any:
        if type.name not in dtypes:
            dtypes[type.name] = find_dtype(type)
        return dtypes[type.name]

    new_tensor = core.tensor.__init__
    core.block_type.__init__, core.tensor.__init__, interpreter._get_np_dtype = block, tensor, np_dtype
