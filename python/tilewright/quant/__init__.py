"""Weight formats: what is packed how, and the converters into it.

What matrices of Hugging Face checkpoints become. Their values are the format's, exactly, but for the rounding that is
named. Bits a weight count codes, scales and offsets for groups of 128 (NF4, FP4, HQQ: 64); the file's in brackets.

| file | codes and offset | rounding | bits |
|---|---|---|---|
| GPTQ 2, 3, 4 bits; AWQ | int4; none if all zero points are the middle, else zero | none | 4.19 (2.14, 3.15, 4.16) |
| GPTQ 8 bits | int8; the same, but min where a zero point is 256 | none | 8.19 (8.19) |
| bitsandbytes int8 | int8, one scale a row, outliers of x apart | SCB / 127 to float32 | 8 (8) |
| bitsandbytes NF4, FP4 | nf4, fp4; groups: blocks, or what they share with rows | none | 4.5 (4.5; nested 4.13) |
| HQQ, axis 1: 8, 6, 5 bits | int8; min = -zero * scale | min to float32, if metadata is float32 | 9 (8.5) |
| HQQ, axis 1: 4, 3, 2, 1 bits | int4; min | the same | 5 (4.5 to 1.5) |
| EETQ; int8 by row | int8, one scale a row | none | 8 (8) |
| compressed-tensors, 1 to 8 bits | int4, int5, int6 or int8; none if symmetric, else zero | none | 4.12 to 8.19 |
| compressed-tensors fp8; fp8 | e4m3; groups: columns of a block, scales repeated for its rows | none | 8.25 (8) |

Groups that the packed form lacks, multiples of 16 but not of 32, become groups of 16. Scales and minima take 2 bytes
where float16 or bfloat16 holds all of them exactly, else 4.
"""

from tilewright.quant.awq import from_awq
from tilewright.quant.bitsandbytes import from_bitsandbytes
from tilewright.quant.compressed_tensors import from_compressed_tensors
from tilewright.quant.fp8 import from_fp8
from tilewright.quant.gguf import from_gguf
from tilewright.quant.gptq import from_gptq
from tilewright.quant.hqq import from_hqq
from tilewright.quant.int8 import from_eetq, from_int8
from tilewright.quant.modules import QuantizedLinear, quantize_
from tilewright.quant.weight import QuantizedWeight, quantize_weight

__all__ = [
    "QuantizedLinear",
    "QuantizedWeight",
    "from_awq",
    "from_bitsandbytes",
    "from_compressed_tensors",
    "from_eetq",
    "from_fp8",
    "from_gguf",
    "from_gptq",
    "from_hqq",
    "from_int8",
    "quantize_",
    "quantize_weight",
]
