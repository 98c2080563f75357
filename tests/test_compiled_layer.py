"""The small ops in one graph under torch.compile's default backend, mutations and views included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tilewright


def layer(x: Tensor, qkv: Tensor, cache_k: Tensor, cache_v: Tensor, cos: Tensor, sin: Tensor, at: Tensor) -> Tensor:
    """Norm, fused projection, rope in place on its parts, append, gated activation, greedy token."""
    batch, seq, _ = x.shape
    h, total = tilewright.rms_norm(x, None, 1e-5, residual=x * 0.5)
    fused = (h @ qkv).view(batch, seq, 6, 16).transpose(1, 2)
    q, k = tilewright.rope(fused[:, :4], fused[:, 4:5], cos, sin, positions=at, inplace=True)
    keys, values = tilewright.kv_append(cache_k, cache_v, k, fused[:, 5:], at)
    mixed = q * keys.float().std() + values.float().mean()
    gate, up = mixed.transpose(1, 2).reshape(batch, seq, -1).chunk(2, -1)
    out = tilewright.silu_mul(gate, up) + tilewright.gelu_mul(up, gate, approximate="tanh")
    return tilewright.sample(out[:, -1] + total[:, -1], temperature=0.0) + tilewright.sample(out[:, 0], top_k=1)


@pytest.mark.compiles
def test_default_backend_keeps_results_and_mutations() -> None:
    cos, sin = tilewright.rope_tables(10000.0, 16, 32)
    at = torch.tensor([7, 8, 9])
    inputs = torch.randn(2, 3, 32), torch.randn(32, 96)
    results = []
    # No stored graphs: they do not notice when a fake kernel changes.
    with torch._inductor.config.patch(force_disable_caches=True):
        for f in (layer, torch.compile(layer, fullgraph=True)):
            caches = torch.zeros(2, 1, 32, 16, dtype=torch.bfloat16), torch.zeros(2, 1, 32, 16, dtype=torch.float16)
            results.append((f(*inputs, *caches, cos, sin, at), *caches))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)
    assert results[1][1][:, :, 7:10].abs().sum() > 0
