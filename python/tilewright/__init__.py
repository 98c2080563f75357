"""Fast attention, quantised linears and a thin inference layer for transformers on the hardware you have."""

from __future__ import annotations

import importlib

import torch as _torch  # noqa: F401  (before _C, which asks torch for its DLPack exchange table)

from tilewright import flash_attn
from tilewright._version import __version__
from tilewright.ops import (
    QuantizedKV,
    attention,
    gelu_mul,
    kv_append,
    layer_norm,
    quantized_linear,
    rms_norm,
    rope,
    rope_tables,
    sample,
    scaled_dot_product_attention,
    silu_mul,
)
from tilewright.quant import QuantizedLinear, QuantizedWeight, quantize_, quantize_weight
from tilewright.runtime import get_num_threads, info, isa, last_impl, set_num_threads

# Imported on first use, so that `import tilewright` costs little beside torch.
_LAZY: dict[str, str] = {
    "AutoModelForCausalLM": "tilewright.models.auto",
    "AutoTokenizer": "tilewright.io.tokenizer",
    "DynamicCache": "tilewright.cache.dynamic",
    "GenerationConfig": "tilewright.generation.config",
    "TextStreamer": "tilewright.generation.streamers",
    "patch_sdpa": "tilewright.integrations.sdpa",
    "register_transformers": "tilewright.integrations.transformers",
}

__all__ = [
    "QuantizedKV",
    "QuantizedLinear",
    "QuantizedWeight",
    "__version__",
    "attention",
    "flash_attn",
    "gelu_mul",
    "get_num_threads",
    "info",
    "isa",
    "kv_append",
    "last_impl",
    "layer_norm",
    "quantize_",
    "quantize_weight",
    "quantized_linear",
    "rms_norm",
    "rope",
    "rope_tables",
    "sample",
    "scaled_dot_product_attention",
    "set_num_threads",
    "silu_mul",
    *_LAZY,
]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'tilewright' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))
