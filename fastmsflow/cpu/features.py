"""Tells which half precisions this machine's CPU computes faster than float32: the chip is asked."""

import platform

import torch


def has_bfloat16_units() -> bool:
    """Tells whether the CPU multiplies bfloat16 itself: by AMX-BF16 or AVX512-BF16, on ARM by its BF16 instructions."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        # On x86 this function is also true of chips that can only emulate bfloat16.
        return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return _has("_is_avx512_bf16_supported") or _has("_is_amx_tile_supported")


def has_float16_units() -> bool:
    """Tells whether the CPU multiplies float16 fast, by AMX-FP16: AVX512-FP16 alone is slower than float32."""
    return _has("_is_amx_fp16_supported")


def missing_units(dtype: torch.dtype) -> str | None:
    """Returns the fact that the CPU has no units for ``dtype``, or None if it has them or needs none."""
    if dtype == torch.bfloat16 and not has_bfloat16_units():
        return "this CPU has neither AMX-BF16 nor AVX512-BF16, and computes bfloat16 more slowly than float32"
    if dtype == torch.float16 and not has_float16_units():
        return "this CPU has no AMX-FP16, and computes float16 more slowly than float32"
    return None


def _has(question: str) -> bool:
    # These functions are torch's own and not promised: where one is missing, the chip counts as one without the units.
    return bool(getattr(torch.cpu, question, bool)())
