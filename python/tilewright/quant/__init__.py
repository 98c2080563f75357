"""Weight formats: what is packed how, and the converters into it. docs/formats.md says what each format becomes."""

from tilewright.quant.awq import from_awq
from tilewright.quant.bitsandbytes import from_bitsandbytes
from tilewright.quant.compressed_tensors import from_compressed_tensors
from tilewright.quant.fp8 import from_fp8
from tilewright.quant.gguf import from_gguf
from tilewright.quant.gptq import from_gptq
from tilewright.quant.hqq import from_hqq
from tilewright.quant.int8 import from_eetq, from_int8
from tilewright.quant.modules import QuantizedLinear, quantize_
from tilewright.quant.quantize import quantize_weight
from tilewright.quant.weight import QuantizedWeight

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
