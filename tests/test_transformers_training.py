"""Training and generating with attn_implementation="tilewright": dropout, packing, quantised caches, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from tiny_transformers import build, inputs, relative_error  # noqa: E402
from transformers import DataCollatorWithFlattening, PreTrainedModel  # noqa: E402

from tilewright.integrations import transformers as integration  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread_for_torch")


def training(name: str, implementation: str, dropout: float = 0.0, checkpointing: bool = False) -> PreTrainedModel:
    """A model in train mode whose attention, and nothing else, drops weights."""
    model = build(name, implementation).train()
    model.config.use_cache = False
    for module in model.modules():
        for option in ("attention_dropout", "attn_dropout", "dropout", "dropout_prob"):
            if "Attention" in type(module).__name__ and isinstance(getattr(module, option, None), float | int):
                setattr(module, option, dropout)
            elif "Attention" in type(module).__name__ and isinstance(getattr(module, option, None), torch.nn.Dropout):
                getattr(module, option).p = dropout
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def step(model: Any, given: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of a loss over the tokens that are not padding."""
    out = model(**given)[0]
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape)
    if out.shape[:2] == given["attention_mask"].shape:
        weight = weight * given["attention_mask"].unsqueeze(-1)
    model.zero_grad(set_to_none=True)
    (out * weight).sum().backward()
    return out.detach(), {
        n.removeprefix("_orig_mod."): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def assert_same_gradients(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    bound = 1e-4 * max(float(g.abs().max()) for g in expected.values())
    for parameter, gradient in expected.items():
        assert float((ours[parameter] - gradient).abs().max()) < bound, parameter


# Windows, softcap, sinks, relative positions, encoder and cross attention.
FEATURES = ["mistral", "gemma2", "gemma3_text", "gpt_oss", "modernbert", "t5", "bart", "whisper"]
PARAMETERS = {"gpt_oss": "sinks", "t5": "relative_attention_bias", "bart": "encoder_attn.k_proj"}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", FEATURES)
def test_gradients_of_features(name: str, padding: str) -> None:
    given = inputs(name, padding)
    given.setdefault("attention_mask", torch.ones(2, 1))
    expected_out, expected = step(training(name, "eager"), given)
    for checkpointing in (False, True):
        out, ours = step(training(name, "tilewright", checkpointing=checkpointing), given)
        assert_same_gradients(ours, expected)
    keep = given["attention_mask"].bool() if out.shape[:2] == given["attention_mask"].shape else ...
    assert relative_error(out[keep], expected_out[keep]) < 2e-5
    assert any(PARAMETERS.get(name, "weight") in p and g.abs().max() > 0 for p, g in ours.items())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "bert", "gpt2", "t5", "bart"])
def test_dropout(name: str) -> None:
    """It drops, differently each step, the same when checkpointing computes a layer again, and not in eval mode."""
    given = inputs(name, "right")
    torch.manual_seed(0)
    out, gradients = step(training(name, "tilewright", 0.2), given)
    torch.manual_seed(0)
    again, checkpointed = step(training(name, "tilewright", 0.2, checkpointing=True), given)
    other, _ = step(training(name, "tilewright", 0.2), given)
    still, _ = step(training(name, "tilewright"), given)
    evaluated, _ = step(training(name, "tilewright", 0.2).eval(), given)
    assert torch.equal(out, again)
    assert_same_gradients(checkpointed, gradients)
    keep = given["attention_mask"].bool() if out.shape[:2] == given["attention_mask"].shape else ...
    assert relative_error(other[keep], out[keep]) > 1e-2
    assert relative_error(still[keep], out[keep]) > 1e-2
    assert torch.equal(evaluated, still)


def test_dropout_is_that_of_eager_on_average() -> None:
    """The attention function's mean and spread over many calls, sinks and masks included."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 12, 16, generator=g) for h in (4, 2, 2))
    module = torch.nn.Module()
    mask = torch.rand(1, 1, 12, 12, generator=g) < 0.7
    options: dict[str, Any] = {"s_aux": torch.randn(4, generator=g), "scaling": 0.25}

    def attend(**more: Any) -> Tensor:
        return integration.attention_forward(module, q, k, v, mask, **options, **more)[0]

    samples = torch.stack([attend(dropout=0.4) for _ in range(600)])
    mean, spread = attend(), samples.std(0)
    z = (samples.mean(0) - mean)[spread > 0] / (spread[spread > 0] / 600**0.5)
    assert z.abs().max() < 6 and 0.8 < z.std() < 1.2


# Packed sequences.


@pytest.mark.parametrize(
    ("name", "masked"), [("llama", False), ("llama", True), ("mistral", True), ("gemma2", True), ("gpt_oss", True)]
)
def test_packed_training_is_that_of_each_sequence(name: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row and cu_seq_lens from the collator for flash attention. From position_ids that begin again transformers
    makes a mask, which comes along; without them (rotary embeddings are relative) and without a window it makes none,
    and then nor do we."""
    sequences = [[5, 9, 33, 70, 8, 2, 41], [11, 12], [44, 6, 93, 27, 18]]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_position_ids=True)
    batch = collate([{"input_ids": ids} for ids in sequences])
    batch.pop("labels")
    if not masked:
        batch.pop("position_ids")
        monkeypatch.setattr(integration, "_packed_mask", None)
    model = training(name, "tilewright")
    weight = torch.randn(sum(map(len, sequences)), 100, generator=torch.Generator().manual_seed(0))

    def gradients() -> dict[str, Tensor]:
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    out = model(**batch).logits[0]
    (out * weight).sum().backward()
    packed = gradients()
    alone = torch.cat([model(input_ids=torch.tensor([ids])).logits[0] for ids in sequences])
    (alone * weight).sum().backward()
    assert relative_error(out.detach(), alone.detach()) < 2e-5
    assert_same_gradients(packed, gradients())


def test_packed_dropout_and_sinks() -> None:
    """Both kinds of sinks; a sequence's dropout is in its forward and its backward."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 12, 16, generator=g).requires_grad_() for h in (4, 2, 2))
    bounds = torch.tensor([0, 5, 5, 11]).int()
    packed: dict[str, Any] = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 6, "max_length_k": 6}
    sinks = torch.randn(4, generator=g)
    module = torch.nn.Module()
    a_head, _ = integration.attention_forward(module, q, k, v, None, s_aux=sinks, **packed)
    a_token, _ = integration.attention_forward(module, q, k, v, None, sinks=sinks.view(1, 4, 1, 1), **packed)
    torch.testing.assert_close(a_head, a_token)
    for rows in (slice(0, 5), slice(5, 11)):
        one = [t[:, :, rows] for t in (q, k, v)]
        alone, _ = integration.attention_forward(module, *one, None, s_aux=sinks)
        torch.testing.assert_close(a_head[:, rows], alone)
    out, _ = integration.attention_forward(module, q, k, v, None, 0.4, **packed)
    assert (out[:, :11] - a_head[:, :11]).abs().max() > 1e-2
    weight = torch.randn(out.shape, generator=g)
    (grad,) = torch.autograd.grad((out * weight).sum(), v)
    torch.testing.assert_close((grad * v).sum(), (out * weight).sum())


def test_packed_position_bias() -> None:
    """A bias needs the mask: the result is that of the sequences alone."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 16, generator=g) for _ in range(3))
    bias, bounds = torch.randn(1, 2, 9, 9, generator=g), torch.tensor([0, 4, 9])
    options = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    out, _ = integration.attention_forward(torch.nn.Module(), q, k, v, None, position_bias=bias, **options)
    for rows in (slice(0, 4), slice(4, 9)):
        one = [t[:, :, rows] for t in (q, k, v)]
        alone, _ = integration.attention_forward(torch.nn.Module(), *one, None, position_bias=bias[:, :, rows, rows])
        torch.testing.assert_close(out[:, rows], alone)


# The cache that test_transformers.py leaves out. transformers' offloaded ones need CUDA, whatever the attention.


def test_generate_with_a_quantized_cache() -> None:
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "cache_implementation": "quantized"}
    options |= {"return_dict_in_generate": True, "output_logits": True, "cache_config": {"backend": "fp8"}}
    given = inputs("llama", "left")
    eager, ours = (build("llama", which).generate(**given, **options) for which in ("eager", "tilewright"))
    assert torch.equal(ours.sequences, eager.sequences)
    assert relative_error(torch.stack(ours.logits), torch.stack(eager.logits)) < 2e-2  # keys round otherwise


# Compilation.


@pytest.mark.parametrize(
    ("name", "dropout"), [("llama", 0.2), ("gemma2", 0.0), ("gpt_oss", 0.2), ("bert", 0.2), ("t5", 0.0)]
)
def test_a_compiled_training_step(name: str, dropout: float) -> None:
    given, model = inputs(name, "right"), training(name, "tilewright", dropout)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    out, gradients = step(compiled, given)
    torch.manual_seed(1)
    expected_out, expected = step(model, given)
    keep = given["attention_mask"].bool() if out.shape[:2] == given["attention_mask"].shape else ...
    assert relative_error(out[keep], expected_out[keep]) < 2e-5
    unused = gradients.keys() - expected.keys()  # a compiled graph gives them zeros
    assert all((gradients.pop(p) == 0).all() for p in unused)
    assert_same_gradients(gradients, expected)
    if dropout:
        assert not torch.equal(step(compiled, given)[0], out), "dropout's seed became a constant"


def test_packed_sequences_compile() -> None:
    model = training("llama", "tilewright")
    given = inputs("llama", "none") | {"attention_mask": None}
    given["input_ids"] = given["input_ids"][:1]
    given["position_ids"] = torch.cat([torch.arange(4), torch.arange(7)])[None]
    bounds = torch.tensor([0, 4, 11]).int()
    given |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 7, "max_length_k": 7}
    torch._dynamo.reset()
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(**given).logits
    assert relative_error(out.detach(), model(**given).logits.detach()) < 2e-5
