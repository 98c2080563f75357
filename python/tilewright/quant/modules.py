"""QuantizedLinear, and the swap of a model's linears for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from tilewright.ops.linear import ACTIVATIONS, quantized_linear
from tilewright.quant.quantize import quantize_weight
from tilewright.quant.weight import QuantizedWeight, empty_packed


class QuantizedLinear(nn.Module):
    """``y = x @ w.T + bias`` with a quantised ``w`` of shape (out_features, in_features).

    The packed weight is the buffer `packed`, beside it `columns` where the weight has an order of columns, and the
    bias the parameter `bias` (float32), so state_dict, pickle and deepcopy work; the description of the format
    travels as the module's extra state. A new module holds zeros until a state dict is loaded; `from_linear` and
    `from_weight` fill it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        bits: int = 4,
        group_size: int = 32,
        *,
        activation: str = "int8",
        offset: str = "none",
        scale: str = "f16",
        codes: str | None = None,
        columns: bool = False,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"QuantizedLinear: activation must be one of {ACTIVATIONS}, got {activation!r}")
        self.in_features, self.out_features, self.activation = in_features, out_features, activation
        self._format = (codes or f"int{bits}", group_size, offset, scale, "", 0.0)
        shape = (out_features, in_features)
        self.packed: Tensor
        self.columns: Tensor | None
        self.register_buffer("packed", empty_packed(shape, *self._format[:4], "cpu").zero_())
        self.register_buffer("columns", torch.arange(in_features) if columns else None)
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None

    @classmethod
    def from_weight(
        cls, weight: QuantizedWeight, bias: Tensor | None = None, activation: str = "int8"
    ) -> QuantizedLinear:
        """Around an existing QuantizedWeight, which is not copied."""
        n, k = weight.shape
        module = cls(k, 0, bias=False, activation=activation)
        module.out_features = n
        module._format = (
            weight.codes, weight.group_size, weight.offset, weight.scale, weight.source, weight.outlier_threshold
        )  # fmt: skip
        module.packed, module.columns = weight.packed, weight.columns
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().float().contiguous(), requires_grad=False)
        return module

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        bits: int = 4,
        group_size: int = 32,
        *,
        symmetric: bool = True,
        activation: str = "int8",
    ) -> QuantizedLinear:
        """From nn.Linear, or GPT-2's Conv1D, whose weight is (in, out)."""
        weight = linear.weight
        if not isinstance(linear, nn.Linear):
            weight = weight.t()
        quantized = quantize_weight(weight.detach(), bits, group_size, symmetric)
        return cls.from_weight(quantized, linear.bias, activation)

    @property
    def weight(self) -> QuantizedWeight:
        """The weight as kernels take it; shares `packed`."""
        codes, group_size, offset, scale, source, threshold = self._format
        shape = (self.out_features, self.in_features)
        return QuantizedWeight(self.packed, shape, codes, group_size, offset, scale, source, self.columns, threshold)

    def forward(self, x: Tensor) -> Tensor:
        return quantized_linear(x, self.weight, self.bias, activation=self.activation)

    def get_extra_state(self) -> tuple:
        return self._format

    def set_extra_state(self, state: tuple) -> None:
        if tuple(state)[:4] != self._format[:4]:
            raise ValueError(
                f"QuantizedLinear: the state dict holds the format {tuple(state)[:4]} (codes, group_size, offset, "
                f"scale), this module has {self._format[:4]}; create it with the same arguments"
            )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.weight.format}, activation={self.activation}"
        )


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's Conv1D, recognised without importing transformers."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def quantize_(
    module: nn.Module,
    bits: int = 4,
    group_size: int = 32,
    *,
    activation: str = "int8",
    skip: str | Iterable[str] = ("lm_head",),
    filter: Callable[[nn.Module, str], bool] | None = None,
) -> nn.Module:
    """Replace every nn.Linear (and GPT-2's Conv1D) inside ``module`` by a QuantizedLinear, in place.

    A module stays as it is if its dotted name, or the last part of it, stands in ``skip``, or if
    ``filter(submodule, name)`` is false. Subclasses of nn.Linear are left alone: their forward may differ; so are
    linears whose weight is computed (weight norm). Forward hooks move to the new module. One layer is converted at a
    time, and its dense weight is let go before the next. Returns ``module``.
    """
    skipped = {skip} if isinstance(skip, str) else set(skip)
    if isinstance(module, nn.Linear):
        raise ValueError("quantize_: module is itself a Linear; use QuantizedLinear.from_linear")
    # Places by child, so that a module that is registered twice stays shared. Names only: what holds on to a child
    # here would keep its weight in memory until the end.
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent_name, parent in module.named_modules():
        for name, child in parent._modules.items():  # named_children() hides second names
            full = f"{parent_name}.{name}" if parent_name else name
            if (type(child) is not nn.Linear and not _is_conv1d(child)) or full in skipped or name in skipped:
                continue
            if "weight" not in child._parameters or (filter is not None and not filter(child, full)):
                continue
            places.setdefault(id(child), []).append((parent, name))
    for registered in places.values():
        first, name = registered[0]
        new = _replacement(first._modules[name], bits, group_size, activation)
        for parent, name in registered:
            setattr(parent, name, new)
    return module


def _replacement(linear: nn.Module, bits: int, group_size: int, activation: str) -> QuantizedLinear:
    new = QuantizedLinear.from_linear(linear, bits, group_size, activation=activation)
    new.train(linear.training)
    vars(new).update({name: hooks for name, hooks in vars(linear).items() if name.startswith("_forward_")})
    return new
