"""Reads files of tensors so that nothing in them runs, and compares state dicts."""

import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from .errors import InputError, cut, first_few
from .quiet import QuietThread

# torch warns of a file's pickle protocol, of sparse and of quantized tensors; all of it is checked, or refused, here.
_QUIET = QuietThread()

# The names of permutations in state dicts of ours.
PERMUTATION = re.compile(r"(.*\.)?perm\d*")


def load_pickled(path: str | Path, mapped: bool = False) -> Any:
    """Loads a file by ``torch.load`` onto the CPU with weights_only=True, so that nothing in the file can run.

    ``mapped``: tensors stay in the file, which must not change while they are used.

    Raises: InputError if the file is compressed, as torch.save writes none: it may hold more than the memory; and
    whatever torch does, whose message advises to trust the file.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        stored = sum(member.file_size for member in members)
        if any(member.compress_type != zipfile.ZIP_STORED for member in members) or stored > Path(path).stat().st_size:
            raise InputError(f"{path}: compressed, which torch.save's files are not; save it again by torch.save")
    with _QUIET:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def is_state_dict(value: object) -> TypeGuard[dict[str, Tensor]]:
    """Tells whether ``value`` is names of tensors."""
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def refuse_views(path: str | Path, tensors: Iterable[Tensor]) -> None:
    """Checks that ``tensors`` of a pickled file are plain ones with values of their own.

    A view of one number can have any shape, and a model of that shape would fill the memory.
    Raises: InputError if they are not.
    """
    needed, stored = 0, dict[int, int]()
    for tensor in tensors:
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise InputError(f"{path}: holds a tensor that is not dense; save plain tensors")
        needed += tensor.numel() * tensor.element_size()
        storage = tensor.untyped_storage()
        stored[storage.data_ptr()] = storage.nbytes()
    # A permutation and its inverse may be two views of one matrix.
    held = sum(stored.values())
    if needed > 2 * held:
        raise InputError(f"{path}: its tensors have {needed} bytes, and the file holds {held}; save plain tensors")


def number_of_blocks(keys: Iterable[str], prefix: str) -> int:
    """Returns how many numbers follow ``prefix`` in ``keys``; the numbers themselves are not believed."""
    return len({key[len(prefix) :].partition(".")[0] for key in keys if key.startswith(prefix)})


def refuse_other_permutations(path: str | Path, state: Mapping[str, Tensor]) -> None:
    """Checks that the permutations in a state dict of ours are some: a kernel reads wherever they point to.

    Raises: InputError, naming the key, if one is none.
    """
    for key, perm in state.items():
        if PERMUTATION.fullmatch(key) and not is_permutation(perm):
            raise InputError(f"{path}: {cut(key)} is no permutation; get the file anew")


def is_permutation(perm: Tensor) -> bool:
    """Tells whether ``perm`` (C,) holds each number below C once."""
    return perm.ndim == 1 and torch.equal(perm.long().sort().values, torch.arange(len(perm), device=perm.device))


def refuse_misfit(what: str, path: str | Path, expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Checks that ``given`` has exactly the keys, shapes and kinds of numbers of ``expected``; nothing is copied.

    Raises: InputError, naming the keys, if it has not. ``what``: what the weights are for, in the message.
    """
    if faults := misfits(expected, given):
        raise InputError(f"{path}: does not fit {what}: {first_few(faults)}")


def misfits(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """Returns the keys that ``given`` lacks or has too much, and those of another shape or kind of numbers.

    Floating-point numbers of another precision fit.
    """
    return [
        *(f"missing {key}" for key in expected if key not in given),
        *(f"unexpected {key}" for key in given if key not in expected),
        *(
            f"{key} is {tuple(given[key].shape)}, not {tuple(tensor.shape)}"
            for key, tensor in expected.items()
            if key in given and given[key].shape != tensor.shape
        ),
        *(
            f"{key} is {given[key].dtype}, not {tensor.dtype}"
            for key, tensor in expected.items()
            if key in given and _kind(given[key].dtype) != _kind(tensor.dtype)
        ),
    ]


def _kind(dtype: torch.dtype) -> str:
    if dtype == torch.bool or dtype.is_complex:
        return str(dtype)
    return "floating" if dtype.is_floating_point else "whole"
