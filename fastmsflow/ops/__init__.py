"""The flow's operations, each by the backend that serves: Triton kernels or plain PyTorch.

An operation has its twin of the same name and arguments in fastmsflow.reference. Around a kernel lie, from the inside
out: its launcher (fastmsflow.kernels), a PyTorch operator that torch.compile keeps whole, and a
``torch.autograd.Function``. Importing this package does not import Triton.
"""

import torch
from torch import Tensor


def records_gradients(*tensors: Tensor | None) -> bool:
    """Tells whether autograd records what is computed from ``tensors``.

    Where it does not, the operator is called without its ``torch.autograd.Function``: Dynamo there drops the context of
    a function that takes as many arguments as its signature has names, as one with ``*parts`` may.
    """
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
