"""Every registered op under torch.library's checks, torch.compile and the aot and inductor backends."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compare import assert_close, assert_same_bits
from torch import Tensor, nn
from torch.library import opcheck

import tilewright
from tilewright import attention, quantize_, quantize_weight, quantized_linear
from tilewright.ops.attention import attention_cached
from tilewright.ops.attention_reference import Operands

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
WEIGHT = quantize_weight(torch.randn(40, 64, generator=torch.Generator().manual_seed(1)))


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch.compiler.reset()


def rand(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(shape).requires_grad_(grad)


def attention_arguments(grad: bool, **changes: object) -> tuple:
    """The arguments of torch.ops.tilewright.attention, in the schema's order."""
    values = {
        "q": rand(2, 4, 3, 8, grad=grad), "k": rand(2, 2, 5, 8, grad=grad), "v": rand(2, 2, 5, 6, grad=grad),
        **dict.fromkeys(Operands._fields[3:]), "scale": 0.3, "softcap": 0.0, "causal": 2, "left": -1, "right": -1,
        "dropout_p": 0.0, "backend": "auto", **changes,
    }  # fmt: skip
    return tuple(values.values())


def head_last(*shape: int) -> Tensor:
    """(batch, heads, seq, dim) in the order a projection writes it."""
    batch, heads, seq, dim = shape
    return rand(batch, seq, heads, dim).transpose(1, 2)


def linear_arguments(grad: bool, activation: str, x: Tensor | None = None) -> tuple:
    x = rand(2, 3, 64, grad=grad) if x is None else x
    return (x, WEIGHT.packed, rand(40, grad=grad), None, None, None, *WEIGHT.spec(), activation, 0.0, "auto")


COS, SIN = rand(9, 4), rand(9, 4)
# Arguments for every op of the library, each called on plain inputs, with gradients where it has them, and strided.


def backward_arguments(**changes: object) -> tuple:
    """The same of attention_backward."""
    operands, options = (lambda a: (a[:14], a[14:20]))(attention_arguments(False, **changes))
    out, lse = torch.ops.tilewright.attention(*operands, *options, "auto")
    return (torch.ones_like(out), torch.ones_like(lse), *operands, out, lse, *options, True, True, "auto")


SAMPLES: dict[str, list[Callable[[], tuple]]] = {
    "attention": [
        lambda: attention_arguments(False),
        lambda: attention_arguments(True),
        lambda: attention_arguments(False, q=head_last(2, 4, 3, 8), k=head_last(2, 2, 5, 8)),
        lambda: attention_arguments(
            True, mask=torch.rand(2, 1, 3, 5) < 0.5, bias=rand(4, 3, 5, grad=True), sinks=rand(4, grad=True),
            alibi=torch.rand(4), softcap=2.0, left=3,
        ),
        lambda: attention_arguments(True, dropout_p=0.5, seed=torch.tensor([3])),
        lambda: attention_arguments(
            True, q=rand(1, 4, 7, 8, grad=True), k=rand(1, 2, 9, 8, grad=True), v=rand(1, 2, 9, 6, grad=True),
            q_start=torch.tensor([0, 3]), q_end=torch.tensor([3, 7]), k_start=torch.tensor([0, 4]),
            k_end=torch.tensor([4, 9]),
        ),
        lambda: attention_arguments(False, k_start=torch.tensor([0, 1]), k_end=torch.tensor([5, 4])),
    ],
    "attention_backward": [
        lambda: backward_arguments(),
        lambda: backward_arguments(bias=rand(4, 3, 5), alibi=torch.rand(4), mask=torch.rand(2, 1, 3, 5) < 0.5),
    ],
    "quantized_linear": [
        lambda: linear_arguments(False, "int8"),
        lambda: linear_arguments(True, "fp32"),
        lambda: linear_arguments(False, "bf16", rand(5, 3, 64).transpose(0, 1)),
        lambda: linear_arguments(True, "int8", rand(64, grad=True)),
    ],
    "weight_rows": [lambda: (torch.arange(40), WEIGHT.packed, *WEIGHT.spec())],
    "norm": [
        lambda: (rand(3, 8), None, None, None, 1e-5, False, "auto"),
        lambda: (rand(3, 8, grad=True), rand(3, 8, grad=True), rand(8, grad=True), rand(8, grad=True), 1e-5, True,
                 "auto"),
        lambda: (rand(8, grad=True), None, rand(8, grad=True), rand(8, grad=True), 1e-5, True, "auto"),
        lambda: (rand(8, 3).t(), rand(3, 8), rand(8), None, 1e-5, False, "auto"),
        lambda: (rand(4, 3, 8).transpose(0, 1), None, rand(8), None, 1e-5, False, "auto"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("op, index", [(op, i) for op, makes in SAMPLES.items() for i in range(len(makes))])
def test_opcheck(op: str, index: int) -> None:
    torch.manual_seed(0)
    opcheck(getattr(torch.ops.tilewright, op).default, SAMPLES[op][index]())


def test_every_op_is_checked() -> None:
    """Each op of the library stands in SAMPLES or in an opcheck of its own test file."""
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("tilewright::")}
    files = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py")]
    checked = "".join(text for text in files if "opcheck(" in text and "SAMPLES" not in text)
    missing = {name for name in names if name not in SAMPLES and not re.search(rf"tilewright\.{name}\b", checked)}
    assert names and not missing


def everything(q: Tensor, k: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    out, lse = attention(q, k, k, causal="bottom_right", window=(4, -1), softcap=3.0, return_lse=True)
    y = quantized_linear(x, WEIGHT, bias)
    normed, total = tilewright.rms_norm(y, bias, 1e-5, residual=y)
    return out, lse, y, normed, total, tilewright.scaled_dot_product_attention(q, q, q, is_causal=True)


@pytest.mark.parametrize("kind, dynamic", [("plain", False), ("plain", True), ("strided", False), ("bfloat16", False)])
def test_forward(kind: str, dynamic: bool) -> None:
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch, seq_q, seq_k in ((1, 3, 5), (2, 1, 70), (2, 20, 20)):
        q, k = rand(batch, 4, seq_q, 8), rand(batch, 2, seq_k, 8)
        if kind == "strided":
            q, k = head_last(batch, 4, seq_q, 8), head_last(batch, 2, seq_k, 8)
        arguments = (q, k, rand(batch, seq_q, 64), rand(40))
        if kind == "bfloat16":
            arguments = tuple(t.bfloat16() for t in arguments)
        for a, b in zip(compiled(*arguments), everything(*arguments), strict=True):
            assert_same_bits(a, b)
            assert a.stride() == b.stride()


def test_shapes_do_not_recompile_each_time() -> None:
    """A growing cache: after the second shape the graph is dynamic."""
    compilations = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        compilations.append(graph)
        return graph.forward

    step = torch.compile(lambda q, k: attention(q, k, k, causal="bottom_right"), fullgraph=True, backend=backend)
    q = rand(1, 4, 1, 8)
    for seq_k in range(5, 40, 5):
        k = rand(1, 2, seq_k, 8)
        assert_same_bits(step(q, k), attention(q, k, k, causal="bottom_right"))
    assert len(compilations) <= 2


def test_gradients() -> None:
    def loss(q: Tensor, k: Tensor, x: Tensor, bias: Tensor) -> Tensor:
        return sum(t.square().sum() for t in everything(q, k, x, bias))

    inputs = [rand(2, 4, 3, 8), rand(2, 2, 5, 8), rand(2, 3, 64), rand(40)]

    def gradients(function: Callable) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in inputs]
        return torch.autograd.grad(function(*leaves), leaves)

    eager = gradients(loss)
    for a, b in zip(gradients(torch.compile(loss, fullgraph=True, backend="aot_eager")), eager, strict=True):
        torch.testing.assert_close(a, b)


def test_out_and_caches() -> None:
    k, start, end = rand(2, 2, 9, 8), torch.tensor([0, 3]), torch.tensor([9, 7])

    def function(q: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        attention(q, k, k, out=out)
        return out * 2, attention_cached(q, k, k, k_start=start, k_end=end, scale=0.3)

    q = rand(2, 4, 3, 8)
    results = [torch.empty(2, 4, 3, 8) for _ in range(2)]
    pairs = zip(
        torch.compile(function, fullgraph=True, backend="aot_eager")(q, results[0]),
        function(q, results[1]),
        strict=True,
    )
    for a, b in pairs:
        assert_same_bits(a, b)
    assert_same_bits(*results)


def test_backends_by_name_compile() -> None:
    def function(q: Tensor, x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        return attention(q, q, q, backend=backend), quantized_linear(x, WEIGHT, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    q, x = rand(1, 2, 3, 8), rand(3, 64)
    for name in ("cpu", "reference"):
        for a, b in zip(compiled(q, x, name), function(q, x, name), strict=True):
            torch.testing.assert_close(a, b)


def test_embedding_rows_compile() -> None:
    compiled = torch.compile(lambda ids: WEIGHT.rows(ids) + 1, fullgraph=True, backend="aot_eager")
    ids = torch.tensor([[3, 39], [0, 1]])
    assert_same_bits(compiled(ids), WEIGHT.rows(ids) + 1)


class Layer(nn.Module):
    """Attention between quantised projections, as a user's model has them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return self.out(attention(q, k, v, causal="top_left").transpose(1, 2).flatten(2)) + x


def test_inductor() -> None:
    """The default backend, once: a module with quantised layers, forward and backward."""
    torch.manual_seed(0)
    layer = quantize_(Layer(), activation="fp32")
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        x = rand(2, 7, 32)
        torch.testing.assert_close(compiled(x), layer(x))
    x, upstream = rand(2, 7, 32, grad=True), rand(2, 7, 32)
    ours = torch.autograd.grad(compiled(x), x, upstream)[0]
    eager = torch.autograd.grad(layer(x), x, upstream)[0]
    assert_close(ours, eager.double(), eager, torch.float32)


def test_export() -> None:
    """torch.export keeps the ops as they are."""
    layer = quantize_(Layer()).eval()
    x = rand(2, 7, 32)
    program = torch.export.export(layer, (x,))
    assert "tilewright.attention" in program.graph_module.code
    assert_same_bits(program.module()(x), layer(x))
