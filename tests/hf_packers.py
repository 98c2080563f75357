"""Random weights in the formats of Hugging Face checkpoints, written from each format's definition in plain Python and
numpy: the tensors as files hold them, and the matrix that they mean, in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class Stored:
    """tensors: by the last part of their name in a file. w: float64 (N, K). config: the quantization_config."""

    tensors: dict[str, Tensor]
    w: Tensor
    config: dict[str, Any] = field(default_factory=dict)


def tensor(array: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
    made = torch.from_numpy(np.ascontiguousarray(array))
    return made if dtype is None else made.to(dtype)


def floats(
    rng: np.random.Generator, shape: tuple[int, ...], bits: int, dtype: torch.dtype
) -> tuple[Tensor, np.ndarray]:
    """Scales that make weights of about 0.1 of codes of so many bits: in the dtype, and the same in float64."""
    made = tensor(rng.uniform(0.1, 0.4, shape) / 2**bits).to(dtype)
    return made, made.double().numpy()


def stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Each row as one number, code i in bits i * bits and up, cut into 32-bit words, lowest first."""
    words = -(-codes.shape[1] * bits // 32)
    rows = []
    for row in codes.tolist():
        number = sum(code << (i * bits) for i, code in enumerate(row))
        rows.append([(number >> (32 * word)) & 0xFFFFFFFF for word in range(words)])
    return np.array(rows, dtype=np.uint32).reshape(len(rows), words).view(np.int32)


def gptq(
    rng: np.random.Generator,
    n: int,
    k: int,
    bits: int = 4,
    group: int = 32,
    *,
    act_order: bool | int = False,
    version: int = 1,
    symmetric: bool = False,
    largest_zero: bool = False,
    scale: torch.dtype = torch.float16,
) -> Stored:
    """AutoGPTQ's layout: codes packed along K, zero points along N, in version 1 less one. act_order: True, or a seed
    that gives matrices the same order."""
    group = k if group == -1 else group
    groups = -(-k // group)
    g_idx = np.arange(k) // group
    if act_order:
        # The tools take the columns by importance and give every `group` of them the next index.
        order = rng if act_order is True else np.random.default_rng(act_order)
        g_idx[order.permutation(k)] = np.arange(k) // group
    codes = rng.integers(0, 2**bits, (k, n))
    zeros = rng.integers(version == 1, 2**bits, (groups, n))
    if largest_zero:
        zeros[0, 0] = 2**bits
    if symmetric:
        zeros[:] = 2 ** (bits - 1)
    scales, exact = floats(rng, (groups, n), bits, scale)
    w = exact[g_idx] * (codes - zeros[g_idx])
    tensors = {
        "qweight": tensor(stream(codes.T, bits).T),
        "qzeros": tensor(stream(zeros - (version == 1), bits)),
        "scales": scales,
        "g_idx": tensor(g_idx, torch.int32),
    }
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": bool(act_order),
        "sym": symmetric,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    return Stored(tensors, tensor(w.T), config)


def awq(rng: np.random.Generator, n: int, k: int, group: int = 32, *, symmetric: bool = False) -> Stored:
    """AutoAWQ's gemm layout: 8 outputs a word, output 0 2 4 6 1 3 5 7 from the lowest nibble up."""
    groups = k // group
    codes = rng.integers(0, 16, (k, n))
    zeros = np.full((groups, n), 8) if symmetric else rng.integers(0, 16, (groups, n))
    scales, exact = floats(rng, (groups, n), 4, torch.float16)

    def packed(values: np.ndarray) -> np.ndarray:
        eights = values.reshape(values.shape[0], -1, 8)
        words = sum(eights[..., output] << (4 * nibble) for nibble, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))
        return words.astype(np.uint32).view(np.int32)

    w = exact.repeat(group, 0) * (codes - zeros.repeat(group, 0))
    tensors = {"qweight": tensor(packed(codes)), "qzeros": tensor(packed(zeros)), "scales": scales}
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return Stored(tensors, tensor(w.T), config)


def llm_int8(rng: np.random.Generator, n: int, k: int) -> Stored:
    """bitsandbytes' int8: w = CB * SCB / 127."""
    codes = rng.integers(-127, 128, (n, k))
    scb = tensor(rng.uniform(0.2, 0.6, n), torch.float32)
    w = codes * (scb / 127).double().numpy()[:, None]
    tensors = {"weight": tensor(codes, torch.int8), "SCB": scb, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}
    return Stored(tensors, tensor(w), config)


NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
FP4 = [0, 0.0625 / 12, 8 / 12, 1, 4 / 12, 6 / 12, 2 / 12, 3 / 12]
FP4 = FP4 + [-value for value in FP4]


def four_bit(
    rng: np.random.Generator, n: int, k: int, kind: str = "nf4", blocksize: int = 64, *, nested: int = 0
) -> Stored:
    """bitsandbytes' 4 bits over the flattened weight, the first of two elements in the high nibble; nested: the
    blocksize of absmax where that is quantised itself."""
    table = torch.tensor(NF4 if kind == "nf4" else FP4, dtype=torch.float32)
    codes = rng.integers(0, 16, n * k)
    blocks = -(-n * k // blocksize)
    entries: dict[str, Any] = {"quant_type": kind, "blocksize": blocksize, "dtype": "float16", "shape": [n, k]}
    tensors = {}
    if nested:
        inner_codes = rng.integers(0, 256, blocks)
        inner_table = tensor(np.sort(rng.uniform(-1, 1, 256)), torch.float32)
        inner_absmax = tensor(rng.uniform(0.05, 0.15, -(-blocks // nested)), torch.float32)
        offset = 0.2501
        entries |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": offset}
        wide = inner_absmax[torch.arange(blocks) // nested]
        absmax = inner_table[tensor(inner_codes)] * wide + torch.tensor(offset)  # float32, as bitsandbytes does it
        tensors |= {
            "weight.absmax": tensor(inner_codes, torch.uint8),
            "weight.nested_absmax": inner_absmax,
            "weight.nested_quant_map": inner_table,
        }
    else:
        absmax = tensor(rng.uniform(0.1, 0.4, blocks), torch.float32)
        tensors["weight.absmax"] = absmax
    w = table.double().numpy()[codes] * absmax.double().numpy()[np.arange(n * k) // blocksize]
    pairs = np.append(codes, 0) if len(codes) % 2 else codes
    tensors |= {
        "weight": tensor((pairs[::2] << 4 | pairs[1::2]).astype(np.uint8)[:, None]),
        "weight.quant_map": table,
        f"weight.quant_state.bitsandbytes__{kind}": torch.tensor(list(json.dumps(entries).encode()), dtype=torch.uint8),
    }
    config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": bool(nested),
    }
    return Stored(tensors, tensor(w.reshape(n, k)), config)


PACKINGS = {8: "8bit_u8", 6: "8bit_u8", 5: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}


def hqq_pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """codes (rows, columns): the first share of the rows in the highest bits of each word, and so on."""
    if PACKINGS[bits] == "8bit_u8":
        return codes.astype(np.uint8)
    parts = 10 if bits == 3 else 8 // bits
    if bits == 3:
        codes = np.pad(codes, ((0, -len(codes) % 10), (0, 0)))
    shares = codes.reshape(parts, -1, codes.shape[1])
    words = sum(share << (bits * (parts - 1 - i)) for i, share in enumerate(shares))
    return words.astype(np.int32 if bits == 3 else np.uint8)


def hqq(
    rng: np.random.Generator,
    n: int,
    k: int,
    bits: int = 4,
    group: int | None = 32,
    *,
    dtype: torch.dtype = torch.float16,
) -> Stored:
    """HQQ with axis 1: w = (code - zero) * scale in groups of the flattened weight."""
    size = k if group is None else group
    codes = rng.integers(0, 2**bits, (n * k // size, size))
    scale, exact = floats(rng, (len(codes), 1), bits, dtype)
    zero = tensor(rng.uniform(0, 2**bits, (len(codes), 1)), dtype)
    w = (codes - zero.double().numpy()) * exact
    tensors = {"W_q": tensor(hqq_pack(codes, bits)), "scale": scale, "zero": zero}
    plain = {
        "nbits": torch.tensor(bits, dtype=torch.int32),
        "shape": torch.tensor([n, k]),
        "axis": torch.tensor(1, dtype=torch.int32),
        "packing": torch.tensor([ord(letter) for letter in PACKINGS[bits]], dtype=torch.uint8),
        "unpack_view_dtype": torch.tensor([ord(letter) for letter in "torch.uint8"], dtype=torch.uint8),
        "compute_dtype": torch.tensor([ord(letter) for letter in str(dtype)], dtype=torch.uint8),
    }
    if group is not None:
        plain["group_size"] = torch.tensor(group, dtype=torch.int32)
    flags = ("view_as_float", "quant_scale", "quant_zero", "offload_meta", "encoded_state_dict", "stores_quant_config")
    flags += ("channel_wise", "optimize", "round_zero")
    plain |= {flag: torch.tensor(flag in flags[4:8], dtype=torch.uint8) for flag in flags}
    config = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": bits}}, "skip_modules": []}
    return Stored(tensors | plain, tensor(w.reshape(n, k)), config)


def cutlass_order(codes: np.ndarray) -> np.ndarray:
    """FasterTransformer's preprocessing of int8 (K, N) for sm_75 to sm_89, step by step as its C++ does it."""
    k, n = codes.shape
    # 1. Rows of each 16 are permuted: 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15.
    rows = [16 * (row // 16) + 8 * (row % 16 % 4 // 2) + row % 2 + 2 * (row % 16 // 4) for row in range(k)]
    # 2. Column major.
    columns = codes[rows].T.copy()
    # 3. Two columns are interleaved in tiles of 64 rows, written as words of 4.
    words = columns.reshape(n, k // 4, 4)
    out = np.zeros((n // 2, k // 2, 4), dtype=words.dtype)
    for column in range(n):
        for base in range(0, k // 4, 16):
            for word in range(base, base + 16):
                out[column // 2, 2 * base + 16 * (column % 2) + word % 16] = words[column, word]
    # 4. 128 is added, and the two bytes in the middle of each word change places.
    return (out[..., [0, 2, 1, 3]].reshape(k, n).astype(np.int64) + 128).astype(np.uint8).view(np.int8)


def eetq(rng: np.random.Generator, n: int, k: int) -> Stored:
    codes = rng.integers(-128, 128, (n, k))
    scales, exact = floats(rng, (n,), 8, torch.float16)
    tensors = {"weight": tensor(cutlass_order(codes.T)), "weight_scales": scales}
    return Stored(tensors, tensor(codes * exact[:, None]), {"quant_method": "eetq", "weights": "int8"})


def spread(values: np.ndarray, n: int, k: int, rows: int, columns: int) -> np.ndarray:
    return values.repeat(rows, 0)[:n].repeat(columns, 1)[:, :k]


def compressed_tensors(
    rng: np.random.Generator,
    n: int,
    k: int,
    form: str = "pack-quantized",
    bits: int = 4,
    strategy: str = "group",
    *,
    group: int = 32,
    block: tuple[int, int] = (32, 32),
    symmetric: bool = True,
    act_order: bool = False,
    scale: torch.dtype = torch.bfloat16,
    floating: bool = False,
) -> Stored:
    """compressed-tensors: signed codes; pack-quantized ones are stored plus half their range."""
    shared = {"tensor": (n, k), "channel": (1, k), "group": (1, group), "block": block}[strategy]
    grid = (-(-n // shared[0]), -(-k // shared[1]))
    scales, exact = floats(rng, grid, 9 if floating else bits, scale)
    stored_scales = scales.reshape(1) if strategy == "tensor" else scales
    half = 2 ** (bits - 1)
    zeros = np.zeros(grid, dtype=np.int64) if symmetric else rng.integers(-half, half, grid)
    g_idx = np.arange(k) // shared[1]
    if act_order:
        g_idx[rng.permutation(k)] = np.arange(k) // shared[1]
    tensors = {"weight_scale": stored_scales}
    if floating:
        raw = rng.integers(0, 256, (n, k)).astype(np.uint8)
        raw[(raw & 0x7F) == 0x7F] = 0x40  # NaN
        weight = tensor(raw).view(torch.float8_e4m3fn)
        codes = weight.double().numpy()
        tensors["weight"] = weight
    else:
        codes = rng.integers(-half, half, (n, k))
        if form == "pack-quantized":
            tensors["weight_packed"] = tensor(stream(codes + half, bits))
            tensors["weight_shape"] = torch.tensor([n, k])
        else:
            tensors["weight"] = tensor(codes, torch.int8)
        if not symmetric and form == "pack-quantized" and strategy != "tensor":
            tensors["weight_zero_point"] = tensor(stream((zeros + half).T, bits).T)
        elif not symmetric:
            tensors["weight_zero_point"] = tensor(zeros, torch.int8).reshape(stored_scales.shape)
        if act_order:
            tensors["weight_g_idx"] = tensor(g_idx, torch.int32)
    by_row = spread(exact, n, grid[1], shared[0], 1), spread(zeros, n, grid[1], shared[0], 1)
    w = (codes - by_row[1][:, g_idx]) * by_row[0][:, g_idx]
    weights = {
        "num_bits": bits,
        "type": "float" if floating else "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group if strategy == "group" else None,
        "block_structure": list(block) if strategy == "block" else None,
        "dynamic": False,
        "actorder": "group" if act_order else None,
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head"],
    }
    return Stored(tensors, tensor(w), config)


def fp8(
    rng: np.random.Generator,
    n: int,
    k: int,
    block: tuple[int, int] | None = (32, 64),
    *,
    scale: torch.dtype = torch.float32,
) -> Stored:
    """DeepSeek's: float8_e4m3fn times the scale of its block."""
    shared = (n, k) if block is None else block
    raw = rng.integers(0, 256, (n, k)).astype(np.uint8)
    raw[(raw & 0x7F) == 0x7F] = 0x40  # NaN
    weight = tensor(raw).view(torch.float8_e4m3fn)
    grid = (-(-n // shared[0]), -(-k // shared[1]))
    if scale is torch.float8_e8m0fnu:
        exponents = rng.integers(113, 119, grid)
        scales, exact = tensor(exponents, torch.uint8).view(scale), 2.0 ** (exponents - 127)
    else:
        scales, exact = floats(rng, grid, 9, scale)
    w = weight.double().numpy() * spread(exact, n, k, *shared)
    tensors = {"weight": weight, "weight_scale_inv": scales.reshape(()) if block is None else scales}
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
    config["weight_block_size"] = None if block is None else list(block)
    return Stored(tensors, tensor(w), config)


Packer = Callable[[np.random.Generator, int, int], Stored]
