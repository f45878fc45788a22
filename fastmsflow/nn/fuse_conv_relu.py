"""Fuses convolutions with the ReLU behind them, and with the addition between the two, into one operator."""

import copy
import operator
from collections import Counter
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .. import backend as backends
from ..backend import Backend
from ..cpu import convolution as cpu
from ..ops.conv3x3 import rounds_to_tf32
from ..ops.convolution_relu import convolution_relu, cudnn_may_serve, uses_cudnn
from ..ops.reflection_pad import reflection_pad
from ..reference import convolution_relu as reference
from .fuse_conv_bn import computes_the_same

# The largest error of a fused operator beside its twin on the same device, relative in the norm. In half precision the
# twin rounds up to three times (after the convolution, the bias and the residual), the operator once: emulated for
# WideResNet-50-2 that is 4e-4 in float16 and 3e-3 in bfloat16; ten times as much is allowed. float32 sums thousands of
# products in another order, or by Winograd's algorithm (4e-6); TF32 cuts their operands to 11 bits.
AGREEMENT = {torch.float16: 2**-8, torch.bfloat16: 2**-5, torch.float32: 1e-4}
AGREEMENT_TF32 = 2**-8

_RELUS = (torch.relu, torch.relu_, F.relu, "relu", "relu_")
_ADDITIONS = (operator.add, torch.add, "add", "add_")


class FusedConvolution(nn.Module):
    """Computes relu(convolution(x) + residual), by one operator if cuDNN has it and agrees with the reference.

    The module takes over the weights of ``convolution``. Padding by reflection is a kernel of its own before the
    operator.
    """

    agrees: bool | None
    """True if the fused operator computed what the reference does with every shape so far, on the device and in the
    dtype of the weights; None before the first try."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias
        padding = _pair(convolution.padding)
        reflects = convolution.padding_mode == "reflect" and padding != (0, 0)
        self.reflection = (padding[1], padding[1], padding[0], padding[0]) if reflects else None
        self.geometry = reference.Geometry(
            _pair(convolution.stride),
            (0, 0) if reflects else padding,
            _pair(convolution.dilation),
            convolution.groups,
        )
        self.agrees = None
        self._tried: set[torch.Size] = set()

    def forward(self, x: Tensor, residual: Tensor | None = None, backend: Backend = "auto") -> Tensor:
        """Computes (B, O, H', W') from x (B, I, H, W) and residual (B, O, H', W') or None."""
        # An exported graph is to run without this library. Dynamo of torch 2.11 takes every graph for one.
        by_cudnn = not torch.compiler.is_exporting() and uses_cudnn(backend, x)
        on_cpu = not by_cudnn and backends.resolve(backend) == "auto" and cpu.serves(x, self.weight, self.bias)
        # Winograd's algorithm reflects a border of one pixel as it cuts tiles.
        reflects = on_cpu and self.reflection == (1, 1, 1, 1)
        if self.reflection is not None and not reflects:
            x = reflection_pad(x, self.reflection, backend)
        operands = (x, self.weight, self.bias, self.geometry)
        if on_cpu:
            return cpu.convolve(*operands, reflects=reflects, residual=residual, relu=True)
        if by_cudnn and self._agrees(x, residual):
            return convolution_relu(*operands, residual=residual, backend=backend)
        return reference.convolution_relu(*operands, residual=residual)

    def _agrees(self, x: Tensor, residual: Tensor | None) -> bool:
        """Tells whether the operator agrees at x's shape; it is tried at a shape's first call.

        It is not tried while a graph is traced or recorded, which cannot wait.
        """
        if torch.compiler.is_compiling():
            return self.agrees is True
        is_recorded = x.is_cuda and torch.cuda.is_current_stream_capturing()
        if self.agrees is not False and x.shape not in self._tried and cudnn_may_serve(x) and not is_recorded:
            self.agrees = self._try(x, residual)
            self._tried.add(x.shape)
        return self.agrees is True and x.shape in self._tried

    @torch.no_grad()
    def _try(self, x: Tensor, residual: Tensor | None) -> bool:
        """Compares the operator with the reference on noise: an image of one color would hide a wrong stride."""
        noise = torch.Generator(x.device).manual_seed(0)
        added = None if residual is None else torch.empty_like(residual).normal_(generator=noise)
        operands = (torch.empty_like(x).normal_(generator=noise), self.weight, self.bias, self.geometry)
        try:
            ours = convolution_relu(*operands, residual=added).float()
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError:  # cuDNN has no such operator for these shapes
            return False
        theirs = reference.convolution_relu(*operands, residual=added).float()
        limit = AGREEMENT_TF32 if x.dtype == torch.float32 and rounds_to_tf32() else AGREEMENT[x.dtype]
        return bool((ours - theirs).norm() <= limit * theirs.norm())

    def _apply(self, *args: Any, **options: Any) -> "FusedConvolution":
        """Moves to a device or dtype, and has the operator tried again there."""
        self.agrees = None
        self._tried.clear()
        return super()._apply(*args, **options)


def fuse_convolutions(net: nn.Module, example: Tensor) -> nn.Module:
    """Returns a copy of ``net`` (float32, eval mode, norms folded) whose convolutions add and take the ReLU themselves.

    A convolution becomes a FusedConvolution if it is called once, nothing else uses its output, and a ReLU follows, or
    an addition and then a ReLU. If the other summand is such a convolution too, its bias moves to the fused one.
    The copy takes a backend as its second argument. ``example``: images (B, 3, H, W), normalized.

    The result is ``net`` itself if it cannot be traced, has no such convolution, would compute something else, or has
    hooks, which a trace does not call: some of timm's networks collect their features by them.
    """
    if any(module._forward_hooks or module._forward_pre_hooks for module in net.modules()):
        return net
    # Images that are too small for the network fail here, and not in the copy.
    with torch.no_grad():
        net(example)
    fused = copy.deepcopy(net)
    try:
        graph = _Tracer().trace(fused)
    except Exception:  # a network may do anything with a proxy that is no tensor
        return net
    if not _Rewriter(fused, graph).rewrite():
        return net
    result = fx.GraphModule(fused, graph)
    try:
        # float64 is for plain PyTorch, whatever backend was asked for.
        with backends.use("torch"):
            return result if computes_the_same(result, net, example) else net
    except RuntimeError:  # an addition may have stretched the convolution's output
        return net


class _Tracer(fx.Tracer):
    """Traces into modules that have children, and into sequences, which may be empty."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not isinstance(m, nn.Sequential) and not any(True for _ in m.children())


class _Rewriter:
    """Fuses convolutions in ``graph``, which is a trace of ``net``, and in ``net``."""

    def __init__(self, net: nn.Module, graph: fx.Graph) -> None:
        self.net, self.graph = net, graph
        self.modules = dict(net.named_modules())
        for node in list(graph.nodes):
            if isinstance(self._module(node), (nn.Identity, nn.Dropout, nn.Dropout2d)):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
        self.calls = Counter(node.target for node in graph.nodes)

    def rewrite(self) -> bool:
        """Fuses every convolution that can be fused, and tells whether there was one."""
        images, *others = self.graph.nodes
        with self.graph.inserting_after(images):
            backend = self.graph.placeholder("backend", default_value="auto")
        return sum(self._fuse(node, backend) for node in others if self._is_relu(node)) > 0

    def _fuse(self, relu: fx.Node, backend: fx.Node) -> bool:
        """Replaces ``relu`` and its input by one call, if the input is a convolution or a sum with one."""
        source = relu.args[0]
        summands = self._summands(source)
        main = next((node for node in (source, *summands) if self._convolution(node)), None)
        convolution = self._convolution(main)
        if not isinstance(main, fx.Node) or convolution is None:
            return False
        residual = next((node for node in summands if node is not main), None)
        behind_residual = self._convolution(residual)
        if behind_residual is not None and behind_residual.bias is not None:
            moved, behind_residual.bias = behind_residual.bias, None
            convolution.bias = moved if convolution.bias is None else nn.Parameter(convolution.bias + moved, False)
        self.net.set_submodule(str(main.target), FusedConvolution(convolution))
        with self.graph.inserting_before(relu):
            call = self.graph.call_module(str(main.target), (main.args[0], residual, backend))
        relu.replace_all_uses_with(call)
        for node in dict.fromkeys((relu, source, main)):
            self.graph.erase_node(cast(fx.Node, node))
        return True

    def _convolution(self, node: object) -> nn.Conv2d | None:
        """Returns the convolution that ``node`` calls, if it can be fused and one other node alone reads its output."""
        found = self._module(node)
        if not isinstance(node, fx.Node) or type(found) is not nn.Conv2d:
            return None
        once = self.calls[node.target] == len(node.users) == len(node.args) == 1 and not node.kwargs
        known = found.padding_mode in ("zeros", "reflect") and not isinstance(found.padding, str)
        return found if once and known else None

    def _summands(self, node: object) -> tuple[fx.Node, ...]:
        """Returns the two different tensors that ``node`` adds, if one other node alone reads the sum."""
        if not isinstance(node, fx.Node) or len(node.users) != 1 or not _calls(node, _ADDITIONS) or node.kwargs:
            return ()
        found = tuple(each for each in node.args if isinstance(each, fx.Node))
        return found if len(found) == 2 and found[0] is not found[1] else ()

    def _is_relu(self, node: fx.Node) -> bool:
        return isinstance(self._module(node), nn.ReLU) or _calls(node, _RELUS)

    def _module(self, node: object) -> nn.Module | None:
        is_call = isinstance(node, fx.Node) and node.op == "call_module"
        return self.modules[str(cast(fx.Node, node).target)] if is_call else None


def _calls(node: fx.Node, names: tuple[object, ...]) -> bool:
    """Tells whether ``node`` calls one of these functions, or a method of one of these names."""
    return node.op in ("call_function", "call_method") and node.target in names


def _pair(size: object) -> tuple[int, int]:
    vertical, horizontal = cast(tuple[int, int], size)
    return vertical, horizontal
