"""Shapes and inputs of the attention and linear tests, and what plain torch makes of them in their own dtype."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace

import gguf
import numpy as np
import torch
from torch import Tensor

import tilewright
from tilewright.ops.attention_reference import Operands, dropout_keep
from tilewright.quant import QuantizedWeight, from_gguf, quantize_weight
from tilewright.quant.weight import CODES, pack, pack_bf16

LEVELS = ("scalar", "avx2", "avxvnni", "avx512", "avx512bf16", "amx")
NAN, INF = math.nan, math.inf


def assert_ran_natively(op: str) -> None:
    """The op ran compiled code of the active level or of the one below that it has: scalar only at scalar."""
    level, used = LEVELS.index(tilewright.isa()), LEVELS.index(tilewright.last_impl(op))
    assert used <= level and (used > 0) == (level > 0), (
        f"{op} ran {tilewright.last_impl(op)} at level {tilewright.isa()}"
    )


def seeded(name: str) -> torch.Generator:
    """A generator whose numbers depend on ``name`` alone, so that adding a case changes no other."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


# --- attention ---


@dataclass(frozen=True)
class AttentionCase:
    """One call. Fields that say how a mask or bias broadcasts hold its shape's pattern: "bhqk" is full, a "1"
    stands for a dimension of size 1, and missing leading letters are missing dimensions."""

    name: str
    seq_q: int = 1
    seq_k: int = 70
    head_dim: int = 64
    v_dim: int | None = None
    heads: int = 2
    kv_heads: int = 2
    batch: int = 1
    causal: str | None = None
    window: tuple[int, int] | None = None
    mask: str | None = None  # boolean, about half the keys
    float_mask: str | None = None  # 0 and -inf in the op's dtype
    bias: str | None = None
    bias_dtype: torch.dtype = torch.float32
    alibi: str | None = None  # "h" or "bh"
    softcap: float | None = None
    sinks: bool = False
    scale: float | None = None
    layout: str = "contiguous"  # of q, k, v: see `lay_out`

    def __str__(self) -> str:
        return self.name


Case = AttentionCase
# Kernel blocks (csrc/cpu/kernels.h): vectors of 8 or 16 keys, decode blocks of 64 and chunks of 256 keys, prefill
# blocks of 128 keys and 48 rows; up to 16 rows (queries x heads of a group) decode.
KEY_BORDERS = (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 191, 255, 256, 257, 511, 512, 513)
ROW_BORDERS = (15, 16, 17, 47, 48, 49, 95, 96, 97, 127, 128, 129, 145, 193, 257)
DIMS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 80, 96, 112, 127, 128, 129, 192, 255, 256)

ATTENTION = [
    *(Case(f"decode_keys_{n}", seq_k=n, heads=4, head_dim=40) for n in KEY_BORDERS),
    *(Case(f"prefill_keys_{n}", seq_q=20, seq_k=n, head_dim=24) for n in KEY_BORDERS),
    *(Case(f"self_{n}", n, n, 32, heads=1, kv_heads=1, causal="top_left") for n in ROW_BORDERS),
    *(Case(f"decode_dim_{n}", 1, 37, n, heads=3, kv_heads=1) for n in DIMS),
    *(Case(f"prefill_dim_{n}", 19, 37, n, causal="bottom_right") for n in DIMS),
    *(Case(f"v_dim_{n}", s, 70, n, v) for s in (2, 30) for n, v in ((64, 32), (3, 129), (192, 128), (1, 256))),
    *(Case(f"group_{g}_q{s}", s, 130, 32, heads=2 * g, kv_heads=2, batch=2, causal="bottom_right")
      for g in (1, 2, 3, 5, 7, 8) for s in (1, 2, 3, 6, 17)),
    *(Case(f"rect_{a}x{b}_{c}", a, b, 24, causal=c) for a, b in ((3, 40), (40, 3), (48, 200), (200, 48), (129, 128))
      for c in (None, "top_left", "bottom_right")),
    *(Case(f"window_{c}_{w[0]}_{w[1]}_q{s}", s, n, 16, causal=c, window=w)
      for s, n in ((1, 300), (5, 70), (130, 260), (70, 20)) for c in (None, "bottom_right", "top_left")
      for w in ((0, 0), (5, -1), (64, 3), (-1, 20), (200, 0))),
    *(Case(f"mask_{p}_q{s}", s, 131, 32, heads=6, batch=2, mask=p)
      for s in (1, 40) for p in ("bhqk", "b1qk", "1hqk", "11qk", "b11k", "bhq1", "qk", "k", "1")),
    *(Case(f"float_mask_{p}", 40, 131, 32, batch=2, float_mask=p) for p in ("bhqk", "b11k", "qk")),
    *(Case(f"bias_{p}_{d}", 21, 133, 32, heads=4, batch=2, bias=p, bias_dtype=d) for p in ("bhqk", "1hqk", "b1q1")
      for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)),
    Case("bias_decode", 2, 300, heads=4, batch=2, bias="bhqk"),
    Case("bias_and_float_mask", 20, 70, bias="1h1k", float_mask="b1qk", batch=2),
    *(Case(f"alibi_{p}_{c}_q{s}", s, 150, 32, heads=6, batch=2, alibi=p, causal=c)
      for p in ("h", "bh") for c in (None, "top_left", "bottom_right") for s in (1, 50)),
    *(Case(f"softcap_{c}_q{s}", s, 150, 32, softcap=c, scale=1.0) for c in (0.5, 30.0) for s in (1, 50)),
    *(Case(f"sinks_q{s}_k{n}", s, n, 32, heads=6, sinks=True) for s in (1, 50) for n in (5, 64, 600)),
    Case("scale_negative", 20, 70, scale=-0.3),
    Case("scale_zero", 20, 70, scale=0.0),
    Case("everything_decode", 2, 520, 40, 24, 6, 2, 2, "bottom_right", (300, -1), "b1qk", None, "1hqk",
         torch.bfloat16, "bh", 20.0, True, 0.2),
    Case("everything_prefill", 60, 300, 40, 24, 6, 2, 2, "bottom_right", (200, -1), "b1qk", None, "1hqk",
         torch.float16, "h", 20.0, True, 0.2),
    *(Case(f"{kind}_q{s}", s, 140, 33, 17, 6, 3, 2, "bottom_right", layout=kind) for s in (1, 4, 50)
      for kind in ("bshd", "offset", "same_heads", "same_rows", "strided_last")),
]  # fmt: skip
del Case


def lay_out(t: Tensor, layout: str) -> Tensor:
    """A tensor of t's shape (batch, heads, seq, dim) in the given layout; the "same" ones repeat t's first."""
    if layout == "contiguous":
        return t
    if layout == "bshd":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "same_heads":  # stride 0
        return t[:, :1].contiguous().expand(t.shape)
    if layout == "same_rows":
        return t[:, :, :1].contiguous().expand(t.shape)
    if layout == "strided_last":
        return t.transpose(2, 3).contiguous().transpose(2, 3)
    # "offset": no row begins aligned
    wide = torch.empty(t.numel() + t.shape[-1] * 3 + 8, dtype=t.dtype)
    out = wide[1 : 1 + t.numel()].view(t.shape)
    return out.copy_(t)


def attention_inputs(case: AttentionCase, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor, Tensor], dict]:
    """(q, k, v) and the keyword arguments of a case."""
    c, g = case, seeded(case.name)
    shapes = (
        (c.heads, c.seq_q, c.head_dim),
        (c.kv_heads, c.seq_k, c.head_dim),
        (c.kv_heads, c.seq_k, c.v_dim or c.head_dim),
    )
    q, k, v = (lay_out(torch.randn(c.batch, *s, generator=g).to(dtype), c.layout) for s in shapes)
    sizes = {"b": c.batch, "h": c.heads, "q": c.seq_q, "k": c.seq_k, "1": 1}
    options: dict = {name: getattr(c, name) for name in ("causal", "window", "softcap", "scale")}
    if c.mask:
        options["mask"] = torch.rand([sizes[x] for x in c.mask], generator=g) < 0.5
    if c.float_mask:
        hidden = torch.rand([sizes[x] for x in c.float_mask], generator=g) < 0.5
        options["mask"] = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -INF)
    if c.bias:
        options["bias"] = torch.randn([sizes[x] for x in c.bias], generator=g).to(c.bias_dtype)
    if c.alibi:
        options["alibi_slopes"] = torch.rand([sizes[x] for x in c.alibi], generator=g) * 0.2
    if c.sinks:
        options["sinks"] = torch.randn(c.heads, generator=g)
    return (q, k, v), {name: value for name, value in options.items() if value is not None}


def allowed_keys(batch: int, heads: int, seq_q: int, seq_k: int, options: dict) -> Tensor:
    """Which keys each query may attend to, (batch, heads, seq_q, seq_k), written out one query at a time."""
    allowed = torch.zeros(seq_q, seq_k, dtype=torch.bool)
    causal, (left, right) = options.get("causal"), options.get("window") or (-1, -1)
    for i in range(seq_q):
        diagonal = i if causal == "top_left" else i + seq_k - seq_q
        first = diagonal - left if left >= 0 else 0
        last = min(diagonal if causal else seq_k, diagonal + right if right >= 0 else seq_k)
        allowed[i, max(first, 0) : max(last + 1, 0)] = True
    mask = options.get("mask")
    if mask is not None:
        allowed = allowed & (mask if mask.dtype == torch.bool else mask > -INF)
    return allowed.expand(batch, heads, seq_q, seq_k)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    """`tilewright.attention` step by step in the tensors' dtype: (out, lse)."""
    dtype, (batch, heads, seq_q, dim), seq_k = q.dtype, q.shape, k.shape[2]
    k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
    scale = options.get("scale")
    s = (q @ k.transpose(-1, -2)) * (max(dim, 1) ** -0.5 if scale is None else scale)
    if options.get("softcap"):
        s = options["softcap"] * torch.tanh(s / options["softcap"])
    if options.get("alibi_slopes") is not None:
        shift = 0 if options.get("causal") == "top_left" else seq_k - seq_q
        distance = (torch.arange(seq_k) - torch.arange(seq_q).view(-1, 1) - shift).abs()
        s = s - options["alibi_slopes"].to(dtype).view(-1, heads, 1, 1) * distance.to(dtype)
    for extra in (options.get("bias"), options.get("mask")):
        if extra is not None and extra.dtype != torch.bool:
            s = s + extra.to(dtype)
    s = s.masked_fill(~allowed_keys(batch, heads, seq_q, seq_k, options), -INF)
    if options.get("sinks") is not None:
        s = torch.cat([s, options["sinks"].to(dtype).view(1, -1, 1, 1).expand(batch, heads, seq_q, 1)], -1)
    nothing = (s == -INF).all(-1, keepdim=True)  # torch gives NaN, and NaN gradients, to a row without keys
    s = s.masked_fill(nothing, 0.0)
    lse = torch.logsumexp(s, -1).masked_fill(nothing.squeeze(-1), -INF)
    p = torch.softmax(s, -1).masked_fill(nothing, 0.0)[..., :seq_k]
    if options.get("dropout_p"):
        p = p * dropout_keep(Operands(q, k, v, seed=options["seed"]), options["dropout_p"]) / (1 - options["dropout_p"])
    return p @ v, lse


# --- quantised linear ---


@dataclass(frozen=True)
class LinearCase:
    name: str
    m: int
    n: int
    k: int
    bits: int = 4
    group_size: int = 32
    kind: str = "symmetric"  # or "zero", a GGUF type, or a kind of codes ("int5", "nf4"; "int6_min" has minima)
    bias: torch.dtype | None = None

    def __str__(self) -> str:
        return self.name


ROWS = (1, 2, 5, 6, 7, 8, 9, 13, 64, 129)  # register tiles of 2, 6 and 8 rows; 9: from here on rows are chunked
LINEAR = [
    *(LinearCase(f"m{m}", m, 96, 256) for m in ROWS),
    *(LinearCase(f"n{n}_m{m}", m, n, 96) for n in (15, 16, 17, 31, 33, 47, 63, 65, 97) for m in (1, 9)),
    *(LinearCase(f"n{n}_m{m}", m, n, 96) for n in (1, 2) for m in (9, 20)),
    *(LinearCase(f"k{k}_g{g}_m{m}", m, 40, k, bits, g, kind) for k in (1, 3, 31, 33, 63, 65, 127, 129, 200)
      for g, bits, kind in ((32, 4, "symmetric"), (64, 4, "zero"), (128, 8, "zero"), (-1, 8, "symmetric"))
      for m in (2, 9)),
    *(LinearCase(f"{bits}_{g}_{kind}", m, 70, 300, bits, g, kind, torch.float32) for bits in (4, 8)
      for g in (32, 64, 128, -1) for kind in ("symmetric", "zero") for m in (3, 14)),
    *(LinearCase(f"{kind}_m{m}", m, 65, 160, kind=kind) for kind in ("Q4_0", "Q4_1", "Q8_0") for m in (1, 7, 25)),
    *(LinearCase(f"{kind}_g{g}_m{m}", m, 65, 304, group_size=g, kind=kind) for m in (1, 4, 14)
      for kind, g in (("int4", 16), ("int4_zero", 16), ("int4_min", 16), ("int5", 32), ("int5_min", 64),
                      ("int5_zero", 16), ("int6", 16), ("int6_min", 32), ("int6_zero", -1), ("int8", 16),
                      ("int8_min", 96), ("nf4", 64), ("fp4", 16), ("iq4_nl", 32), ("iq4_nl", 16), ("mxfp4", 32),
                      ("e4m3", 128), ("e4m3", -1), ("bf16", -1))),
    *(LinearCase(f"columns_{g}_m{m}", m, 40, 160, group_size=g, kind="columns") for g in (32, -1) for m in (1, 9)),
    *(LinearCase(f"outliers_m{m}", m, 70, 300, 8, -1, "outliers", torch.float32) for m in (1, 3, 14)),
    *(LinearCase(f"row_chunks_{bits}", 200, 40, 4128, bits, 128) for bits in (4, 8)),  # 96 rows a pass over K
    *(LinearCase(f"bias_{d}", 5, 33, 64, bias=d)
      for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)),
]  # fmt: skip


# The quantised GGUF types, and where in a block their fp16 numbers are.
GGUF_TYPES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "IQ1_S": (0,), "IQ1_M": (), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,),
    "IQ4_NL": (0,), "IQ4_XS": (0,), "MXFP4": (),
}  # fmt: skip


def gguf_blocks(type_name: str) -> tuple[int, int]:
    """Columns and bytes of a block."""
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]


def gguf_rows(type_name: str, n: int, k: int, g: torch.Generator, scales: Tensor | float = 0.1) -> Tensor:
    """Random blocks of a GGUF type as uint8 (n, bytes), with any codes and integer factors. ``scales``: how large the
    fp16 numbers are, or the first one of each block."""
    columns, size = gguf_blocks(type_name)
    raw = torch.randint(0, 256, (n, k // columns, size), generator=g, dtype=torch.uint8)
    first, second = torch.randn(2, *raw.shape[:2], generator=g) * (scales if isinstance(scales, float) else 0.1)
    if isinstance(scales, Tensor):
        first = scales.view(first.shape)
    for at, number in zip(GGUF_TYPES[type_name], (first, second), strict=False):
        raw[..., at : at + 2] = number.half().unsqueeze(-1).view(torch.uint8)
    if type_name == "IQ1_M":  # a nibble on top of each of the last four words
        nibbles = first.half().view(torch.int16).int().unsqueeze(-1) >> torch.tensor([0, 4, 8, 12]) & 15
        raw[..., 49::2] = raw[..., 49::2] & 15 | (nibbles << 4).to(torch.uint8)
    if type_name == "MXFP4":  # an exponent
        raw[..., 0] = raw[..., 0] % 8 + 120
    return raw.flatten(1)


def gguf_values(raw: Tensor, type_name: str) -> Tensor:
    """What the gguf package makes of it, float32."""
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.dequantize(raw.numpy(), gguf.GGMLQuantizationType[type_name]))


def linear_inputs(case: LinearCase, dtype: torch.dtype) -> tuple[Tensor, QuantizedWeight, Tensor | None]:
    """(x, weight, bias) of a case."""
    c, g = case, seeded(case.name)
    x = torch.randn(c.m, c.k, generator=g).to(dtype)
    if c.kind in GGUF_TYPES:
        weight = from_gguf(gguf_rows(c.kind, c.n, c.k, g), c.kind, (c.n, c.k))
    elif c.kind.split("_")[0] in CODES or c.kind in CODES:
        weight = weight_of_codes(c, g)
    else:
        w = torch.randn(c.n, c.k, generator=g) * 0.1 + (0.1 if c.kind == "zero" else 0)
        weight = quantize_weight(w, c.bits, c.group_size, c.kind != "zero")
        if c.kind == "columns":
            weight = replace(weight, columns=torch.randperm(c.k, generator=g))
        if c.kind == "outliers":
            weight = replace(weight, outlier_threshold=2.0)
    bias = None if c.bias is None else torch.randn(c.n, generator=g).to(c.bias)
    return x, weight, bias


def weight_of_codes(c: LinearCase, g: torch.Generator) -> QuantizedWeight:
    """Random codes of the case's kind with scales about 0.1 (powers of two for mxfp4) and, where asked, offsets."""
    codes, offset = c.kind, "none"
    for suffix in ("min", "zero"):
        if codes.endswith(suffix):
            codes, offset = codes.removesuffix(f"_{suffix}"), suffix
    if codes == "bf16":
        return pack_bf16(torch.randn(c.n, c.k, generator=g) * 0.1)
    top = {"int5": 32, "int6": 64, "int8": 256}.get(codes, 16)
    groups = 1 if c.group_size == -1 else -(-c.k // c.group_size)
    scales = torch.rand(c.n, groups, generator=g) * 0.1 + 0.01
    if codes == "mxfp4":
        scales = scales.log2().round().exp2()
    raw = torch.randint(0, top, (c.n, c.k), generator=g).to(torch.uint8)
    if codes == "e4m3":
        raw = torch.randn(c.n, c.k, generator=g).to(torch.float8_e4m3fn).view(torch.uint8)
    offsets = None
    if offset == "zero":
        offsets = torch.randint(0, top, (c.n, groups), generator=g).to(torch.uint8)
    if offset == "min":
        offsets = -scales * top / 2
    return pack(raw, scales, offsets, codes, c.group_size, offset)
