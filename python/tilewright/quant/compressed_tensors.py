"""Weights in the formats of the compressed-tensors library: packed and plain integers, and fp8."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tilewright.quant.bitstream import unpack_bits
from tilewright.quant.fp8 import block_sizes, pack_fp8
from tilewright.quant.pieces import FLOATS, INDICES, expect, fit_groups, in_pieces, sort_groups
from tilewright.quant.weight import QuantizedWeight, pack

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_STRATEGIES = ("tensor", "channel", "group", "block")
_OP = "from_compressed_tensors"


@dataclass(frozen=True)
class WeightScheme:
    """One entry of config_groups, as far as it is about weights. block: (rows, columns) that share a scale, None for
    all or a whole dimension."""

    packed: bool
    floating: bool
    bits: int
    symmetric: bool
    strategy: str
    block: tuple[int | None, int | None]

    @classmethod
    def parse(cls, scheme: Mapping[str, Any]) -> WeightScheme:
        """From the group's dict, "format" included. Raises ValueError for what the library would not accept,
        NotImplementedError for what Tilewright does not have, naming the field."""
        weights = scheme.get("weights")
        if not isinstance(weights, Mapping):
            raise ValueError(f"{_OP}: scheme.weights must be an object, got {weights!r}")
        form = scheme.get("format")
        if form not in FORMATS:
            raise NotImplementedError(
                f"{_OP}: scheme.format {form!r} is not supported; supported: {', '.join(FORMATS)}"
            )
        bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
        if kind not in ("int", "float"):
            raise ValueError(f"{_OP}: scheme.weights.type must be 'int' or 'float', got {kind!r}")
        if not isinstance(bits, int) or isinstance(bits, bool) or not 1 <= bits <= 8:
            raise ValueError(f"{_OP}: scheme.weights.num_bits must be an integer from 1 to 8, got {bits!r}")
        if kind == "float" and bits != 8:
            raise NotImplementedError(f"{_OP}: scheme.weights.num_bits: {bits}-bit floats are not supported; 8-bit are")
        if kind == "float" and form in ("pack-quantized", "int-quantized"):
            raise ValueError(f"{_OP}: scheme.format {form!r} holds integers, but scheme.weights.type is 'float'")
        if kind == "int" and form == "float-quantized":
            raise ValueError(f"{_OP}: scheme.format {form!r} holds floats, but scheme.weights.type is 'int'")
        symmetric = weights.get("symmetric", True)
        if not isinstance(symmetric, bool):
            raise ValueError(f"{_OP}: scheme.weights.symmetric must be true or false, got {symmetric!r}")
        if kind == "float" and not symmetric:
            raise NotImplementedError(f"{_OP}: scheme.weights.symmetric: floats with a zero point are not supported")
        strategy, block = _strategy(weights)
        return cls(form == "pack-quantized", kind == "float", bits, symmetric, strategy, block)


def from_compressed_tensors(tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> QuantizedWeight:
    """A weight from its tensors in a checkpoint, under their names there without the module's.

    scheme: the entry of quantization_config.config_groups that covers the module, as a dict, with its "format" (or
    the config's): "pack-quantized" (1 to 8 bits: weight_packed int32 (N, ceil(K * bits / 32)), codes + 2**(bits-1) as
    one stream of bits a row, weight_shape (2,)), "int-quantized" (weight int8 (N, K)), "float-quantized" (weight
    float8_e4m3fn (N, K)), "naive-quantized" (either of these). weight_scale by scheme.weights.strategy: "tensor" (1,),
    "channel" (N, 1), "group" (N, K / group_size), "block". weight_zero_point where not symmetric: int8 in the shape of
    weight_scale, for pack-quantized groups and channels packed along N as codes are. weight_g_idx (K,): old act-order.

    ``w = (code - zero_point) * scale``, kept exactly; the library rounds that product to the dtype of weight_scale.
    How inputs and caches are quantised is not part of the weight. Raises TypeError, ValueError or NotImplementedError
    that names the tensor or field.
    """
    args = WeightScheme.parse(scheme)
    if args.floating:
        weight = expect(_OP, "weight", _required(tensors, "weight"), (torch.float8_e4m3fn,), (None, None))
        n, k = weight.shape
        scales = _spread(args, n, k, "weight_scale", _required(tensors, "weight_scale"), FLOATS).float()
        return pack_fp8(_OP, weight, scales, args.block[1] or max(k, 1), "compressed-tensors")
    if args.packed:
        n, k = _shape(tensors)
        width = -(-k * args.bits // 32)
        stored = expect(_OP, "weight_packed", _required(tensors, "weight_packed"), (torch.int32,), (n, width))
    else:
        stored = expect(_OP, "weight", _required(tensors, "weight"), (torch.int8,), (None, None))
        n, k = stored.shape
    scales = _spread(args, n, k, "weight_scale", _required(tensors, "weight_scale"), FLOATS).float()
    zeros = _zeros(args, n, k, tensors)

    group, columns = args.block[1] or max(k, 1), None
    if (g_idx := tensors.get("weight_g_idx")) is not None and args.strategy == "group":
        g_idx = expect(_OP, "weight_g_idx", g_idx, INDICES, (k,))
        if not bool((g_idx == -1).all()):  # the library's word for no order
            found, columns = sort_groups(_OP, "weight_g_idx", g_idx, scales.shape[1])
            if found != min(group, k):
                raise ValueError(f"{_OP}: weight_g_idx must have groups of {group} columns, got {found}")
    group, (scales, zeros) = fit_groups(_OP, group, k, scales, zeros)
    kind, bias = _kind(args.bits)
    top = 2**args.bits - 1

    def piece(rows: slice) -> QuantizedWeight:
        if args.packed:
            codes = unpack_bits(stored[rows].contiguous(), args.bits, k)
        else:
            codes = stored[rows].contiguous().view(torch.uint8) + 2 ** (args.bits - 1)
            if args.bits < 8 and bool((codes > top).any()):
                raise ValueError(f"{_OP}: weight must hold {args.bits}-bit codes, got some beyond")
        if columns is not None:
            codes = codes.gather(1, columns.expand(len(codes), -1))
        if zeros is None and bias:
            codes = codes + bias
        return pack(
            codes.contiguous(),
            scales[rows].contiguous(),
            None if zeros is None else zeros[rows].contiguous(),
            kind,
            group,
            "none" if zeros is None else "zero",
            "compressed-tensors",
            columns=columns,
        )

    return in_pieces((n, k), piece)


def _strategy(weights: Mapping[str, Any]) -> tuple[str, tuple[int | None, int | None]]:
    """The strategy's name and the rows and columns that share a scale."""
    group = weights.get("group_size")
    if group is not None and (not isinstance(group, int) or isinstance(group, bool) or not -1 <= group < 2**31):
        raise ValueError(f"{_OP}: scheme.weights.group_size must be a positive integer, -1 or null, got {group!r}")
    strategy = weights.get("strategy")
    if strategy is None:  # as the library infers it
        strategy = "tensor" if group is None else "channel" if group == -1 else "group"
    if strategy not in _STRATEGIES:
        raise NotImplementedError(
            f"{_OP}: scheme.weights.strategy {strategy!r} is not supported; supported: {', '.join(_STRATEGIES)}"
        )
    if strategy == "group":
        if group is None or group < 1:
            raise ValueError(f"{_OP}: scheme.weights.group_size must be positive for strategy 'group', got {group!r}")
        return strategy, (1, group)
    if strategy == "block":
        sizes = weights.get("block_structure")
        try:
            sizes = [int(size) for size in sizes.split("x")] if isinstance(sizes, str) else sizes
            return strategy, block_sizes(_OP, sizes)
        except ValueError:
            raise ValueError(
                f"{_OP}: scheme.weights.block_structure must be two positive integers, got {sizes!r}"
            ) from None
    return strategy, (None if strategy == "tensor" else 1, None)


def _required(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"{_OP}: expected a tensor {name}, got {', '.join(tensors) or 'none'}")
    return tensors[name]


def _shape(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """weight_shape, if it can be that of weight_packed."""
    packed = expect(_OP, "weight_packed", _required(tensors, "weight_packed"), (torch.int32,), (None, None))
    n, k = expect(_OP, "weight_shape", _required(tensors, "weight_shape"), INDICES, (2,)).tolist()
    if n != packed.shape[0] or not 0 <= k <= 32 * packed.shape[1]:
        raise ValueError(f"{_OP}: weight_shape must fit weight_packed {tuple(packed.shape)}, got {(n, k)}")
    return n, k


def _spread(args: WeightScheme, n: int, k: int, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """A tensor of one value for each scale, as (N, groups)."""
    rows, columns = (n if args.block[0] is None else args.block[0]), args.block[1] or max(k, 1)
    shape = (-(-n // max(rows, 1)), -(-k // columns))
    if args.strategy in ("tensor", "channel") and isinstance(tensor, Tensor) and tensor.dim() < 2:
        shape = (1,) * tensor.dim() if args.strategy == "tensor" else shape[:1]  # (), (1,) or (N,), as some writers do
    tensor = expect(_OP, name, tensor, dtypes, shape)
    if tensor.dim() < 2:
        tensor = tensor.reshape(-1, 1)
    return tensor if rows == 1 else tensor.repeat_interleave(rows, 0)[:n]


def _zeros(args: WeightScheme, n: int, k: int, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Zero points of the unsigned codes, uint8 (N, groups); None for symmetric weights."""
    name = "weight_zero_point"
    if args.symmetric:
        zeros = tensors.get(name)  # some writers store them, all 0
        if isinstance(zeros, Tensor) and bool(zeros.any()):
            raise ValueError(f"{_OP}: {name} must be 0 where scheme.weights.symmetric, got other values")
        return None
    zeros = _required(tensors, name)
    if args.packed and args.strategy in ("group", "channel"):
        groups = -(-k // (args.block[1] or max(k, 1)))
        zeros = expect(_OP, name, zeros, (torch.int32,), (-(-n * args.bits // 32), groups))
        return unpack_bits(zeros.t().contiguous(), args.bits, n).t()
    zeros = _spread(args, n, k, name, zeros, (torch.int8,)).view(torch.uint8) + 2 ** (args.bits - 1)
    if bool((zeros > 2**args.bits - 1).any()):
        raise ValueError(f"{_OP}: {name} must hold {args.bits}-bit codes, got some beyond")
    return zeros


def _kind(bits: int) -> tuple[str, int]:
    """The packed codes for so many bits, and what is added to symmetric ones so that their middle is that codes'."""
    width = next(width for width in (4, 5, 6, 8) if bits <= width)
    return f"int{width}", 2 ** (width - 1) - 2 ** (bits - 1)
