"""Adam for weights in channels-last memory."""

from typing import Any

import torch
from torch import Tensor


class Adam(torch.optim.Adam):
    """Adam whose fused kernel gets contiguous views of weights in channels-last memory, on a CPU; logs name the class.

    PyTorch's kernel copies such tensors first, and mixes a weight up with a gradient in another layout.
    """

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        """Fills ``lists``: weights, gradients, two states, a third or none, steps; PyTorch's ``step`` calls this."""
        has_complex: bool = super()._init_group(group, *lists)
        weights, grads, *states = lists
        for i, weight in enumerate(weights):
            own = [tensors[i] for tensors in states if tensors and tensors[i].ndim == 4]
            if all(_lies_channels_last(tensor) for tensor in (weight, *own)):
                for tensors in lists:
                    if tensors and tensors[i].ndim == 4:
                        tensors[i] = tensors[i].permute(0, 2, 3, 1)
                # A gradient in another layout is copied; the other views are contiguous.
                grads[i] = grads[i].contiguous()
        return has_complex


def _lies_channels_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.device.type == "cpu" and tensor.is_contiguous(memory_format=torch.channels_last)
