"""AutoModelForCausalLM: the one way in."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from tilewright.io.pull import resolve
from tilewright.models.decoder import CausalLM
from tilewright.models.loader import Quantization, load
from tilewright.ops.linear import ACTIVATIONS

_DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    torch.float32: torch.float32,
    torch.bfloat16: torch.bfloat16,
}


class AutoModelForCausalLM:
    """Loads a causal language model of any supported family."""

    def __init__(self) -> None:
        raise TypeError("AutoModelForCausalLM: use AutoModelForCausalLM.from_pretrained(path)")

    @staticmethod
    def from_pretrained(
        path: str | os.PathLike[str],
        *,
        dtype: str | torch.dtype = "auto",
        quantization: str | Mapping[str, Any] | None = None,
        activation: str = "int8",
        device: str | torch.device = "cpu",
        cache_implementation: str = "dynamic",
    ) -> CausalLM:
        """Load the model at `path`: a Hugging Face folder, a .gguf file, or a name `tilewright pull` knows.

        Folders may be quantised, as their config.json then says: GPTQ, AWQ (gemm), bitsandbytes (int8, NF4, FP4), HQQ
        (axis 1), EETQ, compressed-tensors (int-quantized, pack-quantized, fp8), fp8 (DeepSeek's, Qwen's).
        `tilewright.quant` says what their matrices become; how the libraries round inputs is not imitated.

        dtype: of matrices that stay dense: "auto" (the file's; float16 becomes float32), float32, bfloat16;
        quantization: None, "int8", "int4", or a dict with bits and maybe group_size, symmetric, method (as in
        `quantize_weight`), skip (module names left dense, default the head), for files that are not quantised yet;
        activation: how inputs of quantised matrices are rounded, see `quantized_linear`; matrices whose codes are no
        integers (nf4, fp4, fp8) take bf16 in place of int8.

        Raises FormatError (a ValueError) for a broken file, ValueError, TypeError or NotImplementedError that
        names the argument or what is not supported.
        """
        if dtype in (torch.float16, "float16"):
            raise NotImplementedError(
                "from_pretrained: dtype float16 is not supported on a CPU; supported: 'auto' (which widens a "
                "float16 file to float32), float32, bfloat16"
            )
        if dtype not in _DTYPES:
            raise ValueError(f"from_pretrained: dtype must be 'auto', float32 or bfloat16, got {dtype!r}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"from_pretrained: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if str(device) != "cpu":
            raise NotImplementedError(f"from_pretrained: device={str(device)!r} is not supported yet, only 'cpu'")
        if cache_implementation != "dynamic":
            raise NotImplementedError(
                f"from_pretrained: cache_implementation={cache_implementation!r} is not supported yet, only 'dynamic'"
            )
        parsed = Quantization.parse(quantization)
        return load(resolve(path), dtype=_DTYPES[dtype], quantization=parsed, activation=activation)
