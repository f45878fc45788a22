"""A model that is small enough for tests, and images for it."""

import torch
from torch import Tensor, nn

from fastmsflow import MSFlow
from tests.helpers.ops_parity import DEVICE

SIZE = (64, 96)


def model(name: str = "tf_efficientnet_lite0") -> MSFlow:
    torch.manual_seed(0)
    result = MSFlow(name, pretrained=False, image_size=SIZE, blocks=(1, 1, 2), backend="torch").to(DEVICE).eval()
    for norm in result.extractor.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 2)
    return result


def images(batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, *SIZE, generator=torch.Generator().manual_seed(1)).to(DEVICE)
