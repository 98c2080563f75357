"""The matrices of a model, dense or quantised, behind one interface: fp32 activations in, fp32 out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilewright.ops import gated_mlp, quantized_linear, silu_mul
from tilewright.ops.bound import fusable_modules
from tilewright.quant import QuantizedLinear, QuantizedWeight
from tilewright.quant.weight import FLOAT_CODES, pack_bf16

# Packed weights store blocks of so many rows; only whole blocks can be stacked without repacking.
_BLOCK_ROWS = 32

Matrix = Tensor | QuantizedWeight


class DenseLinear(nn.Module):
    """`x @ weight.T + bias` for an fp32 weight (N, K); bias (N,) fp32 or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: fp32 (..., K); returns fp32 (..., N)."""
        return F.linear(x, self.weight, self.bias)


class Parallel(nn.Module):
    """Matrices that read the same input, outputs side by side: for formats that cannot be stacked."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        """x: fp32 (..., K); returns fp32 (..., sum of N)."""
        return torch.cat([part(x) for part in self.parts], dim=-1)


class Embedding(nn.Module):
    """Rows of a matrix (vocab, hidden) as fp32. `matrix` is a module of this file; a tied head shares it."""

    def __init__(self, matrix: nn.Module) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, ids: Tensor) -> Tensor:
        """ids: int64 (batch, seq), in range; returns fp32 (batch, seq, hidden)."""
        weight = self.matrix.weight
        return weight.rows(ids) if isinstance(weight, QuantizedWeight) else F.embedding(ids, weight)


def linear(weight: Matrix, bias: Tensor | None, activation: str) -> nn.Module:
    """The module for one matrix, dense ones fp32 or bf16. `activation` as in `quantized_linear`; dense weights do not
    use it (bf16 takes bf16), and codes that are no integers (nf4, fp4, e4m3) take bf16 where it asks for integers,
    which would gain them nothing."""
    if isinstance(weight, Tensor):
        if weight.dtype == torch.float32:
            return DenseLinear(weight, bias)
        weight, activation = pack_bf16(weight), "bf16"
    if activation.startswith("int8") and weight.codes in FLOAT_CODES:
        activation = "bf16"
    return QuantizedLinear.from_weight(weight, bias, activation=activation)


def stacked(weights: Sequence[Matrix], biases: Sequence[Tensor | None], activation: str) -> nn.Module:
    """One module for matrices with the same input: their rows stacked where the formats agree."""
    bias = None
    if any(part is not None for part in biases):
        filled = [
            torch.zeros(weight.shape[0]) if part is None else part for weight, part in zip(weights, biases, strict=True)
        ]
        bias = torch.cat(filled)
    if all(isinstance(weight, Tensor) and weight.dtype == weights[0].dtype for weight in weights):
        if weights[0].dtype == torch.bfloat16 and all(weight.shape[0] % _BLOCK_ROWS == 0 for weight in weights[:-1]):
            return linear(pack_bf16(*weights), bias, "bf16")
        return linear(torch.cat(list(weights)), bias, activation)  # in memory of its own, not the file's
    if len(weights) == 1:
        return linear(weights[0], bias, activation)
    packed = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
    if len(packed) == len(weights) and _stackable(packed):
        return linear(QuantizedWeight.concat(packed), bias, activation)
    return Parallel([linear(*part, activation) for part in zip(weights, biases, strict=True)])


def _stackable(weights: Sequence[QuantizedWeight]) -> bool:
    return all(
        weight.spec()[1:] == weights[0].spec()[1:] and weight.reads_like(weights[0]) for weight in weights
    ) and all(weight.shape[0] % _BLOCK_ROWS == 0 for weight in weights[:-1])


def dense_dtype(module: nn.Module) -> torch.dtype | None:
    """What a module's matrices are exactly, float32 or bfloat16; None for quantised and mixed ones."""
    if isinstance(module, Parallel):
        dtypes = {dense_dtype(part) for part in module.parts}
        return dtypes.pop() if len(dtypes) == 1 else None
    if isinstance(module, DenseLinear):
        return torch.float32
    return torch.bfloat16 if module.weight.codes == "bf16" else None


def dense_rows(module: nn.Module, first: int, last: int) -> Tensor:
    """Rows of a dense module's matrix, (last - first, K)."""
    if isinstance(module, DenseLinear):
        return module.weight[first:last]
    return module.weight.rows(torch.arange(first, last)).bfloat16()


def bound(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The module's forward as a plain function, without nn.Module's attribute look-ups in between."""
    if isinstance(module, QuantizedLinear):
        return partial(quantized_linear, weight=module.weight, bias=module.bias, activation=module.activation)
    if isinstance(module, DenseLinear):
        return partial(F.linear, weight=module.weight, bias=module.bias)
    return module.forward


def bound_residual(module: nn.Module) -> Callable[..., Tensor]:
    """As `bound`: residual + module(x) of (x, *, residual)."""
    if isinstance(module, QuantizedLinear):
        return bound(module)
    return partial(_add, bound(module))


def bound_mlp(gate_up: nn.Module, down: nn.Module) -> Callable[..., Tensor]:
    """residual + down(silu(gate(x)) * up(x)) of (x, *, residual), in one call where the kernel takes both matrices."""
    if fusable_modules(gate_up, down):
        return partial(
            gated_mlp,
            gate_up=gate_up.weight,
            down=down.weight,
            gate_up_bias=gate_up.bias,
            down_bias=down.bias,
            activation=down.activation,
        )
    return partial(_mlp, bound(gate_up), bound_residual(down))


def _add(call: Callable[[Tensor], Tensor], x: Tensor, *, residual: Tensor) -> Tensor:
    return call(x).add_(residual)


def _mlp(gate_up: Callable[[Tensor], Tensor], down: Callable[..., Tensor], x: Tensor, *, residual: Tensor) -> Tensor:
    return down(silu_mul(*gate_up(x).chunk(2, dim=-1)), residual=residual)
