"""Exports a model that lies on a GPU which is not there, and prints what its graph is made of, kernels inlined:
(this library's operators left, launches of kernels, the batch). Run by test_export.py."""

import logging
from collections import Counter

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fastmsflow import MSFlow, backend
from fastmsflow.integrations.export import _Predictor
from fastmsflow.kernels import configs
from fastmsflow.ops.triton_export import inlined

# PyTorch asks Triton's driver which arguments a kernel writes; without one it takes all for written, and says so.
logging.disable(logging.WARNING)
DEVICE = torch.device("cuda", 0)
backend._faults[DEVICE] = None
configs._chips[DEVICE] = "sm_90"

predictor = _Predictor(MSFlow("test_resnet.r160_in1k", pretrained=False, image_size=(64, 96), blocks=(1, 2, 1)))
with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
    for module in predictor.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                there = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)
                tensors[name] = torch.nn.Parameter(there, False) if tensors is module._parameters else there
    images = torch.empty(2, 3, 64, 96, device=DEVICE)
    program = torch.export.export(predictor, (images,), dynamic_shapes=({0: Dim("batch")},))
    with inlined():
        program = program.run_decompositions({})

calls = Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")
(given,) = (n for n in program.graph.nodes if n.name in program.graph_signature.user_inputs)
operators = sorted(name for name in calls if name.startswith("fastmsflow"))
print((operators, calls["triton_kernel_wrapper_functional"], str(given.meta["val"].shape[0])))
