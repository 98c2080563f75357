"""Weight formats: what is packed how, and the converters into it."""

from tilewright.quant.gguf import from_gguf
from tilewright.quant.modules import QuantizedLinear, quantize_
from tilewright.quant.weight import QuantizedWeight, quantize_weight

__all__ = ["QuantizedLinear", "QuantizedWeight", "from_gguf", "quantize_", "quantize_weight"]
