"""Every operation is found under one name in kernels/, ops/ and reference/."""

from pathlib import Path

import fastmsflow

PACKAGE = Path(fastmsflow.__file__).parent
# What several operations of a package share.
HELPERS = {
    "kernels": {"channels_last", "configs", "launch", "math", "permutation"},
    "ops": {"triton_export"},
    "reference": {"clamp_forms", "coupling_spec", "dtypes"},
}
# cuDNN has this operation, so there is no Triton kernel of it.
WITHOUT_KERNEL = {"convolution_relu"}


def operations(package: str) -> set[str]:
    files = {path.stem for path in (PACKAGE / package).glob("*.py")} - {"__init__"}
    assert files >= HELPERS[package]
    return files - HELPERS[package]


def test_every_operation_has_the_same_name_in_all_three_packages() -> None:
    assert operations("ops") == operations("reference")
    assert operations("ops") - WITHOUT_KERNEL == operations("kernels")
