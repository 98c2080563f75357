"""QuantizedKV: keys and values as codes that attention reads as they are.

bits=8: per token and head int8 codes and one float32 scale. bits=4, after KIVI (https://arxiv.org/abs/2402.02750):
keys per channel in groups of tokens, values per token in groups of channels, the newest tokens in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tilewright import _C
from tilewright.ops.registry import check_device, contiguous_last, direct, register, served_by, twin

GROUP_SIZES = (32, 64, 128)
_TILE = 64  # tokens
_MAX_DIM = 512


@dataclass(eq=False)
class QuantizedKV:
    """Keys and values of `length` tokens for each of `batch` sequences and `kv_heads` heads, quantised.

    bits=8: ``x = scale * code`` with scale = amax/127 in float32 over a token's head_dim channels and codes rounded
    half to even, in [-127, 127]. group_size and residual have no effect. A NaN or infinity makes the scale of its
    token (and head) NaN.

    bits=4: ``x = scale * code + minimum`` with codes 0 to 15 rounded half to even, and scale = (max - min)/15 and
    minimum rounded to bfloat16. Keys share these per channel and ``group_size`` consecutive tokens, values per token
    and ``group_size`` consecutive channels (a last group may be short). Tokens are rounded to bfloat16 when they come;
    they stay so until at least ``residual`` newer tokens follow their group. A NaN or infinity makes the scale of its
    whole group NaN.

    Fill it with `tilewright.kv_append` and read it with `tilewright.attention`. The object is plain data: tensors
    (their layout stands in csrc/cpu/quantised_kv.h) and numbers; it pickles and deep-copies.
    """

    k_codes: Tensor
    v_codes: Tensor
    k_scales: Tensor
    v_scales: Tensor
    k_tail: Tensor  # bfloat16 (batch, kv_heads, residual + group_size - 1, head_dim); no rows with 8 bits
    v_tail: Tensor
    counts: Tensor  # int64 (2,): tokens in all, and those that are codes
    bits: int
    group_size: int
    residual: int
    max_len: int
    head_dim: int

    @classmethod
    def empty(
        cls,
        batch: int,
        kv_heads: int,
        max_len: int,
        head_dim: int,
        bits: int = 8,
        *,
        group_size: int = 32,
        residual: int = 32,
    ) -> QuantizedKV:
        """Room for ``max_len`` tokens per sequence. bits: 8 or 4; group_size: 32, 64 or 128; head_dim: 1 to 512;
        the others: whole numbers >= 0. Raises ValueError for other values."""
        numbers = {"batch": batch, "kv_heads": kv_heads, "max_len": max_len, "residual": residual}
        for name, value in numbers.items():
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"QuantizedKV: {name} must be a whole number >= 0, got {value!r}")
        if not isinstance(head_dim, int) or not 1 <= head_dim <= _MAX_DIM:
            raise ValueError(f"QuantizedKV: head_dim must be in [1, {_MAX_DIM}], got {head_dim!r}")
        if bits not in (4, 8):
            raise ValueError(f"QuantizedKV: bits must be 4 or 8, got {bits!r}")
        if group_size not in GROUP_SIZES:
            raise ValueError(f"QuantizedKV: group_size must be one of {GROUP_SIZES}, got {group_size!r}")
        tiles, step, channels = -(-max_len // _TILE), bits * 16, -(-head_dim // group_size)
        if bits == 8:
            dtype, k_scales, v_scales, tail = torch.float32, (tiles, _TILE), (tiles, _TILE), 0
        else:
            dtype, tail = torch.bfloat16, residual + group_size - 1
            k_scales = (-(-max_len // group_size), 2, -(-head_dim // 16) * 16)
            v_scales = (tiles, channels, 2, _TILE)
        slots = (batch, kv_heads)
        return cls(
            torch.zeros(*slots, tiles, 2, -(-head_dim // 4), step, dtype=torch.uint8),
            torch.zeros(*slots, tiles, -(-head_dim // 32), 16, step, dtype=torch.uint8),
            torch.zeros(*slots, *k_scales, dtype=dtype),
            torch.zeros(*slots, *v_scales, dtype=dtype),
            torch.zeros(*slots, tail, head_dim, dtype=torch.bfloat16),
            torch.zeros(*slots, tail, head_dim, dtype=torch.bfloat16),
            torch.zeros(2, dtype=torch.int64),
            bits,
            group_size,
            residual,
            max_len,
            head_dim,
        )

    @property
    def length(self) -> int:
        """Tokens held, the same for every sequence."""
        return int(self.counts[0])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, kv_heads, length, head_dim)."""
        return (*self.k_codes.shape[:2], self.length, self.head_dim)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, room to grow included."""
        return sum(t.nbytes for t in self.tensors())

    @property
    def device(self) -> torch.device:
        return self.k_codes.device

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors, in the order of the ops' schemas."""
        return self.k_codes, self.v_codes, self.k_scales, self.v_scales, self.k_tail, self.v_tail, self.counts

    def spec(self) -> tuple[int, int, int, int, int]:
        """The numbers, in that order."""
        return self.bits, self.group_size, self.residual, self.max_len, self.head_dim

    def to(self, device: torch.device | str) -> QuantizedKV:
        """A copy with its tensors on ``device``; self if they are there."""
        if torch.device(device) == self.device:
            return self
        return QuantizedKV(*(t.to(device) for t in self.tensors()), *self.spec())

    def reset(self) -> None:
        """Forget all tokens."""
        self.counts.zero_()

    def crop(self, max_length: int) -> None:
        """Forget all but the first ``max_length`` tokens; a negative number says how many to forget. With 4 bits the
        remaining tokens of a group that is cut go back to bfloat16, as what their codes stand for."""
        length, quantised = self.counts.tolist()
        length = min(length, max(length + max_length, 0) if max_length < 0 else max_length)
        if self.bits == 8:
            quantised = length
        elif length < quantised:
            quantised = length // self.group_size * self.group_size
            for tail, x in zip((self.k_tail, self.v_tail), self.dequantize(), strict=True):
                tail[:, :, : length - quantised] = x[:, :, quantised:length]
        self.counts.copy_(torch.tensor([length, quantised]))

    def codes(self) -> tuple[Tensor, Tensor]:
        """The codes of keys and values, (batch, kv_heads, tokens, head_dim): int8, or uint8 with 4 bits, where the
        tokens that are still in bfloat16 are missing."""
        batch, heads, tiles, _, steps, _ = self.k_codes.shape
        # Blocks of 32 rows: (..., steps, 32 rows, 4 places) after the nibbles are apart.
        k, v = (
            self._bytes(t).unflatten(-1, (32, 4)).transpose(-3, -2).flatten(-2) for t in (self.k_codes, self.v_codes)
        )
        k = k.reshape(batch, heads, tiles * _TILE, steps * 4)
        v = v.transpose(-1, -2).transpose(-3, -2).reshape(batch, heads, tiles * _TILE, -1)
        n = int(self.counts[1])
        k, v = (t[:, :, :n, : self.head_dim] for t in (k, v))
        return ((k.int() - 128).to(torch.int8), (v.int() - 128).to(torch.int8)) if self.bits == 8 else (k, v)

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """What the codes stand for: keys and values, float32 (batch, kv_heads, length, head_dim)."""
        length, n = self.counts.tolist()
        k, v = (t.float() for t in self.codes())
        if self.bits == 8:
            k, v = (x * s.flatten(2)[:, :, :n, None] for x, s in ((k, self.k_scales), (v, self.v_scales)))
            return k, v
        d, size = self.head_dim, self.group_size
        scale, low = self.k_scales.float()[..., :d].repeat_interleave(size, 2)[:, :, :n].unbind(3)
        k = k * scale + low
        scale, low = (
            self.v_scales.float().transpose(-1, -3).flatten(2, 3).repeat_interleave(size, 4)[:, :, :n, :, :d].unbind(3)
        )
        v = v * scale + low
        tail = length - n
        return torch.cat((k, self.k_tail[:, :, :tail].float()), 2), torch.cat((v, self.v_tail[:, :, :tail].float()), 2)

    def _bytes(self, codes: Tensor) -> Tensor:
        """Codes with a byte each: (..., steps, 128)."""
        return codes if self.bits == 8 else torch.cat((codes & 15, codes >> 4), -1)


def append_quantized(kv: QuantizedKV, k: Tensor, v: Tensor) -> QuantizedKV:
    """`tilewright.kv_append` for a QuantizedKV."""
    if not (isinstance(k, Tensor) and isinstance(v, Tensor)):
        raise TypeError(f"kv_append: k and v must be tensors, got {type(k).__name__} and {type(v).__name__}")
    if direct(*kv.tensors(), k, v):
        _append_cpu(*kv.tensors(), *kv.spec(), k, v)
        return kv
    check_device("kv_append", quantized_kv=kv.k_codes, k=k, v=v)
    if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
        raise ValueError("kv_append: writes in place and has no gradient; detach the tensors or use no_grad")
    torch.ops.tilewright.kv_append_quantized(*kv.tensors(), *kv.spec(), k, v)
    return kv


def _append_any(*arguments):
    server = served_by("kv_append", "auto", arguments[0], triton_lacks="Triton has no kernel for a QuantizedKV")
    append = _C.kv_append_quantized if server == "cpu" else twin(server, "kv_append").kv_append_quantized
    _append(append, *arguments)


def _append_cpu(*arguments):
    _append(_C.kv_append_quantized, *arguments)


def _append(append, *arguments):
    *cache, k, v = arguments
    append(*cache, contiguous_last(k), contiguous_last(v))
    torch.autograd.graph.increment_version(cache[:7])


CACHE = (
    "Tensor k_codes, Tensor v_codes, Tensor k_scales, Tensor v_scales, Tensor k_tail, Tensor v_tail, Tensor counts, "
    "int bits, int group_size, int residual, int max_len, int head_dim"
)
_MUTATED = "Tensor(a!) k_codes, Tensor(b!) v_codes, Tensor(c!) k_scales, Tensor(d!) v_scales, Tensor(e!) k_tail, "

register(
    f"kv_append_quantized({_MUTATED}Tensor(f!) v_tail, Tensor(g!) counts, {CACHE[CACHE.index('int bits') :]}, "
    "Tensor k, Tensor v) -> ()",
    _append_any,
    lambda *_: None,
    on_gpu=True,
)
