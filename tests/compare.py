"""The error rule that every kernel is held to.

With ref the op in float64 and naive the same maths in plain torch in the op's dtype:
    max|out - ref| <= 2 * max|naive - ref| + floor,   rms(out - ref) <= 2 * rms(naive - ref) + floor,
    floor = 2e-6 * max|ref| for float32, 1e-5 * max(1, max|ref|) for bfloat16 and float16.
NaN and infinities stand where ref, rounded to the dtype, has them; shape and dtype are the expected ones.
"""

from __future__ import annotations

import torch
from torch import Tensor


def assert_close(out: Tensor, ref: Tensor, naive: Tensor, dtype: torch.dtype) -> None:
    """Raise AssertionError, with the measured errors, unless ``out`` keeps the error rule."""
    assert ref.dtype == torch.float64, f"the reference must be float64, got {ref.dtype}"
    assert out.dtype == dtype, f"expected {dtype}, got {out.dtype}"
    assert out.shape == ref.shape == naive.shape, f"expected shape {ref.shape}, got {out.shape}, naive {naive.shape}"
    rounded, wide, naive = ref.to(dtype), out.double(), naive.double()
    for name, expected, found in (
        ("NaN", rounded.isnan(), wide.isnan()),
        ("+inf", rounded.isposinf(), wide.isposinf()),
        ("-inf", rounded.isneginf(), wide.isneginf()),
    ):
        wrong = expected != found
        assert not wrong.any(), (
            f"{name} differs at {wrong.nonzero()[:5].tolist()}: expected {int(expected.sum())}, got {int(found.sum())}"
        )
    finite = rounded.isfinite()
    if not finite.any():
        return
    error, bar = (wide - ref)[finite].abs(), (naive - ref)[finite].abs()
    bar = bar[bar.isfinite()]  # naive may overflow where out need not
    scale = ref[finite].abs().max().item()
    floor = 2e-6 * scale if dtype == torch.float32 else 1e-5 * max(1.0, scale)
    for name, measure in (("max", lambda e: e.max().item()), ("rms", lambda e: e.square().mean().sqrt().item())):
        found, limit = measure(error), 2 * (measure(bar) if bar.numel() else 0.0) + floor
        assert found <= limit, (
            f"{name} error {found:.3e} exceeds {limit:.3e} (floor {floor:.1e}, max|ref| {scale:.3e}); "
            f"worst at flat index {int(((wide - ref).abs() * finite).nan_to_num().argmax())}"
        )


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    """Equal dtype, shape and bits, NaN payloads and the sign of zero included."""
    assert a.dtype == b.dtype and a.shape == b.shape, f"{a.dtype} {a.shape} and {b.dtype} {b.shape}"
    size = a.element_size()
    as_int = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    differ = a.contiguous().view(as_int) != b.contiguous().view(as_int)
    assert not differ.any(), f"{int(differ.sum())} of {a.numel()} elements differ, first {differ.nonzero()[0].tolist()}"
