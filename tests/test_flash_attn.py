"""flash-attn's functions but for the one with a cache: the error rule, gradients, dropout, what is rejected."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from cases import INF, NAN
from compare import assert_close, assert_same_bits
from flash_loop import assert_like_loop, loop_attention, plain_attention, slopes_of
from torch import Tensor

import tilewright
from tilewright import flash_attn
from tilewright.flash_attn import flash_attn_func, flash_attn_varlen_func

Sequences = list[tuple[Tensor, Tensor, Tensor]]


pytestmark = pytest.mark.usefixtures("one_thread_for_torch")


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def sequences_of(
    lengths: list[tuple[int, int]], heads: int, kv_heads: int, d: int, d_v: int, dtype: torch.dtype
) -> Sequences:
    return [
        (random(n, heads, d, dtype=dtype), random(m, kv_heads, d, dtype=dtype), random(m, kv_heads, d_v, dtype=dtype))
        for n, m in lengths
    ]


def bounds(parts: tuple[Tensor, ...]) -> tuple[Tensor, int]:
    lengths = [len(t) for t in parts]
    return torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths)


# Each function on sequences: (out of each, lse of each, S_dmask of each).


def split(out: Tensor, lse: Tensor, probabilities: Tensor, lengths: list[tuple[int, int]]) -> tuple:
    """What a varlen function returns, by sequence."""
    sizes = [n for n, _ in lengths]
    parts = [p[:, :n, :m] for p, (n, m) in zip(probabilities, lengths, strict=True)]
    inside = sum(int(p.count_nonzero()) for p in parts)
    assert inside == probabilities.count_nonzero(), "S_dmask is not 0 outside of the sequences"
    return list(out.split(sizes)), list(lse.split(sizes, 1)), parts


def run(name: str, sequences: Sequences, **options: object) -> tuple:
    function, options = getattr(flash_attn, name), {"return_attn_probs": True, **options}
    parts = tuple(zip(*sequences, strict=True))
    if "varlen" not in name:
        q, k, v = (torch.stack(part) for part in parts)
        if "_qkvpacked" in name:
            results = function(torch.stack([q, k, v], 2), **options)
        elif "_kvpacked" in name:
            results = function(q, torch.stack([k, v], 2), **options)
        else:
            results = function(q, k, v, **options)
        return tuple(list(t) for t in results)
    q, k, v = (torch.cat(part) for part in parts)
    (cu_q, max_q), (cu_k, max_k) = bounds(parts[0]), bounds(parts[1])
    if "_qkvpacked" in name:
        results = function(torch.stack([q, k, v], 1), cu_q, max_q, **options)
    elif "_kvpacked" in name:
        results = function(q, torch.stack([k, v], 1), cu_q, cu_k, max_q, max_k, **options)
    else:
        results = function(q, k, v, cu_q, cu_k, max_q, max_k, **options)
    return split(*results, [(len(a), len(b)) for a, b, _ in sequences])


NAMES = [name for name in flash_attn.__all__ if name != "flash_attn_with_kvcache"]

OPTIONS: dict[str, dict] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (5, 3)},
    "causal_window": {"causal": True, "window_size": (7, -1)},
    "left": {"window_size": (4, -1)},
    "softcap": {"softcap": 2.5, "softmax_scale": 0.9},
    "alibi_h": {"alibi_slopes": "h", "causal": True},
    "alibi_bh": {"alibi_slopes": "bh"},
    "everything": {"alibi_slopes": "bh", "causal": True, "window_size": (9, 2), "softcap": 4.0, "softmax_scale": 0.4},
}
# (lengths of q and k), heads, kv_heads, d, d_v
SHAPES: dict[str, tuple] = {
    "self": ([(17, 17)] * 2, 4, 2, 16, 16),
    "decode": ([(1, 70)] * 3, 7, 1, 40, 40),
    "few_queries": ([(3, 33)] * 2, 6, 2, 8, 24),
    "more_queries": ([(33, 9)] * 2, 5, 5, 33, 16),
    "prefill": ([(50, 140)], 3, 1, 64, 64),
    "d_1": ([(5, 6)], 2, 1, 1, 3),
    "d_512": ([(4, 5)], 1, 1, 512, 512),
    "no_keys": ([(3, 0)] * 2, 2, 1, 8, 8),
}
LENGTHS = [(5, 9), (0, 4), (1, 1), (20, 33), (3, 0), (7, 2)]
VARLEN: dict[str, tuple] = {
    "mixed": (LENGTHS, 6, 2, 16, 16),
    "decode": ([(1, 20), (1, 1), (1, 300), (0, 7), (1, 0)], 5, 1, 33, 8),
    "one": ([(19, 19)], 2, 2, 24, 24),
    "empty": ([(0, 0), (0, 0)], 2, 1, 8, 8),
}


def with_slopes(options: dict, batch: int, heads: int) -> dict:
    kind = options.get("alibi_slopes")
    return (
        options if kind is None else options | {"alibi_slopes": torch.rand((heads,) if kind == "h" else (batch, heads))}
    )


def check(name: str, sequences: Sequences, options: dict) -> None:
    options = with_slopes(options, len(sequences), sequences[0][0].shape[1])
    outs, lses, probabilities = run(name, sequences, **options)
    slopes = options.pop("alibi_slopes", None)
    assert_like_loop(outs, lses, sequences, slopes, **options)
    for b, one in enumerate(sequences):
        _, _, p = loop_attention(*one, slopes_of(slopes, b), **options)
        assert probabilities[b].dtype == torch.float32
        torch.testing.assert_close(probabilities[b].double(), p, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("option", OPTIONS)
def test_dense(option: str, shape: str, dtype: torch.dtype) -> None:
    check("flash_attn_func", sequences_of(*SHAPES[shape], dtype), OPTIONS[option])


@pytest.mark.parametrize("shape", VARLEN)
@pytest.mark.parametrize("option", OPTIONS)
def test_varlen(option: str, shape: str, dtype: torch.dtype) -> None:
    check("flash_attn_varlen_func", sequences_of(*VARLEN[shape], dtype), OPTIONS[option])


@pytest.mark.parametrize("option", ["plain", "everything"])
@pytest.mark.parametrize("name", [name for name in NAMES if "packed" in name])
def test_packed(name: str, option: str, dtype: torch.dtype) -> None:
    lengths = [(9, 9), (4, 4), (0, 0)] if "varlen" in name else [(9, 9)] * 2
    check(name, sequences_of(lengths, 4, 4 if "qkv" in name else 2, 12, 12, dtype), OPTIONS[option])


def test_float64_runs_the_reference() -> None:
    for name in NAMES:
        sequences = sequences_of([(6, 6)] * 2, 2, 2, 8, 8, torch.float64)
        outs, lses, _ = run(name, sequences, causal=True)
        assert tilewright.last_impl("attention") == "reference"
        for out, lse, one in zip(outs, lses, sequences, strict=True):
            ref, ref_lse, _ = loop_attention(*one, causal=True)
            torch.testing.assert_close(out, ref)
            torch.testing.assert_close(lse, ref_lse.float())


def test_layouts_and_returns(dtype: torch.dtype) -> None:
    """out is contiguous, alone unless return_attn_probs asks for more; negative windows and softcaps mean none."""
    q, k, v = random(2, 5, 4, 8, dtype=dtype), random(2, 7, 2, 8, dtype=dtype), random(2, 7, 2, 6, dtype=dtype)
    out = flash_attn_func(q, k, v)
    assert isinstance(out, Tensor) and out.shape == (2, 5, 4, 6) and out.is_contiguous()
    assert_same_bits(flash_attn_func(q, k, v, window_size=(-5, -2), softcap=-1.0, deterministic=True), out)
    strided = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in (q, k, v)]
    assert_same_bits(flash_attn_func(*strided), out)
    packed = torch.stack([k, k.flip(1), k.flip(2)], 2)
    assert flash_attn.flash_attn_qkvpacked_func(packed).is_contiguous()


def test_rows_beyond_the_last_sequence() -> None:
    q, k, v = random(9, 2, 8), random(12, 1, 8), random(12, 1, 8)
    k[9:], v[9:] = NAN, NAN
    cu_q, cu_k = torch.tensor([0, 4, 7]).int(), torch.tensor([0, 3, 9]).int()
    out, lse, _ = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 4, 6, return_attn_probs=True)
    assert out[:7].isfinite().all() and (out[7:] == 0).all() and (lse[:, 7:] == -INF).all()


# Pages.


@pytest.mark.parametrize("page_size", [1, 5, 16, 256])
@pytest.mark.parametrize("option", ["plain", "causal_window", "alibi_bh"])
def test_paged_varlen(option: str, page_size: int, dtype: torch.dtype) -> None:
    sequences = sequences_of(LENGTHS, 6, 2, 16, 24, dtype)
    most = -(-max(m for _, m in LENGTHS) // page_size)
    count = len(LENGTHS) * most
    k, v = (torch.full((count, page_size, 2, d), NAN, dtype=dtype) for d in (16, 24))
    table = torch.randperm(count).view(len(LENGTHS), most).int()
    for b, (_, one_k, one_v) in enumerate(sequences):
        for j in range(len(one_k)):
            page = int(table[b, j // page_size])
            k[page, j % page_size], v[page, j % page_size] = one_k[j], one_v[j]
        table[b, -(-len(one_k) // page_size) :] = -7  # what no key needs is not looked at
    (cu_q, max_q), (cu_k, max_k) = (bounds(part) for part in list(zip(*sequences, strict=True))[:2])
    options = with_slopes(OPTIONS[option], len(LENGTHS), 6) | {"return_attn_probs": True}
    q = torch.cat([one[0] for one in sequences])
    results = flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, block_table=table, **options)
    dense = run("flash_attn_varlen_func", sequences, **options)
    for paged, one in zip(split(*results, LENGTHS), dense, strict=True):
        for a, b in zip(paged, one, strict=True):
            torch.testing.assert_close(a, b)
    del options["return_attn_probs"]
    assert_like_loop(*split(*results, LENGTHS)[:2], sequences, options.pop("alibi_slopes", None), **options)


def test_pages_have_no_gradient() -> None:
    q, pages = random(3, 2, 8).requires_grad_(), random(2, 4, 2, 8)
    cu, table = torch.tensor([0, 3]).int(), torch.tensor([[1]]).int()
    out = flash_attn_varlen_func(q, pages, pages, cu, cu, 3, 3, block_table=table)
    with pytest.raises(NotImplementedError, match=r"paged.*no gradient"):
        out.sum().backward()


# Gradients.

GRADIENT_OPTIONS = ["plain", "causal_window", "softcap", "alibi_h"]


def gradient_case(name: str, dtype: torch.dtype) -> Sequences:
    lengths = [(5, 5), (0, 0), (3, 3)] if "varlen" in name else [(4, 4)] * 2
    return sequences_of(lengths, 2, 2 if "qkv" in name else 1, 4, 4, dtype)


@pytest.mark.parametrize("option", GRADIENT_OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name: str, option: str) -> None:
    sequences, options = gradient_case(name, torch.float64), with_slopes(OPTIONS[option], 2, 2)

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(run(name, list(zip(*[iter(leaves)] * 3, strict=True)), **options)[0])

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for one in sequences for t in one])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("option", GRADIENT_OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_keep_the_error_rule(name: str, option: str, dtype: torch.dtype) -> None:
    sequences, options = gradient_case(name, dtype), with_slopes(OPTIONS[option], 2, 2)
    slopes = options.get("alibi_slopes")
    loop_options = {key: value for key, value in options.items() if key != "alibi_slopes"}
    weights = [random(*one[0].shape) for one in sequences]

    def gradients(function: Callable, wide: torch.dtype) -> list[Tensor]:
        leaves = [[t.detach().to(wide).requires_grad_() for t in one] for one in sequences]
        outs = function(leaves)
        loss = sum((out * w.to(out.dtype)).sum() for out, w in zip(outs, weights, strict=True))
        return [
            t.flatten() for t in torch.autograd.grad(loss, [t for one in leaves for t in one], materialize_grads=True)
        ]

    ours = gradients(lambda leaves: run(name, leaves, **options)[0], dtype)
    ref = gradients(lambda leaves: [loop_attention(*one, slopes, **loop_options)[0] for one in leaves], torch.float64)
    plain = gradients(lambda leaves: [plain_attention(*one, slopes, **loop_options)[0] for one in leaves], dtype)
    assert_close(torch.cat(ours), torch.cat(ref), torch.cat(plain), dtype)


# Dropout.


def test_dropout_keeps_with_its_probability() -> None:
    q, k = random(4, 64, 8, 16), random(4, 256, 2, 16)
    for p in (0.1, 0.5, 0.83):
        _, _, probabilities = flash_attn_func(q, k, k, p, return_attn_probs=True)
        for dims in ((2, 3), (0, 3), (0, 1, 2)):  # by batch and head, head and row, key
            dropped = (probabilities < 0).double().mean(dims)
            sigma = (p * (1 - p) / (probabilities.numel() / dropped.numel())) ** 0.5
            z = (dropped - p) / sigma
            assert z.abs().max() < 5 and 0.8 < z.std() < 1.2, (p, dims)
        kept = (probabilities > 0).double().flatten()
        correlation = torch.corrcoef(torch.stack([kept[:-1], kept[1:]]))[0, 1]
        assert abs(correlation) < 5 / len(kept) ** 0.5


@pytest.mark.parametrize("name", ["flash_attn_func", "flash_attn_varlen_func"])
def test_dropout_like_the_loop(name: str, dtype: torch.dtype) -> None:
    """S_dmask's signs are the mask of forward and backward; a seed repeats it, the next call has another."""
    lengths = LENGTHS if "varlen" in name else [(20, 33)] * 2
    sequences = [[t.requires_grad_() for t in one] for one in sequences_of(lengths, 4, 2, 16, 16, dtype)]
    weights = [random(*one[0].shape, dtype=dtype) for one in sequences]
    torch.manual_seed(3)
    outs, lses, signed = run(name, sequences, dropout_p=0.4, causal=True)
    torch.manual_seed(3)
    again = run(name, sequences, dropout_p=0.4, causal=True)
    for a, b in zip((*outs, *lses, *signed), [t for part in again for t in part], strict=True):
        assert_same_bits(a, b)
    other = run(name, sequences, dropout_p=0.4, causal=True)[2]
    assert any((a != b).any() for a, b in zip(signed, other, strict=True))

    grads = torch.autograd.grad(sum((o * w).sum() for o, w in zip(outs, weights, strict=True)), leaves_of(sequences))
    found: list[list[Tensor]] = [[], [], []]  # per sequence out and the gradients of q, k, v: ours, reference, plain
    for b, (sequence, w, s) in enumerate(zip(sequences, weights, signed, strict=True)):
        wide, same = ([t.detach().to(d).requires_grad_() for t in sequence] for d in (torch.float64, dtype))
        expected, _, _ = loop_attention(*wide, None, s >= 0, dropout_p=0.4, causal=True)
        plain = plain_dropout(*same, s >= 0, 0.4)
        found[0] += [outs[b], *grads[3 * b : 3 * b + 3]]
        found[1] += [expected, *torch.autograd.grad((expected * w).sum(), wide, materialize_grads=True)]
        found[2] += [plain, *torch.autograd.grad((plain * w).sum(), same)]
    for i in range(4):
        assert_close(*(torch.cat([t.flatten() for t in part[i::4]]) for part in found), dtype)


def leaves_of(sequences: Sequences) -> list[Tensor]:
    return [t for one in sequences for t in one]


def plain_dropout(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, p: float) -> Tensor:
    """Causal attention of one sequence, step by step in its dtype, with the weights that ``keep`` keeps."""
    q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    k, v = (t.repeat_interleave(len(q) // len(t), 0) for t in (k, v))
    hidden = torch.ones_like(keep).triu(1 + keep.shape[2] - keep.shape[1])
    weights = torch.softmax((q @ k.mT * q.shape[-1] ** -0.5).masked_fill(hidden, -1e4), -1).masked_fill(hidden, 0)
    return (weights * keep / (1 - p) @ v).transpose(0, 1)


def test_dropout_of_everything_and_of_nothing() -> None:
    q = random(1, 5, 2, 8)
    assert (flash_attn_func(q, q, q, 1.0) == 0).all()
    state = torch.get_rng_state()
    flash_attn_func(q, q, q, 0.0)
    assert torch.equal(torch.get_rng_state(), state), "without dropout no seed is drawn"


# Threads, compilation, signatures.


def test_bits_do_not_depend_on_threads(dtype: torch.dtype, same_bits: Callable) -> None:
    q, k, v = (random(3, n, h, 40, dtype=dtype) for n, h in ((70, 6), (300, 2), (300, 2)))
    few = q[:, :2].contiguous()
    cu_q, cu_k = torch.tensor([0, 60, 61, 210]).int(), torch.tensor([0, 300, 600, 900]).int()

    def make() -> tuple[Tensor, ...]:
        torch.manual_seed(5)
        packed = [t.flatten(0, 1) for t in (q, k, v)]
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = flash_attn_func(*leaves, 0.2, causal=True)
        return (
            *flash_attn_func(q, k, v, 0.2, causal=True, return_attn_probs=True),
            *flash_attn_func(few, k, v, return_attn_probs=True),
            *flash_attn_varlen_func(*packed, cu_q, cu_k, 149, 300, 0.3, causal=True, return_attn_probs=True),
            *torch.autograd.grad(out.sum(), leaves),
        )

    same_bits(make)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("name", ["flash_attn_func", "flash_attn_varlen_func"])
def test_compiles_as_one_graph(name: str, dropout_p: float) -> None:
    q, k, v = (random(9, h, 8).requires_grad_() for h in (4, 2, 2))
    arguments = (ints(0, 4, 9), ints(0, 9, 9), 5, 9, dropout_p)
    if name == "flash_attn_func":
        arguments, (q, k, v) = (dropout_p,), (t[None] for t in (q, k, v))

    def step(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(8)
        out = function(q, k, v, *arguments, causal=True)
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v))

    function = getattr(flash_attn, name)
    expected = step(q, k, v)
    function = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(step(q, k, v), expected, strict=True):
        torch.testing.assert_close(a, b)


COMMON = "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
COMMON += "deterministic=False, return_attn_probs=False"
BOUNDS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SIGNATURES = {
    "flash_attn_func": f"q, k, v, {COMMON}",
    "flash_attn_kvpacked_func": f"q, kv, {COMMON}",
    "flash_attn_qkvpacked_func": f"qkv, {COMMON}",
    "flash_attn_varlen_func": f"q, k, v, {BOUNDS}, {COMMON}, block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {BOUNDS}, {COMMON}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {COMMON}",
    "flash_attn_with_kvcache": "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
    "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, "
    "causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
    "return_softmax_lse=False",
}


def test_signatures_are_those_of_flash_attn() -> None:
    assert sorted(SIGNATURES) == flash_attn.__all__
    for name, expected in SIGNATURES.items():
        parameters = inspect.signature(getattr(tilewright.flash_attn, name)).parameters.values()
        assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
        assert ", ".join(str(p.replace(annotation=p.empty)) for p in parameters) == expected


# Rejected.


def dense(**changes: object) -> Callable[[], object]:
    arguments = {"q": random(2, 3, 4, 8), "k": random(2, 5, 2, 8), "v": random(2, 5, 2, 6)} | changes
    return lambda: flash_attn_func(**arguments)


def varlen(**changes: object) -> Callable[[], object]:
    """flash_attn_varlen_func on good arguments with some changed: two sequences, of 3 and 4 queries, 5 and 1 keys."""
    arguments = {"q": random(7, 4, 8), "k": random(6, 2, 8), "v": random(6, 2, 8), "max_seqlen_q": 4, "max_seqlen_k": 5}
    arguments |= {"cu_seqlens_q": ints(0, 3, 7), "cu_seqlens_k": ints(0, 5, 6)} | changes
    return lambda: flash_attn_varlen_func(**arguments)


def ints(*values: int) -> Tensor:
    return torch.tensor(values).int()


PAGES = {"k": torch.zeros(3, 4, 2, 8), "v": torch.zeros(3, 4, 2, 8)}
REJECTED = {
    "list": (dense(q=[1.0]), TypeError, "flash_attn_func: q must be a tensor, got list"),
    "q_3d": (dense(q=random(3, 4, 8)), ValueError, r"q must be \(batch_size, seqlen, heads.*got q \(3, 4, 8\)"),
    "batch": (dense(q=random(1, 3, 4, 8)), ValueError, "one batch_size, got 1 and 2"),
    "heads": (dense(q=random(2, 3, 3, 8)), ValueError, "multiple of k's"),
    "headdim": (dense(q=random(2, 3, 4, 9)), ValueError, "q and k in headdim"),
    "lengths": (dense(v=random(2, 6, 2, 8)), ValueError, "k and v must agree"),
    "dtypes": (dense(q=random(2, 3, 4, 8).half()), ValueError, "all the same"),
    "ints": (dense(q=random(2, 3, 4, 8).int()), ValueError, "got q .*int32"),
    "headdim_513": (lambda: flash_attn_func(*random(3, 1, 1, 1, 513)), NotImplementedError, "512.*got 513"),
    "dropout": (dense(dropout_p=1.5), ValueError, r"dropout_p must be a probability in \[0, 1\], got 1.5"),
    "window": (dense(window_size=(1, 2, 3)), ValueError, r"window_size must be \(left, right\)"),
    "window_float": (dense(window_size=(1.5, 2)), ValueError, "window_size"),
    "softcap": (dense(softcap=NAN), ValueError, "softcap must be a finite number"),
    "slopes": (dense(alibi_slopes=random(3)), ValueError, r"alibi_slopes must be .*\(4,\) or \(2, 4\), got \(3,\)"),
    "kv": (lambda: flash_attn.flash_attn_kvpacked_func(random(1, 3, 2, 8), random(1, 3, 3, 2, 8)), ValueError, "kv m"),
    "qkv": (lambda: flash_attn.flash_attn_qkvpacked_func(random(1, 3, 2, 8)), ValueError, "qkv must be .*3, nheads"),
    "q_4d": (varlen(q=random(1, 7, 4, 8)), ValueError, r"flash_attn_varlen_func: q must be \(total"),
    "cu_long": (varlen(cu_seqlens_q=torch.tensor([0, 3, 7])), ValueError, r"cu_seqlens_q must be int32 .*int64 \(3,\)"),
    "cu_list": (varlen(cu_seqlens_q=[0, 3, 7]), ValueError, "cu_seqlens_q must be int32 .*got list"),
    "cu_empty": (varlen(cu_seqlens_k=ints()), ValueError, "cu_seqlens_k must be int32"),
    "cu_first": (varlen(cu_seqlens_k=ints(1, 5, 6)), ValueError, r"begin with 0 and never fall, got \[1, 5, 6\]"),
    "cu_falls": (varlen(cu_seqlens_k=ints(0, 5, 4)), ValueError, "never fall"),
    "cu_end": (varlen(cu_seqlens_k=ints(0, 5, 7)), ValueError, "cu_seqlens_k must end within the 6 rows of k, got 7"),
    "cu_lengths": (varlen(cu_seqlens_k=ints(0, 5)), ValueError, "one length.*got 3 and 2"),
    "max_q": (varlen(max_seqlen_q=3), ValueError, "max_seqlen_q must be at least the longest sequence, 4, got 3"),
    "max_k": (varlen(max_seqlen_k=4), ValueError, "max_seqlen_k must be at least"),
    "slopes_varlen": (varlen(alibi_slopes=random(3, 4)), ValueError, "alibi_slopes"),
    "pages_3d": (varlen(block_table=ints(0, 1).view(2, 1)), ValueError, "num_blocks, page_size"),
    "table_dtype": (varlen(**PAGES, block_table=torch.zeros(2, 2)), ValueError, "block_table must be int32"),
    "table_rows": (varlen(**PAGES, block_table=ints(0, 1).view(1, 2)), ValueError, r"shape \(2, max_blocks\)"),
    "table_short": (varlen(**PAGES, block_table=ints(0, 1).view(2, 1)), ValueError, "1 pages of 4 keys .* one of 5"),
    "table_value": (varlen(**PAGES, block_table=ints(0, 3, 1, 9).view(2, 2)), ValueError, r"0, 1\] must be in \[0, 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", REJECTED)
def test_rejected(name: str) -> None:
    function, error, message = REJECTED[name]
    with pytest.raises(error, match=message):
        function()
