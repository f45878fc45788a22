"""FrEIA 0.2's own modules, installed from PyPI, against ours from the same weights."""

from pathlib import Path

import pytest
import torch

from tests.helpers.error_log import assert_within
from tests.helpers.parity import allowed, freia_errors, freia_pairs
from tests.helpers.tolerances import FREIA_FLOAT32, FREIA_FLOAT64


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, allowed(FREIA_FLOAT32)), (torch.float64, FREIA_FLOAT64)],
    ids=["float32", "float64"],
)
def test_forward_and_inverse_equal_freia(dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    errors = freia_errors(tmp_path / "flow.pt", dtype)
    assert_within((what, error, tolerance) for what, error in errors.items())


def test_freia_reads_what_save_official_writes_to_the_bit(tmp_path: Path) -> None:
    for level, theirs, ours, _, _ in freia_pairs(tmp_path / "flow.pt", torch.float32):
        flow = ours.parallel_flows[level]
        for step, block in enumerate(flow.blocks):
            module = theirs.module_list[step]
            assert torch.equal(module.global_scale.flatten(), block.global_scale)
            assert torch.equal(module.global_offset.flatten(), block.global_offset)
            assert torch.equal(module.w_perm[:, :, 0, 0].argmax(dim=1), block.perm)
            assert torch.equal(module.w_perm_inv[:, :, 0, 0], module.w_perm[:, :, 0, 0].T)
            for part, own in (("conv1", "conv1"), ("ln", "norm"), ("conv2", "conv2")):
                for kind in ("weight", "bias"):
                    assert torch.equal(
                        module.subnet.get_parameter(f"{part}.{kind}"), block.subnet.get_parameter(f"{own}.{kind}")
                    )
