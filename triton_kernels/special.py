"""Functions that Triton's core lacks; libdevice has them, but under two vendors' names and not in the interpreter. And
how float32 matrices are multiplied."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def exactly(*columns: int) -> str:
    """The input_precision of `tl.dot` that keeps float32's accuracy: three products of tensor cores, of each number's
    first 11 bits and the next 11 (https://arxiv.org/abs/2203.03341); multiply-adds for AMD's, where Triton has no such
    thing, and for operands of more than 128 columns, whose parts registers do not hold. Multiply-adds read operands
    from shared memory as they lie in global memory, 8 lanes from one bank."""
    return "ieee" if tl.target_info.is_hip() or max(columns) > 128 else "tf32x3"


@triton.jit
def tanh(x):
    """Hyperbolic tangent of float32, within 2 units in the last place; the polynomial for small x is that of Cephes'
    tanhf (https://www.netlib.org/cephes/)."""
    z = x * x
    p = -5.70498872745e-3
    p = p * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    small = p * z * x + x
    large = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * 2.8853900817779268) + 1.0)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -large, large))
