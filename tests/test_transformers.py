"""attn_implementation="tilewright": tiny random models of transformers' types against their own eager attention."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tilewright

transformers = pytest.importorskip("transformers")

from tiny_transformers import CASES, DECODER, SLIDING, build, first_output, inputs, relative_error  # noqa: E402
from transformers import (  # noqa: E402
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.masking_utils import causal_mask_function  # noqa: E402

from tilewright import register_transformers  # noqa: E402
from tilewright.integrations.transformers import attention_forward, attention_mask  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread_for_torch")


GENERATING = ["llama", "mistral", "gemma2", "gemma3_text", "gpt_oss", "deepseek_v3", "gpt2", "t5", "bart", "bloom"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the modules that called the attention function; each call must have run a kernel of ours."""
    seen: list[str] = []
    x = torch.zeros(1, 1, 1, 4)

    def counting(module: nn.Module, *args: Any, **options: Any) -> Any:
        tilewright.attention(x, x, x, backend="reference")
        out = attention_forward(module, *args, **options)
        assert tilewright.last_impl("attention") != "reference"
        seen.append(type(module).__name__)
        return out

    monkeypatch.setitem(AttentionInterface._global_mapping, "tilewright", counting)
    return seen


def paddings(name: str) -> list[str]:
    return ["none", "left", "right"] if CASES[name].inputs in ("text", "seq2seq") else ["none"]


@pytest.mark.parametrize("name", CASES)
def test_matches_eager(name: str, calls: list[str]) -> None:
    eager, ours = build(name, "eager"), build(name, "tilewright")
    assert (eager.config._attn_implementation, ours.config._attn_implementation) == ("eager", "tilewright")
    for padding in paddings(name):
        calls.clear()
        given = inputs(name, padding)
        assert relative_error(first_output(ours, given), first_output(eager, given)) < 2e-5, padding
        assert len(calls) == CASES[name].calls


@pytest.mark.parametrize("name", [n for n in CASES if len(paddings(n)) > 1])
def test_a_lost_padding_mask_would_be_seen(name: str) -> None:
    """What `test_matches_eager` compares does depend on the mask, for every type and by far more than its bound."""
    eager, given = build(name, "eager"), inputs(name, "left")
    lost = given | {"attention_mask": torch.ones(2, 11, dtype=torch.int64)}
    with torch.no_grad():
        out = eager(**lost)[0]
    kept = given["attention_mask"].bool()
    out = out[kept] if out.shape[:2] == kept.shape else out
    assert relative_error(out, first_output(eager, given)) > 1e-3


@pytest.mark.parametrize("name", [n for n in CASES if CASES[n].calls])
def test_bfloat16(name: str) -> None:
    """At most twice the error of transformers' eager attention in bfloat16."""
    exact = build(name, "eager", torch.bfloat16).float()
    naive, ours = (build(name, which, torch.bfloat16) for which in ("eager", "tilewright"))
    padding = paddings(name)[-1]
    given = inputs(name, padding, torch.bfloat16)
    expected = first_output(exact, {k: v.float() if v.is_floating_point() else v for k, v in given.items()})
    error, allowed = (relative_error(first_output(model, given), expected) for model in (ours, naive))
    assert error <= 2 * allowed + 1e-3


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", GENERATING)
def test_generate(name: str, cache: str) -> None:
    """Greedy tokens of a left-padded batch equal eager's; more tokens than the sliding windows hold."""
    prompt = {k: v for k, v in inputs(name, "left").items() if k != "decoder_input_ids"}
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    eager, ours = build(name, "eager"), build(name, "tilewright")
    for model in (eager, ours):
        model.generation_config.disable_compile = True
    expected, out = eager.generate(**prompt, **options), ours.generate(**prompt, **options)
    assert torch.equal(out.sequences, expected.sequences)
    assert relative_error(torch.stack(out.logits), torch.stack(expected.logits)) < 5e-5


def test_a_padded_prompt_generates_as_it_does_alone() -> None:
    model, given = build("llama", "tilewright"), inputs("llama", "left")
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    both = model.generate(**given, **options)
    alone = model.generate(given["input_ids"][:1, 4:], attention_mask=torch.ones(1, 7, dtype=torch.int64), **options)
    assert torch.equal(both[0, 11:], alone[0, 7:])


def test_queries_dropped_before_the_last_layers(calls: list[str]) -> None:
    """Gemma 4 keeps only the last queries in its shared layers, and then a mask of None would not mean causal."""
    layers = {"num_kv_shared_layers": 2, "num_hidden_layers": 4, "layer_types": SLIDING * 2, "vocab_size": 100}
    config = AutoConfig.for_model(
        "gemma4_text",
        **DECODER | layers | {"head_dim": 16, "global_head_dim": 16, "sliding_window": 32},
        vocab_size_per_layer_input=100,
        hidden_size_per_layer_input=16,
        pad_token_id=0,
    )
    out = []
    for implementation in ("eager", "tilewright"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=implementation).eval()
        model.generation_config.disable_compile = True
        ids = torch.randint(3, 99, (2, 11), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            out.append(model(ids, logits_to_keep=3).logits)
            out.append(model.generate(ids, max_new_tokens=6, do_sample=False, cache_implementation="static"))
    assert calls
    assert relative_error(out[2], out[0]) < 2e-5
    assert torch.equal(out[3], out[1])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "bert", "t5", "bart"])
def test_gradients(name: str, checkpointing: bool, calls: list[str]) -> None:
    """Every parameter's gradient, of sinks and relative position biases too."""
    gradients = []
    for implementation in ("eager", "tilewright"):
        model = build(name, implementation).train()
        if checkpointing:
            model.config.use_cache = False
            model.gradient_checkpointing_enable({"use_reentrant": False})
        out = model(**inputs(name, "right"))[0]
        weight = torch.linspace(-1, 1, out.numel()).view(out.shape)
        if out.shape[:2] == (2, 11):
            weight = weight * inputs(name, "right")["attention_mask"].unsqueeze(-1)
        (out * weight).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    eager, ours = gradients
    assert len(calls) == CASES[name].calls * (2 if checkpointing else 1)
    assert eager.keys() == ours.keys()
    for parameter, expected in eager.items():
        bound = 1e-4 * max(float(g.abs().max()) for g in eager.values())
        assert float((ours[parameter] - expected).abs().max()) < bound, parameter


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss", "bert", "bloom"])
def test_compiled_in_one_graph(name: str) -> None:
    model, given = build(name, "tilewright"), inputs(name, "left")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative_error(first_output(compiled, given), first_output(build(name, "eager"), given)) < 2e-5


def test_every_way_to_select_it(tmp_path: Path) -> None:
    eager, given = build("llama", "eager"), inputs("llama", "left")
    expected = first_output(eager, given)
    eager.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="tilewright", dtype=torch.float32)
    assert loaded.config._attn_implementation == "tilewright"
    assert 0 < relative_error(first_output(loaded, given), expected) < 2e-5
    eager.set_attn_implementation("tilewright")
    assert eager.config._attn_implementation == "tilewright"
    assert torch.equal(first_output(eager, given), first_output(loaded, given))


def test_another_name() -> None:
    register_transformers("tilewright_again")
    try:
        ours, again, given = build("llama", "tilewright"), build("llama", "tilewright_again"), inputs("llama", "left")
        assert again.config._attn_implementation == "tilewright_again"
        assert torch.equal(first_output(ours, given), first_output(again, given))
    finally:
        del AttentionInterface._global_mapping["tilewright_again"]
        del AttentionMaskInterface._global_mapping["tilewright_again"]


@pytest.mark.parametrize(
    "name", ["my_sdpa", "flash_tilewright", "flex_attention_2", "me/tilewright", "paged|x", "eager", ""]
)
def test_names_that_transformers_reads_otherwise(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be a name"):
        register_transformers(name)
    assert name not in AttentionInterface._global_mapping or name == "eager"


@pytest.mark.parametrize("name", ["falcon", "gptj", "data2vec-vision"])
def test_types_with_a_table_of_their_own_say_so(name: str) -> None:
    config = AutoConfig.for_model(name, hidden_size=64, num_attention_heads=4, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"does not support attn_implementation='tilewright'.*ATTENTION_CLASSES"):
        AutoModel.from_config(config, attn_implementation="tilewright")


def test_types_that_compute_attention_themselves_say_so() -> None:
    config = AutoConfig.for_model("bloom", hidden_size=64, n_layer=1, n_head=4, vocab_size=100)
    with pytest.warns(UserWarning, match="BloomForCausalLM computes attention in its own code"):
        AutoModelForCausalLM.from_config(config, attn_implementation="tilewright")
    config = AutoConfig.for_model("llama", **DECODER, vocab_size=100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoModelForCausalLM.from_config(config, attn_implementation="tilewright")


def test_attention_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"output_attentions=True.*'eager'"):
        build("llama", "tilewright")(**inputs("llama", "none"), output_attentions=True)


# --- the attention function itself, against transformers' sdpa function where that knows the keyword ---


def attention_module(**attributes: Any) -> Any:
    return SimpleNamespace(num_key_value_groups=2, **attributes)


def qkv(batch: int = 2, seq_q: int = 5, seq_k: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, 4, seq_q, 16, generator=generator)
    return q, *torch.randn(2, batch, 2, seq_k, 16, generator=generator).unbind()


def plain(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None, **options: Any) -> Tensor:
    """Attention in float64, in the attention function's layout (batch, seq, heads, dim)."""
    return tilewright.attention(q.double(), k.double(), v.double(), mask=allowed, **options).transpose(1, 2)


@pytest.mark.parametrize("seq_q", [1, 5, 9])
@pytest.mark.parametrize("is_causal", [None, True, False])
@pytest.mark.parametrize("attribute", [{}, {"is_causal": True}, {"is_causal": False}], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_causality_without_a_mask(seq_q: int, is_causal: bool | None, attribute: dict[str, bool], biased: bool) -> None:
    """Longer keys are a static cache's unused end: cut off if causal, attended if not, as under sdpa."""
    q, k, v = qkv(seq_q=seq_q)
    bias = torch.randn(1, 4, seq_q, 9, generator=torch.Generator().manual_seed(1)) if biased else None
    expected, _ = sdpa_attention_forward(
        attention_module(**attribute), q, k, v, None, is_causal=is_causal, position_bias=bias
    )
    out, weights = attention_forward(
        attention_module(**attribute), q, k, v, None, is_causal=is_causal, position_bias=bias
    )
    assert weights is None
    assert out.shape == (2, seq_q, 4, 16) and out.is_contiguous()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("boolean", [True, False])
def test_masks_with_and_without_position_bias(boolean: bool) -> None:
    q, k, v = qkv()
    generator = torch.Generator().manual_seed(1)
    allowed = torch.rand(2, 1, 5, 9, generator=generator) > 0.4
    mask = allowed if boolean else torch.zeros(2, 1, 5, 9).masked_fill(~allowed, torch.finfo(torch.float32).min)
    for bias in (None, torch.randn(1, 4, 5, 9, generator=generator)):
        out, _ = attention_forward(attention_module(), q, k, v, mask, scaling=0.3, position_bias=bias)
        expected, _ = sdpa_attention_forward(attention_module(), q, k, v, mask, scaling=0.3, position_bias=bias)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_sliding_window_without_a_mask() -> None:
    near = (torch.arange(9).view(-1, 1) - torch.arange(9)).abs() < 3
    q, k, v = qkv(seq_q=9)
    out, _ = attention_forward(attention_module(is_causal=True), q, k, v, None, sliding_window=3)
    torch.testing.assert_close(out.double(), plain(q, k, v, near.tril()), rtol=1e-5, atol=1e-5)
    out, _ = attention_forward(attention_module(is_causal=False), q, k, v, None, sliding_window=3)
    torch.testing.assert_close(out.double(), plain(q, k, v, near), rtol=1e-5, atol=1e-5)
    q, k, v = qkv(seq_q=1)
    out, _ = attention_forward(attention_module(), q, k, v, None, sliding_window=3)
    torch.testing.assert_close(out.double(), plain(q, k[:, :, 6:], v[:, :, 6:]), rtol=1e-5, atol=1e-5)


def test_softcap_and_sinks() -> None:
    q, k, v = qkv()
    sinks = torch.tensor([-1.0, 0.0, 1.0, 3.0])
    options = {"softcap": 1.5, "is_causal": False}
    out, _ = attention_forward(attention_module(), q, k, v, None, s_aux=sinks, **options)
    expected = plain(q, k, v, softcap=1.5, sinks=sinks.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert (expected - plain(q, k, v, sinks=sinks.double())).abs().max() > 1e-2
    assert (expected - plain(q, k, v, softcap=1.5)).abs().max() > 1e-2
    # A sink a token, as Inkling passes it; with the same value everywhere it is the same as a sink a head.
    a_token = sinks.view(1, 4, 1, 1).expand(2, 4, 5, 1)
    out, _ = attention_forward(attention_module(), q, k, v, None, sinks=a_token, **options)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_packed_sequences(causal: bool, window: int | None) -> None:
    """Each sequence gives what it gives alone, its queries at the end of its keys; the tail belongs to none."""
    q, k, v = qkv(batch=1, seq_q=8, seq_k=12)
    bounds_q, bounds_k = [0, 3, 3, 7], [0, 5, 7, 11]
    packed = {"cu_seq_lens_q": torch.tensor(bounds_q, dtype=torch.int32), "max_length_q": 4}
    packed |= {"cu_seq_lens_k": torch.tensor(bounds_k, dtype=torch.int32), "max_length_k": 5}
    out, _ = attention_forward(attention_module(is_causal=causal), q, k, v, None, sliding_window=window, **packed)
    options: dict[str, Any] = {"causal": "bottom_right" if causal else None}
    options["window"] = None if window is None else (window - 1, window - 1)
    for i in range(3):
        rows, keys = slice(*bounds_q[i : i + 2]), slice(*bounds_k[i : i + 2])
        alone = plain(q[:, :, rows], k[:, :, keys], v[:, :, keys], **options)
        torch.testing.assert_close(out[:, rows].double(), alone, rtol=1e-5, atol=1e-5)
    assert torch.equal(out[:, 7:], torch.zeros(1, 1, 4, 16))


def test_packed_sequences_restrict_a_mask() -> None:
    q, k, v = qkv(batch=1, seq_q=6, seq_k=6)
    bounds = torch.tensor([0, 2, 6])
    allowed = torch.ones(6, 6, dtype=torch.bool).tril()
    same = torch.zeros(6, 6, dtype=torch.bool)
    same[:2, :2] = same[2:, 2:] = True
    for mask in (allowed, torch.zeros(6, 6).masked_fill(~allowed, -torch.inf)):
        out, _ = attention_forward(attention_module(), q, k, v, mask, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)
        torch.testing.assert_close(out.double(), plain(q, k, v, allowed & same), rtol=1e-5, atol=1e-5)


def test_learned_queries_with_batch_one() -> None:
    q, k, v = qkv()
    out, _ = attention_forward(attention_module(), q[:1], k, v, None, is_causal=False)
    torch.testing.assert_close(out.double(), plain(q[:1].expand(2, -1, -1, -1), k, v), rtol=1e-5, atol=1e-5)


def test_autocast_takes_mixed_dtypes() -> None:
    """Rotary embeddings in float32 leave q and k wider than v."""
    q, k, v = qkv()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = attention_forward(attention_module(), q, k, v.bfloat16(), None, is_causal=False)
    assert out.dtype == torch.bfloat16
    exact = plain(*(t.bfloat16() for t in (q, k, v)))
    torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"indices": torch.zeros(1)}, NotImplementedError, "indices= .*sparse top-k"),
        ({"block_indices": torch.zeros(1)}, NotImplementedError, "block_indices= .*sparse"),
        ({"cache": object()}, NotImplementedError, "cache= .*paged cache"),
        ({"output_attentions": True}, ValueError, "output_attentions=True"),
        ({"cu_seq_lens_q": torch.tensor([0, 5])}, ValueError, "must come together"),
        ({"max_length_k": 3}, ValueError, "must come together"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 5]), "cu_seq_lens_k": torch.tensor([0, 9])},
            ValueError,
            "batch of 1, got 2",
        ),
        ({"head_mask": torch.ones(4)}, TypeError, "unknown keyword head_mask= \\(Tensor\\)"),
        ({"no_such_thing": 0}, TypeError, "unknown keyword no_such_thing= \\(int\\)"),
    ],
)
def test_keywords_that_are_refused(keywords: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        attention_forward(attention_module(), *qkv(), None, **keywords)


@pytest.mark.parametrize("models_loaded", [True, False])
def test_keywords_that_are_not_ours(models_loaded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv()
    expected, _ = attention_forward(attention_module(), q, k, v, None)
    riders = {"use_cache": True, "position_ids": torch.arange(5), "output_attentions": False, "deterministic": True}
    riders |= {"num_items_in_batch": torch.tensor(3), "vision_feature_layer": -1, "head_mask": None, "cache": None}
    if models_loaded:
        build("llama", "tilewright")
        riders["logits_to_keep"] = 1  # an input of the model above
    else:
        monkeypatch.setattr(PreTrainedModel, "__subclasses__", list)
        monkeypatch.setattr("tilewright.integrations.transformers._model_inputs", {})
    out, _ = attention_forward(attention_module(), q, k, v, None, 0.0, **riders)
    assert torch.equal(out, expected)


def test_tensors_elsewhere_are_refused() -> None:
    q, k, v = (t.to("meta") for t in qkv())
    assert attention_forward(attention_module(), q, k, v, None)[0].shape == (2, 5, 4, 16)
    fake = SimpleNamespace(device=torch.device("mps", 0))
    with pytest.raises(NotImplementedError, match="must be on the CPU or a GPU, got mps:0"):
        attention_forward(attention_module(), fake, fake, fake, None)


# --- the mask function ---


def mask_for(name: str, **options: Any) -> Tensor | None:
    config = build(name, "tilewright").config if name in CASES else AutoConfig.for_model(name)
    options = {"batch_size": 2, "q_length": 5, "kv_length": 5, "dtype": torch.float32} | options
    return attention_mask(config=config, mask_function=causal_mask_function, **options)


def test_masks_are_boolean_or_none_for_the_attention_function() -> None:
    padding = torch.ones(2, 5, dtype=torch.bool)
    assert mask_for("llama", attention_mask=padding) is None
    assert mask_for("llama", allow_is_causal_skip=False).dtype == torch.bool
    padding[0, 0] = False
    mask = mask_for("gemma2", attention_mask=padding)
    assert mask.dtype == torch.bool
    assert torch.equal(mask[1, 0], torch.ones(5, 5, dtype=torch.bool).tril())
    assert not mask[0, 0, :, 0].any()


@pytest.mark.parametrize("name", ["bloom", "mpt", "codegen", "splinter"])
def test_masks_are_additive_where_models_read_them(name: str) -> None:
    mask = mask_for(name)
    assert mask.dtype == torch.float32
    lowest = torch.finfo(torch.float32).min
    assert torch.equal(mask[0, 0], torch.full((5, 5), lowest).triu(1))
    assert torch.equal(attention_mask(batch_size=1, q_length=5, kv_length=5)[0, 0], mask[0, 0])  # no config
