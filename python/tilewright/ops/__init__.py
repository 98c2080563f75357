"""The kernels' public functions. One module per op: the function, its float64 reference, its registration."""

from tilewright.ops.activation import gelu_mul, silu_mul
from tilewright.ops.attention import attention, scaled_dot_product_attention
from tilewright.ops.gated_mlp import gated_mlp
from tilewright.ops.kv_append import kv_append
from tilewright.ops.linear import grouped_linear, quantized_linear
from tilewright.ops.norm import layer_norm, rms_norm
from tilewright.ops.quantized_kv import QuantizedKV
from tilewright.ops.rope import rope
from tilewright.ops.rope_tables import rope_tables
from tilewright.ops.sample import sample

__all__ = [
    "QuantizedKV",
    "attention",
    "gated_mlp",
    "gelu_mul",
    "grouped_linear",
    "kv_append",
    "layer_norm",
    "quantized_linear",
    "rms_norm",
    "rope",
    "rope_tables",
    "sample",
    "scaled_dot_product_attention",
    "silu_mul",
]
