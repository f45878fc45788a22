"""Records on a CPU what a GPU would do: each operator's launches and bytes, from tensors without data.

Inside ``on_a_gpu`` tensors are fake ones of the CPU, since of a GPU's the backward pass needs a GPU; the library takes
them for a GPU's, and its kernels are not launched. ``recording`` notes the work of a block:

* An operator of PyTorch is one launch, and a view or an empty tensor is none. It moves each of its operands once, an
  operand that is changed in place twice: it is read and written. The bytes of an operand are those of its elements, not
  of the storage that it views; an element that ``expand`` shows many times counts once.
* An operator of this library is opened: each launch of a kernel is one, which moves each of its tensors once.
* ``RULES`` has the operators that do on a GPU what a CPU's recording does not show. Source: PyTorch's
  aten/src/ATen/native, files Convolution.cpp, cudnn/ConvShared.cpp, cuda/ReflectionPad.cu, TensorShape.cpp.

An operator for which CUDA needs several kernels (sums in two steps, the sort of a gradient through an index, the k
largest values, operators on lists of tensors) counts as one, so that plain PyTorch's launches are a lower bound.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import KernelInterface

from fastmsflow import backend
from fastmsflow.benchmarking import tensors
from fastmsflow.kernels import configs
from fastmsflow.nn.cuda_graph import CudaGraphCache

CPU = torch.device("cpu")
# Operators that run nothing, though they are no views by their schema.
NOTHING = {f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")}
NOTHING |= {"aten::_unsafe_view"}
# Arguments that are written without being read, or read without being written, though their schema does not say so.
MOVED_ONCE = {
    "aten::copy_": "self",
    "aten::fill_": "self",
    "aten::zero_": "self",
    # Written only where a loss scaler's factor is taken out of them.
    "aten::_fused_adam_": "grads",
}


@dataclass
class Work:
    """Launches and bytes of an operator or a kernel."""

    launches: int = 0
    bytes: int = 0


WorkByName = dict[str, Work]
"""Work by the name of the operator or kernel."""


def make_fake(module: nn.Module, mode: FakeTensorMode) -> None:
    """Puts fake tensors of the CPU in the place of all weights and buffers, which may lie on the device "meta"."""
    with mode:
        for layer in module.modules():
            for name, x in layer._parameters.items():
                layer._parameters[name] = x if x is None else nn.Parameter(_like(x), x.requires_grad)
            for name, x in layer._buffers.items():
                layer._buffers[name] = x if x is None else _like(x)


def _like(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=CPU)


@contextmanager
def taken_for_a_gpus() -> Iterator[None]:
    """Makes every tensor say within the block that it is on a GPU, whatever its device is."""
    # Set on the class torch.Tensor, whose base has the true one.
    with mock.patch.object(Tensor, "is_cuda", True):
        yield


@contextmanager
def on_a_gpu(mode: AbstractContextManager[object]) -> Iterator[None]:
    """Makes new tensors within the block fake ones by ``mode``, taken for a GPU's; no kernel is launched.

    A comparison of their values, which they lack, counts as true: where the library tries an operator, it agrees.
    """
    foreach = [*_foreach_utils._foreach_supported_types, FakeTensor]
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        for patched in (
            mock.patch.dict(backend._faults, {CPU: None}),
            mock.patch.dict(configs._chips, {CPU: "sm_90"}),
            mock.patch.object(CudaGraphCache, "__call__", lambda replay, function, inputs, *state: function(*inputs)),
            mock.patch.object(KernelInterface, "__getitem__", lambda kernel, grid: lambda *args, **options: None),
            mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False),
            mock.patch.object(torch.backends.cudnn, "is_acceptable", lambda x: True),
            mock.patch.object(FakeTensor, "__bool__", lambda x: True),
            mock.patch.object(_foreach_utils, "_foreach_supported_types", foreach),
            taken_for_a_gpus(),
            mode,
        ):
            stack.enter_context(patched)
        yield


@contextmanager
def recording() -> Iterator[WorkByName]:
    """Yields what the block's work comes to, in ``on_a_gpu``.

    A CUDA graph replays the same; the copies of its inputs and outputs are left out.
    """
    recorded_work: WorkByName = defaultdict(Work)

    def launched(kernel: Any, grid: object) -> Callable[..., None]:
        def note(*args: object, **options: object) -> None:
            _count(recorded_work, kernel.fn.__name__, [args, list(options.values())])

        return note

    with mock.patch.object(KernelInterface, "__getitem__", launched), _Recorder(recorded_work):
        yield recorded_work


def _count(recorded_work: WorkByName, name: str, operands: object) -> None:
    """One launch that moves each of ``operands`` once."""
    recorded_work[name].launches += 1
    recorded_work[name].bytes += sum(_bytes(x) for x in {id(x): x for x in tensors(operands)}.values())


def _bytes(x: Tensor) -> int:
    """Dimensions of stride 0 show the same elements again."""
    return prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride or n == 0) * x.itemsize


class _Recorder(TorchDispatchMode):
    def __init__(self, recorded_work: WorkByName) -> None:
        super().__init__()
        self._recorded_work = recorded_work

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # Asks a fake tensor for its device.
        if func.namespace == "prim":
            return func(*args, **kwargs)
        name = func._schema.name
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        if name in RULES:
            return RULES[name](self._recorded_work, given, func)
        with self:
            if name.startswith("fastmsflow::"):
                return OPDEFS[name]._init_fn(*args, **kwargs)
            # Below autograd, where launchers run, an operator such as "contiguous" comes whole.
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        out = func(*args, **kwargs)
        if not (func.is_view or name in NOTHING):
            self._count(name, func._schema, given, out)
        return out

    def _count(self, name: str, schema: Any, given: dict[str, Any], out: Any) -> None:
        """An operator's only launch."""
        outs = [out] if len(schema.returns) == 1 else out or ()
        new = [x for x, says in zip(outs, schema.returns, strict=True) if says.alias_info is None]
        operands = list(tensors([list(given.values()), new]))
        if not operands:
            return
        changed = [
            given[argument.name]
            for argument in schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
            if argument.name in given and argument.name != MOVED_ONCE.get(name)
        ]
        _count(self._recorded_work, name, operands)
        self._recorded_work[name].bytes += sum(map(_bytes, tensors(changed)))


def _layout(*operands: Tensor) -> torch.memory_format:
    """Returns the layout that cuDNN computes in: channels-last where an operand, or what it is a slice of, is."""
    last = any(torch._prims_common.suggest_memory_format(x) == torch.channels_last for x in operands)
    return torch.channels_last if last else torch.contiguous_format


def _copied(recorded_work: WorkByName, whose: str, x: Tensor, layout: torch.memory_format) -> Tensor:
    """``x`` in ``layout``: where it is not, a launch that reads it and writes a copy."""
    if x.is_contiguous(memory_format=layout):
        return x
    copy = torch.empty_like(x, memory_format=layout)
    _count(recorded_work, f"copy of {whose}", [x, copy])
    return copy


def _convolution(recorded_work: WorkByName, given: dict[str, Any], func: Any) -> Tensor:
    """PyTorch copies input and weight where they are not in cuDNN's layout, and adds the bias in a pass of its own."""
    out, x, weight = _convolve(recorded_work, given, func(**given))
    _count(recorded_work, "vendor's convolution", [x, weight, out])
    bias = given["bias"]
    if bias is not None:
        _count(recorded_work, "bias of a convolution", [out, out[:], bias])
    return out


def _convolve(recorded_work: WorkByName, given: dict[str, Any], out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the output, of ``out``'s shape, the input and the weight, all three in cuDNN's layout."""
    x, weight = given["input"], given["weight"]
    layout = _layout(x, weight)
    x, weight = (
        _copied(recorded_work, "a convolution's input", x, layout),
        _copied(recorded_work, "a weight", weight, layout),
    )
    return torch.empty_like(out, memory_format=layout), x, weight


def _convolution_backward(recorded_work: WorkByName, given: dict[str, Any], func: Any) -> tuple[Tensor | None, ...]:
    """Each gradient that is wanted is a launch, the bias's a sum; what is not in cuDNN's layout is copied."""
    grads = list(func(**given))
    of_input, of_weight, of_bias = given["output_mask"]
    layout = _layout(given["input"], given["weight"])
    grad = _copied(recorded_work, "a gradient", given["grad_output"], layout)
    if of_input:
        weight = _copied(recorded_work, "a weight", given["weight"], layout)
        grads[0] = torch.empty_like(grads[0], memory_format=layout)
        _count(recorded_work, "vendor's convolution: input's gradient", [grad, weight, grads[0]])
    if of_weight:
        x = _copied(recorded_work, "a convolution's input", given["input"], layout)
        grads[1] = torch.empty_like(grads[1], memory_format=layout)
        _count(recorded_work, "vendor's convolution: weight's gradient", [grad, x, grads[1]])
    if of_bias:
        _count(recorded_work, "aten::sum", [given["grad_output"], grads[2]])
    return tuple(grads)


def _convolution_relu(recorded_work: WorkByName, given: dict[str, Any], func: Any) -> Tensor:
    """The convolution's launch adds bias and residual, too. Without a GPU PyTorch cannot tell the output's shape, which
    is a plain convolution's."""
    given["input"] = given.pop("self")
    steps = (given["stride"], given["padding"], given["dilation"])
    plain = torch.ops.aten.convolution(given["input"], given["weight"], None, *steps, False, [0, 0], given["groups"])
    out, x, weight = _convolve(recorded_work, given, plain)
    _count(recorded_work, "vendor's convolution with ReLU", [x, weight, out, given["bias"], given.get("z")])
    return out


def _reflection_pad(recorded_work: WorkByName, given: dict[str, Any], func: Any) -> Tensor:
    """The kernel takes and yields contiguous memory; the convolution that follows makes it channels-last again."""
    x = _copied(recorded_work, "what is padded", given["self"], torch.contiguous_format)
    out = torch.empty(func(**given).shape, dtype=x.dtype, device=x.device)
    _count(recorded_work, "aten::reflection_pad2d", [x, out])
    return out


def _slice_backward(recorded_work: WorkByName, given: dict[str, Any], func: Any) -> Tensor:
    """The gradient is copied into zeros."""
    out, grad = func(**given), given["grad_output"]
    _count(recorded_work, "aten::zeros", [out])
    _count(recorded_work, "aten::copy_", [grad, torch.empty_like(grad)])
    return out


RULES: dict[str, Callable[[WorkByName, dict[str, Any], Any], Any]] = {
    "aten::convolution": _convolution,
    "aten::convolution_backward": _convolution_backward,
    "aten::cudnn_convolution_relu": _convolution_relu,
    "aten::cudnn_convolution_add_relu": _convolution_relu,
    "aten::reflection_pad2d": _reflection_pad,
    "aten::slice_backward": _slice_backward,
}
