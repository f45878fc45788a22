"""The flow's operations, each by the backend that serves: Triton kernels or plain PyTorch.

An operation has its twin of the same name and arguments in fastmsflow.reference. Around a kernel lie, from the inside
out: its launcher (fastmsflow.kernels), a PyTorch operator that torch.compile keeps whole, and a
``torch.autograd.Function``. Importing this package does not import Triton.
"""
