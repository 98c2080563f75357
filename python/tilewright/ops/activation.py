"""Gated activations of a transformer's MLP (https://arxiv.org/abs/2002.05202)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tilewright import _C
from tilewright.ops.registry import (
    check_backend,
    check_device,
    contiguous_last,
    direct,
    record_reference,
    register,
    served_by,
    twin,
)


def silu_mul(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """``gate * sigmoid(gate) * up``.

    gate, up: one shape and dtype, float32, bfloat16 or float16 (float64 runs the reference), any strides with
    a contiguous last dimension: the two halves of one tensor are read in place. Arithmetic is float32.

    Raises ValueError for other shapes or dtypes, NotImplementedError for a missing backend.
    """
    return _act_mul(gate, up, "silu", backend)


def gelu_mul(gate: Tensor, up: Tensor, approximate: str = "none", *, backend: str = "auto") -> Tensor:
    """``gelu(gate) * up``, as `silu_mul`.

    ``approximate`` as in torch: "none" for ``x * Phi(x)``, "tanh" for
    ``0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`` (https://arxiv.org/abs/1606.08415).
    """
    if approximate == "none":
        return _act_mul(gate, up, "gelu", backend)
    if approximate == "tanh":
        return _act_mul(gate, up, "gelu_tanh", backend)
    raise ValueError(f'gelu_mul: approximate must be "none" or "tanh", got {approximate!r}')


def silu_mul_reference(gate: Tensor, up: Tensor) -> Tensor:
    """`silu_mul` in float64."""
    return torch.nn.functional.silu(gate.double()) * up.double()


def gelu_mul_reference(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """`gelu_mul` in float64."""
    x = gate.double()
    if approximate == "none":  # by erfc: torch's 1 + erf has no digits left in the lower tail
        return 0.5 * x * torch.erfc(x * -math.sqrt(0.5)) * up.double()
    return torch.nn.functional.gelu(x, approximate=approximate) * up.double()


def _act_mul(gate: Tensor, up: Tensor, activation: str, backend: str) -> Tensor:
    if backend == "auto" and direct(gate, up):
        return _act_mul_cpu(gate, up, activation)
    op = _name(activation)
    check_backend(op, backend)
    check_device(op, gate=gate, up=up)
    return torch.ops.tilewright.act_mul(gate, up, activation, backend)


def _name(activation: str) -> str:
    return "silu_mul" if activation == "silu" else "gelu_mul"


def _act_mul_any(gate: Tensor, up: Tensor, activation: str, backend: str) -> Tensor:
    server = served_by(_name(activation), backend, gate)
    if server == "reference":
        record_reference(_name(activation))
        if activation == "silu":
            wide = silu_mul_reference(gate, up)
        else:
            wide = gelu_mul_reference(gate, up, "tanh" if activation == "gelu_tanh" else "none")
        return wide.to(gate.dtype).contiguous()
    if server != "cpu":
        return twin(server, "activation").act_mul(gate, up, activation)
    return _act_mul_cpu(gate, up, activation)


def _act_mul_cpu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if gate.dtype == torch.float64:
        return _act_mul_any(gate, up, activation, "reference")
    gate, up = contiguous_last(gate), contiguous_last(up)
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    _C.act_mul(gate, up, out, activation)
    return out


def _act_mul_fake(gate: Tensor, up: Tensor, activation: str, backend: str) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    gate, up, ctx.activation, _ = inputs
    ctx.save_for_backward(gate, up)


def _value_and_slope(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """act(x) and its derivative."""
    if activation == "silu":
        s = torch.sigmoid(x)
        return x * s, s * (1 + x * (1 - s))
    if activation == "gelu":
        phi = 0.5 * torch.erfc(x * -math.sqrt(0.5))
        return x * phi, phi + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    k = math.sqrt(2 / math.pi)
    t = torch.tanh(k * (x + 0.044715 * x * x * x))
    slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * k * (1 + 3 * 0.044715 * x * x)
    return 0.5 * x * (1 + t), slope


def _backward(ctx, grad):
    gate, up = ctx.saved_tensors
    wide = torch.promote_types(gate.dtype, torch.float32)
    value, slope = _value_and_slope(gate.to(wide), ctx.activation)
    grad_gate = (grad.to(wide) * up.to(wide) * slope).to(gate.dtype)
    return grad_gate, (grad.to(wide) * value).to(up.dtype), None, None


register(
    "act_mul(Tensor gate, Tensor up, str activation, str backend) -> Tensor",
    _act_mul_any,
    _act_mul_fake,
    on_gpu=True,
    backward=_backward,
    setup_context=_setup_context,
)
