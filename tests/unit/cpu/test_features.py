"""The chip is asked for its units, by functions that a version of torch may lack."""

import platform
from pathlib import Path

import pytest
import torch

from fastmsflow.cpu import features

X86 = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported")


@pytest.fixture
def x86(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A chip that has none of the units."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for question in X86:
        monkeypatch.setattr(torch.cpu, question, lambda: False, raising=False)
    return monkeypatch


@pytest.mark.parametrize("question", X86)
def test_each_unit_serves_its_dtype_alone(question: str, x86: pytest.MonkeyPatch) -> None:
    assert not features.has_bfloat16_units()
    assert not features.has_float16_units()
    x86.setattr(torch.cpu, question, lambda: True)
    assert features.has_float16_units() == (question == "_is_amx_fp16_supported")
    assert features.has_bfloat16_units() == (question != "_is_amx_fp16_supported")


def test_a_chip_has_no_units_that_torch_does_not_tell_of(x86: pytest.MonkeyPatch) -> None:
    for question in X86:
        x86.delattr(torch.cpu, question)
    assert not features.has_bfloat16_units()
    assert not features.has_float16_units()


@pytest.mark.parametrize("supported", [True, False])
def test_on_arm_onednn_is_asked(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    assert features.has_bfloat16_units() == supported
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not features.has_bfloat16_units()


def test_float32_and_float64_need_no_units(x86: pytest.MonkeyPatch) -> None:
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    assert [features.missing_units(dtype) is None for dtype in dtypes] == [True, True, False, False]


@pytest.mark.skipif(platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(), reason="reads Linux's list")
def test_the_answer_is_that_of_the_system() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    assert features.has_bfloat16_units() == ("avx512_bf16" in flags or "amx_bf16" in flags)
    assert features.has_float16_units() == ("amx_fp16" in flags)
