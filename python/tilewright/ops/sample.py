"""The next token of each row: temperature, top-k, top-p (https://arxiv.org/abs/1904.09751) and min-p
(https://arxiv.org/abs/2407.01082)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tilewright import _C
from tilewright.ops.registry import contiguous_last, direct, record_reference, register, served_by, twin


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Token ids, int64 (batch,), drawn from ``softmax(logits / temperature)`` after the filters.

    logits: (batch, vocab), float32, bfloat16 or float16 (float64 runs the reference); -inf bars a token. The
    filters are transformers', in its order: ``top_k`` keeps the k largest logits and all that equal the k-th
    (0: all), ``top_p`` the fewest most probable tokens that reach this probability, at least one (of equal
    logits the higher ids), ``min_p`` those with at least this fraction of the largest probability.
    ``temperature`` 0 takes the first maximum and draws nothing; otherwise one float64 number u per row comes
    from ``torch.rand(batch, generator=generator)``, and the result is the first kept token, in ascending
    order of ids, at which the running sum of the kept probabilities exceeds u. It does not depend on the
    number of threads.

    Raises ValueError for NaN, a row of -inf, +inf unless temperature is 0, and values out of range. On a GPU, where
    looking at values would wait for it, such a row gives -1 instead.
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"sample: temperature must be at least 0 and finite, got {temperature}")
    if not isinstance(top_k, int) or top_k < 0:
        raise ValueError(f"sample: top_k must be a whole number, 0 or more, got {top_k}")
    if not 0 <= top_p <= 1:
        raise ValueError(f"sample: top_p must be from 0 to 1, got {top_p}")
    if not 0 <= min_p <= 1:
        raise ValueError(f"sample: min_p must be from 0 to 1, got {min_p}")
    if logits.dim() != 2:
        raise ValueError(f"sample: logits must be (batch, vocab), got shape {tuple(logits.shape)}")
    uniform = None
    if temperature != 0:
        uniform = torch.rand(logits.shape[0], dtype=torch.float64, device=logits.device, generator=generator)
    if logits.requires_grad:
        logits = logits.detach()
    if direct(logits, uniform):
        return _sample_cpu(logits, uniform, temperature, top_k, top_p, min_p)
    return torch.ops.tilewright.sample(logits, uniform, temperature, top_k, top_p, min_p)


def sample_reference(
    logits: Tensor,
    uniform: Tensor | None,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """`sample` in float64, for given numbers ``uniform`` (batch,) in [0, 1)."""
    scores = logits.double()
    top = scores.amax(-1)
    if top.isnan().any() or (top == -math.inf).any() or (temperature != 0 and (top == math.inf).any()):
        raise ValueError("sample: each row of logits must have a finite maximum and no NaN")
    if temperature == 0 or uniform is None:
        return (scores == top.unsqueeze(-1)).int().argmax(-1)
    scores = scores / temperature
    if 0 < top_k < scores.shape[-1]:
        kth = scores.topk(top_k).values[:, -1:]
        scores = scores.masked_fill(scores < kth, -math.inf)
    if top_p < 1:
        ascending, order = scores.sort(dim=-1, stable=True)
        cut = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        cut[:, -1] = False
        scores = scores.masked_fill(torch.zeros_like(cut).scatter(-1, order, cut), -math.inf)
    if min_p > 0:
        probabilities = scores.softmax(-1)
        cut = probabilities < min_p * probabilities.amax(-1, keepdim=True)
        scores = scores.masked_fill(cut, -math.inf)
    running = scores.softmax(-1).cumsum(-1)
    target = uniform.double().unsqueeze(-1) * running[:, -1:]
    return torch.searchsorted(running, target, right=True).squeeze(-1)


def _sample_any(logits, uniform, temperature, top_k, top_p, min_p):
    server = served_by("sample", "auto", logits, triton_lacks="Triton has no kernel for it")
    if server == "cuda":
        return twin(server, "sample").sample(logits, uniform, temperature, top_k, top_p, min_p)
    return _sample_cpu(logits, uniform, temperature, top_k, top_p, min_p)


def _sample_cpu(logits, uniform, temperature, top_k, top_p, min_p):
    if logits.dtype == torch.float64:
        record_reference("sample")
        return sample_reference(logits, uniform, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    out = torch.empty(logits.shape[0], dtype=torch.int64)
    _C.sample(contiguous_last(logits), uniform, out, temperature, top_k, top_p, min_p)
    return out


def _sample_fake(logits, uniform, temperature, top_k, top_p, min_p):
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


register(
    "sample(Tensor logits, Tensor? uniform, float temperature, int top_k, float top_p, float min_p) -> Tensor",
    _sample_any,
    _sample_fake,
    on_gpu=True,
)
