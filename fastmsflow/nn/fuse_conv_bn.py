"""Folds batch norms into the convolutions before them."""

import copy
from collections import Counter, defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

# Largest difference between the outputs before and after, relative to the largest value, computed in float64: the
# rounding of folded weights to float32 is a hundredth of it, a wrong fold many times more.
AGREEMENT = 1e-4


@torch.no_grad()
def fuse_conv_bn(net: nn.Module, example: Tensor) -> nn.Module:
    """Returns a copy of ``net`` (float32, eval mode) whose convolutions carry the batch norms that follow them.

    ``example``: an input; running it shows which module follows which. If a network uses a convolution's output in
    other ways too, which shows in its outputs, the copy is not changed.
    """
    result = copy.deepcopy(net)
    for convolution, norm in list(_pairs(result, example)):
        mean, variance = norm.running_mean, norm.running_var
        if mean is None or variance is None:  # the norm takes the batch's own
            continue
        weight, bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, mean, variance, norm.eps, norm.weight, norm.bias
        )
        convolution.weight, convolution.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
        # timm's BatchNormAct2d also drops and activates, which stays.
        rest = [getattr(norm, name) for name in ("drop", "act") if hasattr(norm, name)]
        for name in [name for name, module in result.named_modules(remove_duplicate=False) if module is norm]:
            result.set_submodule(name, nn.Sequential(*rest))
    return result if computes_the_same(result, net, example) else copy.deepcopy(net)


@torch.no_grad()
def computes_the_same(ours: nn.Module, theirs: nn.Module, example: Tensor) -> bool:
    """Tells whether two networks yield the same maps of ``example``, in float64 and up to AGREEMENT."""
    threads = torch.get_num_threads()
    # In float64 a depthwise convolution runs channel by channel: threads would wait for each other, for seconds.
    torch.set_num_threads(1)
    try:
        after, before = (copy.deepcopy(each).double()(example.double()) for each in (ours, theirs))
    finally:
        torch.set_num_threads(threads)
    if [a.shape for a in after] != [b.shape for b in before]:
        return False
    pairs = zip(after, before, strict=True)
    return all(bool((a - b).abs().max() <= AGREEMENT * b.abs().max()) for a, b in pairs)


def _pairs(net: nn.Module, example: Tensor) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Yields convolutions and the norms that take their outputs, found by running ``example`` through."""
    produced: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    followers: dict[nn.Conv2d, list[nn.Module]] = defaultdict(list)
    calls: Counter[nn.Module] = Counter()

    def seen(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        calls[module] += 1
        if isinstance(module, nn.BatchNorm2d) or not any(True for _ in module.children()):
            for x in inputs:
                if id(x) in produced:
                    followers[produced[id(x)][0]].append(module)
        if isinstance(module, nn.Conv2d) and isinstance(output, Tensor):
            # The tensor is held, so that its id stays its own.
            produced[id(output)] = (module, output)

    handles = [module.register_forward_hook(seen) for module in net.modules()]
    try:
        net(example)
    finally:
        for handle in handles:
            handle.remove()
    for convolution, modules in followers.items():
        norm = modules[0]
        once = len(modules) == calls[convolution] == calls[norm] == 1
        if once and isinstance(norm, nn.BatchNorm2d):
            yield convolution, norm
