"""The kernels' public functions. One module per op: the function, its float64 reference, its registration."""

from tilewright.ops.attention import attention, scaled_dot_product_attention
from tilewright.ops.linear import quantized_linear
from tilewright.ops.norm import layer_norm, rms_norm

__all__ = [
    "attention",
    "layer_norm",
    "quantized_linear",
    "rms_norm",
    "scaled_dot_product_attention",
]
