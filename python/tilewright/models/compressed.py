"""Writing a quantised model as a Hugging Face folder in the compressed-tensors format ("pack-quantized").

Codes of 4 or 8 bits lie in int32 words as one stream of bits a row, the first code in the lowest bits; zero points
likewise, one stream a column of groups. The format: compressed_tensors/compressors/pack_quantized of the library
compressed-tensors 0.20, which transformers loads such folders with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright.quant.methods.grid import Coded, Settings

_FORMAT = "pack-quantized"
_VERSION = "0.20.0"  # of the library whose config.json this follows


def coded_tensors(name: str, weight: Coded, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a module's quantised weight, its scales in ``dtype``, in which they are exact."""
    bits = weight.grid.settings.bits
    tensors = {
        f"{name}.weight_packed": pack_words(weight.codes, bits),
        f"{name}.weight_scale": weight.grid.scales.to(dtype),
        f"{name}.weight_shape": torch.tensor(weight.codes.shape),
    }
    if weight.grid.zeros is not None:
        zeros = weight.grid.zeros.to(torch.uint8).t().contiguous()
        tensors[f"{name}.weight_zero_point"] = pack_words(zeros, bits).t().contiguous()
    return tensors


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """int32 (N, ceil(K * bits / 32)) of uint8 codes (N, K) of 4 or 8 bits; what the last word has over is 0."""
    codes = F.pad(codes, (0, -codes.shape[1] % (32 // bits)))
    if bits == 4:
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    return codes.contiguous().view(torch.int32)


def quantization_config(
    plan: Mapping[str, Settings | None], group_size: int, act_order: bool = False
) -> dict[str, Any]:
    """The quantization_config of a config.json. plan: the settings of every linear module, None where it stays dense;
    group_size: the one that was asked for."""
    kinds: dict[Settings, set[str]] = {}
    for name, settings in plan.items():
        if settings is not None:
            kinds.setdefault(settings, set()).add(_in_every_layer(name))
    # The first group stands for all linear modules that no other one names.
    ordered = sorted(kinds, key=lambda settings: (settings.group_size != group_size, settings.group_size))
    return {
        "config_groups": {
            f"group_{number}": {
                "format": _FORMAT,
                "input_activations": None,
                "output_activations": None,
                "targets": sorted(kinds[settings]) if number else ["Linear"],
                "weights": {
                    **({"actorder": "weight"} if act_order else {}),
                    "dynamic": False,
                    "group_size": None if settings.group_size == -1 else settings.group_size,
                    "num_bits": settings.bits,
                    "strategy": "channel" if settings.group_size == -1 else "group",
                    "symmetric": settings.symmetric,
                    "type": "int",
                },
            }
            for number, settings in enumerate(ordered)
        },
        "format": _FORMAT,
        "global_compression_ratio": None,
        "ignore": sorted(name for name, settings in plan.items() if settings is None),
        "kv_cache_scheme": None,
        "moe_sparsity_config": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": _VERSION,
    }


def _in_every_layer(name: str) -> str:
    """A target that matches the module in each layer."""
    return "re:" + re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name)) + "$"
