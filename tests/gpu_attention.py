"""Calls of attention, and what gradients are compared with, that the tests of the CUDA and the Triton kernels share."""

from __future__ import annotations

import math

import torch
from cases import naive_attention, seeded
from torch import Tensor

from tilewright.ops.attention_reference import CAUSAL, Operands, Options, reference


def rand(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=seeded(name)).to(dtype)


def whole(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


def packed(dtype: torch.dtype, group: int = 3) -> Operands:
    """Five sequences, one without queries, one without keys, one with more queries than keys, and rows of none."""
    return Operands(
        rand("q", 1, 2 * group, 130, 40, dtype=dtype), rand("k", 1, 2, 200, 40, dtype=dtype),
        rand("v", 1, 2, 200, 24, dtype=dtype), q_start=whole(0, 1, 40, 40, 60), q_end=whole(1, 40, 40, 60, 125),
        k_start=whole(0, 30, 60, 100, 100), k_end=whole(30, 60, 100, 100, 198),
    )  # fmt: skip


def paged(dtype: torch.dtype, seq_q: int, page_size: int) -> Operands:
    table = torch.randint(0, 70, (3, -(-700 // page_size)), generator=seeded("table"), dtype=torch.int32)
    table[1, 1:] = 1 << 30  # beyond the sequence anything may stand there
    return Operands(
        rand("q", 3, 6, seq_q, 64, dtype=dtype), rand("k", 70, 2, page_size, 64, dtype=dtype),
        rand("v", 70, 2, page_size, 64, dtype=dtype), k_start=whole(2, 0, 17), k_end=whole(300, 1, 690),
        block_table=table,
    )  # fmt: skip


def padded(d: torch.dtype, columns: int) -> Operands:
    """Keys that begin anywhere, with a mask and a bias of rows of so many columns, of which 200 are keys."""
    mask, bias = torch.rand(4, 1, 30, columns, generator=seeded("m")) < 0.7, rand("b", 4, 6, 30, columns, dtype=d)
    return dense(d, 4, 30, 200, mask=mask[..., :200], bias=bias[..., :200], k_start=whole(8, 4, 2, 5),
                 k_end=whole(200, 150, 99, 77))  # fmt: skip


def dense(d: torch.dtype, batch: int, seq_q: int, seq_k: int, keys: int | None = None, **more: Tensor) -> Operands:
    k, v = (rand(n, keys or batch, 2, seq_k, 64, dtype=d) for n in "kv")
    return Operands(rand("q", batch, 6, seq_q, 64, dtype=d), k, v, **more)


CALLS = {
    "packed": (lambda d: packed(d), Options(0.2, 0.0, 2)),
    "packed window": (
        lambda d: packed(d)._replace(alibi=rand("a", 5, 6).abs(), sinks=rand("s", 6)), Options(0.2, 0.0, 2, 9),
    ),
    "packed dropout": (lambda d: packed(d, 1)._replace(seed=whole(-7)), Options(0.2, 0.0, 0, -1, -1, 0.3)),
    "packed, a row of keys each": (
        lambda d: packed(d)._replace(k=rand("k", 5, 2, 50, 40, dtype=d), v=rand("v", 5, 2, 50, 24, dtype=d),
                                     k_start=whole(0, 3, 31, 31, 0), k_end=whole(30, 31, 31, 50, 50)),
        Options(0.2, 3.0, 1),
    ),
    "paged decode": (lambda d: paged(d, 1, 16), Options(0.2, 0.0, 2)),
    "paged decode, odd pages": (lambda d: paged(d, 2, 7)._replace(k_batch=whole(0, 0, 2)), Options(0.2, 0.0, 2, 100)),
    "paged prefill": (lambda d: paged(d, 40, 16), Options(0.2, 0.0, 2)),
    "paged prefill, general": (lambda d: paged(d, 40, 16)._replace(alibi=rand("a", 6).abs()), Options(0.2, 0.0, 2)),
    "padded decode": (lambda d: dense(d, 3, 1, 600, k_start=whole(5, 0, 599), k_end=whole(600, 300, 599)),
                      Options(0.2, 0.0, 2, 280)),
    "padded, rows by index": (
        lambda d: dense(d, 3, 30, 200, 2, k_start=whole(5, 0, 0), k_end=whole(200, 0, 77), k_batch=whole(1, 0, 1)),
        Options(0.2, 0.0, 2),
    ),
    "padded, mask and bias": (lambda d: padded(d, 208), Options(0.2, 0.0, 2)),
    "padded, mask and bias of odd rows": (lambda d: padded(d, 201), Options(0.2, 0.0, 2)),
    "dropout": (lambda d: dense(d, 2, 30, 90, seed=whole(77)), Options(0.2, 0.0, 2, -1, -1, 0.4)),
    "dropout decode": (lambda d: dense(d, 2, 2, 600, seed=whole(-3)), Options(0.2, 0.0, 2, -1, -1, 0.4)),
    "dropout of all": (lambda d: dense(d, 1, 30, 70, seed=whole(1)), Options(0.2, 0.0, 2, -1, -1, 1.0)),
}  # fmt: skip


def naive_sequences(t: Operands, options: Options) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call in the tensors' dtype, sequence by sequence; rows of no sequence are 0 and -inf."""
    exact, exact_lse = reference(t, options._replace(dropout_p=0.0))
    out, lse = torch.zeros_like(exact), torch.full_like(exact_lse, -math.inf)
    for b in range(t.q.shape[0] if t.q_start is None else len(t.q_start)):
        rows = slice(None) if t.q_start is None else slice(int(t.q_start[b]), int(t.q_end[b]))
        q = t.q[b if t.q_start is None else 0][None, :, rows]
        row = b if t.k_batch is None else int(t.k_batch[b])
        if t.block_table is not None:
            pages = t.block_table[row].long().clamp(0, len(t.k) - 1)
            k, v = (x[pages].transpose(0, 1).flatten(1, 2)[None] for x in (t.k, t.v))
        else:
            row = 0 if len(t.k) == 1 else row
            k, v = t.k[row : row + 1], t.v[row : row + 1]
        keys = slice(0 if t.k_start is None else int(t.k_start[b]), None if t.k_end is None else int(t.k_end[b]))
        mask, bias = (None if x is None else x[b : b + 1, :, :, keys] for x in (t.mask, t.bias))
        alibi = t.alibi[b] if t.alibi is not None and t.alibi.dim() == 2 else t.alibi
        more = {"causal": CAUSAL[options.causal], "window": (options.left, options.right), "scale": options.scale,
                "softcap": options.softcap, "alibi_slopes": alibi, "sinks": t.sinks,
                "mask": mask, "bias": bias}  # fmt: skip
        one, one_lse = naive_attention(q, k[:, :, keys], v[:, :, keys], **more)
        at = (b, slice(None)) if t.q_start is None else (0, slice(None), rows)
        out[at], lse[at] = one[0].double(), one_lse[0].double()
    if options.dropout_p:  # which scales every error by 1 / (1 - p)
        out = reference(t, options)[0] + (out - exact) / ((1 - options.dropout_p) or 1)
    return out.to(t.q.dtype), lse.to(t.q.dtype)


def naive_gradients(t: Operands, options: Options, grad_out: Tensor, grad_lse: Tensor | None) -> list[Tensor]:
    """reference_backward's maths through autograd in the tensors' dtype."""
    leaves = [x.detach().requires_grad_() if x is not None and x.is_floating_point() else x for x in t]
    n = Operands(*leaves)
    scores = {"causal": CAUSAL[options.causal], "window": (options.left, options.right), "scale": options.scale,
              "softcap": options.softcap, "alibi_slopes": n.alibi, "sinks": n.sinks, "bias": n.bias, "mask": n.mask,
              "dropout_p": options.dropout_p, "seed": n.seed}  # fmt: skip
    out, lse = naive_attention(n.q, n.k, n.v, **scores)
    loss = (out * grad_out).sum() + (0 if grad_lse is None else (lse.masked_fill(lse == -math.inf, 0) * grad_lse).sum())
    wanted = [x for x in (n.q, n.k, n.v, n.bias, n.alibi, n.sinks) if x is not None]
    return list(torch.autograd.grad(loss, wanted))


def grad_case(
    dtype: torch.dtype, heads: int, kv_heads: int, seq_q: int, seq_k: int, dim: int, v_dim: int | None = None, **more
) -> Operands:
    q, k = rand("q", 2, heads, seq_q, dim, dtype=dtype), rand("k", 2, kv_heads, seq_k, dim, dtype=dtype)
    return Operands(q, k, rand("v", 2, kv_heads, seq_k, v_dim or dim, dtype=dtype), **more)


GRADIENTS = {
    "d64_g1": (lambda: grad_case(torch.float16, 2, 2, 70, 100, 64), Options(0.125, 0.0, 1)),
    "d80_g8": (lambda: grad_case(torch.float16, 8, 1, 13, 100, 80, 40), Options(0.1, 0.0, 2)),
    "d128_g3": (lambda: grad_case(torch.bfloat16, 3, 1, 30, 130, 128), Options(0.09, 0.0, 0)),
    "d256_g1": (lambda: grad_case(torch.bfloat16, 1, 1, 70, 100, 256), Options(0.06, 0.0, 2)),
    "window": (lambda: grad_case(torch.float16, 3, 1, 60, 150, 32), Options(0.2, 0.0, 2, 40)),
    "bias_of_keys_mask": (
        lambda: grad_case(
            torch.float16, 4, 2, 40, 50, 32, bias=rand("b", 2, 1, 1, 50),
            mask=torch.rand(1, 4, 40, 50, generator=seeded("m")) < 0.7,
        ),
        Options(0.2, 0.0, 2),
    ),
    "mask_of_odd_rows": (
        lambda: grad_case(torch.bfloat16, 4, 2, 40, 51, 32, mask=torch.rand(1, 4, 40, 51, generator=seeded("m")) < 0.7),
        Options(0.2, 0.0, 2),
    ),
    "bias_and_mask_of_queries": (
        lambda: grad_case(
            torch.float16, 4, 2, 40, 50, 32, bias=rand("b", 1, 4, 40, 1),
            mask=torch.rand(2, 1, 40, 1, generator=seeded("m")) < 0.7,
        ),
        Options(0.2, 0.0, 2),
    ),
    "more_queries": (lambda: grad_case(torch.bfloat16, 2, 1, 90, 30, 32), Options(0.2, 0.0, 2)),
}  # fmt: skip
