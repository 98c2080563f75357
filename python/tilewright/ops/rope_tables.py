"""The cos and sin tables of `rope`, with the frequency scalings that checkpoints name.

Angles are float32(inv_freq) * float32(position), as transformers computes them, so that both libraries
rotate by the same bits. Sources of the scalings: linear and dynamic NTK, r/LocalLLaMA; yarn,
https://arxiv.org/abs/2309.00071; llama3, the Llama 3.1 release; longrope, https://arxiv.org/abs/2402.13753.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def rope_tables(
    theta: float,
    head_dim: int,
    max_positions: int,
    scaling: Mapping[str, Any] | None = None,
    seq_len: int | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 (max_positions, rotary_dim / 2), of ``position * theta ** (-2i / rotary_dim)``.

    ``scaling`` is a config's ``rope_scaling`` or ``rope_parameters``: "rope_type" (or "type") is default,
    linear, dynamic, yarn, llama3 or longrope, the other keys are transformers'; rotary_dim is ``head_dim``
    times its "partial_rotary_factor", if any. ``theta`` counts, whatever "rope_theta" says. The attention
    factor of yarn and longrope is folded into both tables. ``seq_len`` is the length that dynamic and
    longrope (short or long factors) scale for. Where transformers reads the config's max_position_embeddings,
    ``max_positions`` stands in: "original_max_position_embeddings" of dynamic, "factor" of longrope.

    Raises ValueError, naming the field, for an unknown type and a missing or impossible field.
    """
    if not (theta > 0 and math.isfinite(theta)):
        raise ValueError(f"rope_tables: theta must be positive and finite, got {theta}")
    if max_positions < 0:
        raise ValueError(f"rope_tables: max_positions must be at least 0, got {max_positions}")
    fields = _Fields(scaling or {}, max_positions, seq_len)
    dim = int(head_dim * fields.number("partial_rotary_factor", 1.0))
    if dim < 2 or dim % 2 or dim > head_dim:
        raise ValueError(
            f"rope_tables: the rotary dimension must be even, at least 2 and at most head_dim ({head_dim}), got {dim}"
        )
    inv_freq, attention_factor = _TYPES[fields.type](float(theta), dim, fields)
    angles = torch.arange(max_positions).float().unsqueeze(1) * inv_freq
    return angles.cos() * attention_factor, angles.sin() * attention_factor


class _Fields:
    """The scaling dict, read field by field with errors that name the field."""

    def __init__(self, values: Mapping[str, Any], max_positions: int, seq_len: int | None) -> None:
        self.values = values
        self.max_positions, self.seq_len = max_positions, seq_len
        self.type = values.get("rope_type", values.get("type", "default"))
        if self.type not in _TYPES:
            raise ValueError(f"rope_tables: rope_type must be one of {', '.join(_TYPES)}, got {self.type!r}")

    def number(self, name: str, default: float | None = None) -> float:
        value = self.values.get(name)
        if value is None:
            if default is None:
                raise ValueError(f"rope_tables: rope_type {self.type!r} needs the field {name!r}")
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"rope_tables: {name} must be a positive number, got {value!r}")
        return value

    def numbers(self, name: str, count: int) -> Tensor:
        value = self.values.get(name)
        if value is None:
            raise ValueError(f"rope_tables: rope_type {self.type!r} needs the field {name!r}")
        if not isinstance(value, list | tuple) or len(value) != count:
            raise ValueError(f"rope_tables: {name} must be a list of {count} numbers, got {value!r}")
        return torch.tensor(value, dtype=torch.float32)


def _powers(theta: float | Tensor, dim: int) -> Tensor:
    return theta ** (torch.arange(0, dim, 2).float() / dim)


def _default(theta: float, dim: int, fields: _Fields) -> tuple[Tensor, float]:
    return 1.0 / _powers(theta, dim), 1.0


def _linear(theta: float, dim: int, fields: _Fields) -> tuple[Tensor, float]:
    return 1.0 / _powers(theta, dim) / fields.number("factor"), 1.0


def _dynamic(theta: float, dim: int, fields: _Fields) -> tuple[Tensor, float]:
    factor = fields.number("factor")
    original = fields.number("original_max_position_embeddings", fields.max_positions)
    if fields.seq_len is None or fields.seq_len <= original or dim == 2:
        return _default(theta, dim, fields)
    # In float32 from here on: transformers grows its tables with the length in a tensor.
    stretch = factor * torch.tensor(fields.seq_len) / original - (factor - 1)
    return 1.0 / _powers(theta * stretch ** (dim / (dim - 2)), dim), 1.0


def _yarn(theta: float, dim: int, fields: _Fields) -> tuple[Tensor, float]:
    factor = fields.number("factor")
    original = fields.number("original_max_position_embeddings")

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    attention_factor = mscale(1.0)
    if fields.values.get("attention_factor") is not None:
        attention_factor = fields.number("attention_factor")
    elif fields.values.get("mscale") and fields.values.get("mscale_all_dim"):
        attention_factor = mscale(fields.number("mscale")) / mscale(fields.number("mscale_all_dim"))

    def channel(rotations: float) -> float:  # the pair that turns this often over the original context
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel(fields.number("beta_fast", 32)), channel(fields.number("beta_slow", 1))
    if fields.values.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2).float() - low) / ((high - low) or 0.001)
    keep = 1 - ramp.clamp(0, 1)  # 1: the pair turns fast and stays as it is, 0: it is interpolated
    powers = _powers(theta, dim)
    return 1.0 / (factor * powers) * (1 - keep) + 1.0 / powers * keep, attention_factor


def _llama3(theta: float, dim: int, fields: _Fields) -> tuple[Tensor, float]:
    factor = fields.number("factor")
    low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
    original = fields.number("original_max_position_embeddings")
    if high <= low:
        raise ValueError(f"rope_tables: high_freq_factor must exceed low_freq_factor ({low}), got {high}")
    inv_freq = 1.0 / _powers(theta, dim)
    wavelength = 2 * math.pi / inv_freq
    blend = (original / wavelength - low) / (high - low)
    scaled = torch.where(wavelength > original / low, inv_freq / factor, inv_freq)
    between = (wavelength >= original / high) & (wavelength <= original / low)
    return torch.where(between, (1 - blend) * scaled / factor + blend * scaled, scaled), 1.0


def _longrope(theta: float, dim: int, fields: _Fields) -> tuple[Tensor, float]:
    original = fields.number("original_max_position_embeddings")
    factor = fields.number("factor", fields.max_positions / original)
    inferred = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    long = (fields.seq_len or 0) > original
    factors = fields.numbers("long_factor" if long else "short_factor", dim // 2)
    return 1.0 / (factors * _powers(theta, dim)), fields.number("attention_factor", inferred)


_TYPES: dict[str, Callable[[float, int, _Fields], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
