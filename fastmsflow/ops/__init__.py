"""The flow's operations, each computed by the backend that serves: Triton kernels or plain PyTorch.

An operation has the same name and arguments in fastmsflow.reference. Around a kernel lie, from the inside out: its
launcher (fastmsflow.kernels), a PyTorch operator that torch.compile does not look into, and a
``torch.autograd.Function``. Importing this package does not import Triton.
"""

import torch
from torch import Tensor


def records_gradients(*tensors: Tensor | None) -> bool:
    """Tells whether autograd records what is computed from ``tensors``.

    If not, the operator is called without its ``torch.autograd.Function``: there Dynamo drops the context of a function
    that takes as many arguments as its signature has names, as one with ``*maps`` may.
    """
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
