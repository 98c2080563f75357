"""The matrices of a model, dense or quantised, behind one interface: fp32 activations in, fp32 out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilewright.ops import quantized_linear
from tilewright.quant import QuantizedLinear, QuantizedWeight
from tilewright.quant.weight import FLOAT_CODES

# Packed weights store blocks of so many rows; only whole blocks can be stacked without repacking.
_BLOCK_ROWS = 32

Matrix = Tensor | QuantizedWeight


class DenseLinear(nn.Module):
    """`x @ weight.T + bias` for a dense weight (N, K), fp32 or bf16; bias (N,) fp32 or None.

    A bf16 weight multiplies bf16 activations (the sum is fp32 inside, rounded to bf16 once); the bias is
    added in fp32 after that.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: fp32 (..., K); returns fp32 (..., N)."""
        if self.weight.dtype == torch.float32:
            return F.linear(x, self.weight, self.bias)
        out = F.linear(x.to(self.weight.dtype), self.weight).float()
        return out if self.bias is None else out.add_(self.bias)


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
        return weight.rows(ids) if isinstance(weight, QuantizedWeight) else F.embedding(ids, weight).float()


def linear(weight: Matrix, bias: Tensor | None, activation: str) -> nn.Module:
    """The module for one matrix. `activation` as in `quantized_linear`; dense weights do not use it, and codes that
    are no integers (nf4, fp4, e4m3) take bf16 where it asks for integers, which would gain them nothing."""
    if isinstance(weight, QuantizedWeight):
        if activation.startswith("int8") and weight.codes in FLOAT_CODES:
            activation = "bf16"
        return QuantizedLinear.from_weight(weight, bias, activation=activation)
    return DenseLinear(weight, bias)


def stacked(weights: Sequence[Matrix], biases: Sequence[Tensor | None], activation: str) -> nn.Module:
    """One module for matrices with the same input: their rows stacked where the formats agree."""
    bias = None
    if any(part is not None for part in biases):
        filled = [
            torch.zeros(weight.shape[0]) if part is None else part for weight, part in zip(weights, biases, strict=True)
        ]
        bias = torch.cat(filled)
    if all(isinstance(weight, Tensor) and weight.dtype == weights[0].dtype for weight in weights):
        return linear(torch.cat(list(weights)), bias, activation)
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


def bound(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The module's forward as a plain function, without nn.Module's attribute look-ups in between."""
    if isinstance(module, QuantizedLinear):
        return partial(quantized_linear, weight=module.weight, bias=module.bias, activation=module.activation)
    if isinstance(module, DenseLinear) and module.weight.dtype == torch.float32:
        return partial(F.linear, weight=module.weight, bias=module.bias)
    return module.forward
