"""Checkpoints in the published implementation's form, as the tests compare them."""

import io

import torch


def as_bytes(content: dict) -> bytes:
    """The bytes that torch.save writes, but for the version numbers that a module's state dict carries beside it."""
    plain = {
        **content,
        "fusion_flow": dict(content["fusion_flow"]),
        "parallel_flows": [dict(state) for state in content["parallel_flows"]],
    }
    file = io.BytesIO()
    torch.save(plain, file)
    return file.getvalue()
