"""The table of OpenVINO's precisions tells how far scores are off, and how many labels change."""

import numpy as np
import torch

from benchmarks import openvino_precisions


def test_each_row_is_compared_with_the_first() -> None:
    images = torch.arange(1.0, 11.0)[:, None, None, None].expand(-1, 3, 2, 2)
    labels = (np.arange(10) >= 5).astype(int)
    found = {
        "model": lambda x: x[:, 0, 0, 0].numpy(),
        "reversed": lambda x: 11 - x[:, 0, 0, 0].numpy(),
    }
    lines = openvino_precisions.table(found, images, labels, threshold=2.5).splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    assert lines[2].startswith("| model | 0e+00 | 0 | 1.0000 | ")
    # The image of score 1 gets 10; two of each end change sides.
    assert lines[3].startswith("| reversed | 9e+00 | 4 | 0.0000 | ")
