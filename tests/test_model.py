"""The decoder against transformers: tiny models of every family, and the default model's real weights."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import one_thread  # noqa: F401  (a fixture)

from tilewright import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from tilewright.io.pull import pull

SCALED = {"original_max_position_embeddings": 32, "rope_theta": 10000.0}


@dataclass(frozen=True)
class Case:
    name: str
    family: str
    overrides: dict[str, Any] = field(default_factory=dict)


CASES = [
    Case("llama", "llama"),
    Case("llama_biases", "llama", {"attention_bias": True, "mlp_bias": True}),
    Case("llama_tied", "llama", {"tie_word_embeddings": True}),
    Case("llama_group5", "llama", {"num_attention_heads": 5, "num_key_value_heads": 1, "hidden_size": 80}),
    Case("llama_heads_beside_hidden", "llama", {"head_dim": 32}),
    Case("mistral", "mistral"),
    Case("mistral_window", "mistral", {"sliding_window": 5}),
    Case("mistral_no_window", "mistral", {"sliding_window": None}),
    Case("qwen2", "qwen2"),
    Case("qwen2_windows", "qwen2", tiny.WINDOWED),
    Case("linear", "llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 5e4}}),
    Case("dynamic", "llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    Case(
        "dynamic_beyond",
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, "max_position_embeddings": 16},
    ),
    Case("yarn", "llama", {"rope_parameters": {"rope_type": "yarn", "factor": 8.0, **SCALED}}),
    Case(
        "llama3",
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                **SCALED,
            }
        },
    ),
    Case(
        "longrope",
        "llama",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "factor": 8.0,
                "short_factor": [1.0 + 0.1 * i for i in range(8)],
                "long_factor": [1.0 + i for i in range(8)],
                **SCALED,
            }
        },
    ),
]


def within_rule(out: torch.Tensor, naive: torch.Tensor, exact: torch.Tensor) -> None:
    """At most twice the error of the same maths in plain torch fp32, by maximum and by root mean square."""
    assert out.shape == exact.shape
    assert torch.isfinite(out).all()
    ours, theirs = (out.double() - exact).abs(), (naive.double() - exact).abs()
    floor = 2e-6 * exact.abs().max()
    assert ours.max() <= 2 * theirs.max() + floor
    assert ours.square().mean().sqrt() <= 2 * theirs.square().mean().sqrt() + floor


@torch.no_grad()
def exact_and_naive(reference: Any, ids: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    naive = reference(ids, **kwargs).logits
    exact = reference.double()(ids, **kwargs).logits
    reference.float()
    return exact, naive


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_and_tokens_match_transformers(case: Case, tmp_path: Path) -> None:
    reference = tiny.save(tmp_path, case.family, **case.overrides)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = tiny.prompts(2, 40)
    exact, naive = exact_and_naive(reference, ids)
    within_rule(model(ids).logits, naive, exact)

    padded = ids.clone()
    padded[0, :13] = 0
    mask = torch.ones_like(padded)
    mask[0, :13] = 0
    settings = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}
    expected = reference.generate(padded, attention_mask=mask, **settings)
    assert torch.equal(model.generate(padded, attention_mask=mask, **settings), expected)


@pytest.mark.parametrize("rope", [None, {"type": "linear", "factor": 2.0}])
def test_transformers_4_spelling(rope: dict | None, tmp_path: Path) -> None:
    import json

    reference = tiny.save(
        tmp_path, "llama", rope_parameters={"rope_type": "default", "rope_theta": 777.0, **(rope or {})}
    )
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("rope_parameters")
    config |= {"rope_theta": 777.0, "rope_scaling": rope, "torch_dtype": config.pop("dtype", "float32")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.rope_theta == 777.0
    if rope is None:
        ids = tiny.prompts(1, 9)
        exact, naive = exact_and_naive(reference, ids)
        within_rule(model(ids).logits, naive, exact)
    else:
        assert model.config.rope_scaling["rope_type"] == "linear"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("llama")
    reference = tiny.save(folder, "llama")
    return AutoModelForCausalLM.from_pretrained(folder), reference


def test_hidden_states_and_kept_logits(llama: tuple[Any, Any]) -> None:
    model, reference = llama
    ids = tiny.prompts(2, 11)
    ours = model(ids, output_hidden_states=True)
    with torch.no_grad():
        theirs = reference(ids, output_hidden_states=True)
    assert len(ours.hidden_states) == len(theirs.hidden_states)
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, ours.logits[:, -3:], rtol=1e-5, atol=1e-5)
    kept = model(ids, logits_to_keep=torch.tensor([0, 5])).logits
    torch.testing.assert_close(kept, ours.logits[:, [0, 5]], rtol=1e-5, atol=1e-5)
    assert ours["logits"] is ours.logits
    assert ours[0] is ours.logits
    assert ours.keys() == ["logits", "past_key_values", "hidden_states"]
    assert model(ids, use_cache=False).past_key_values is None


def test_cache_in_pieces_equals_one_pass(llama: tuple[Any, Any]) -> None:
    model, _ = llama
    ids = tiny.prompts(2, 30)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    whole = model(ids, attention_mask=mask).logits
    cache, pieces = DynamicCache(), []
    for start, end in ((0, 7), (7, 8), (8, 9), (9, 30)):
        out = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
        assert out.past_key_values is cache
        assert cache.get_seq_length() == end
        pieces.append(out.logits)
    got = torch.cat(pieces, dim=1)
    torch.testing.assert_close(got[mask.bool()], whole[mask.bool()], rtol=1e-4, atol=1e-4)


def test_padding_never_counts(llama: tuple[Any, Any]) -> None:
    model, _ = llama
    ids = tiny.prompts(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    cache = DynamicCache()
    model(ids, attention_mask=mask, past_key_values=cache)
    for buffers in (cache.keys, cache.values):
        for buffer in buffers:
            buffer[0, :, :6] = torch.nan
            buffer[:, :, 20:] = torch.nan
    step = model(ids[:, :1], past_key_values=cache).logits
    alone = model(torch.cat([ids[:1, 6:], ids[:1, :1]], 1)).logits[:, -1:]
    assert torch.isfinite(step).all()
    torch.testing.assert_close(step[:1], alone, rtol=1e-4, atol=1e-4)


STEPS = [
    ("llama", {}, {}),
    ("llama", {"attention_bias": True, "mlp_bias": True}, {"quantization": "int8"}),
    ("llama", {"tie_word_embeddings": True}, {"quantization": {"bits": 4, "skip": ()}, "activation": "fp32"}),
    ("qwen2", tiny.WINDOWED, {"quantization": {"bits": 4, "skip": ("k_proj", "o_proj")}, "activation": "bf16"}),
    ("mistral", {"sliding_window": 5}, {"dtype": torch.bfloat16}),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16}, {}),
]


@pytest.mark.parametrize(("family", "overrides", "load"), STEPS, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_prepared_steps_equal_plain_ones(
    family: str, overrides: dict, load: dict, padded: bool, tmp_path: Path
) -> None:
    """The decoding step on prepared buffers against the same step op by op, bit for bit, while the cache grows."""
    tiny.save(tmp_path, family, **overrides)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **load)
    ids = tiny.prompts(2, 250)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :9] = 0
    prepared, plain = DynamicCache(), DynamicCache()
    for cache in (prepared, plain):
        model(ids, attention_mask=mask, past_key_values=cache)
    for step in range(12):
        token = tiny.prompts(2, 1, seed=step)
        got = model(token, past_key_values=prepared).logits
        expected = model(token, past_key_values=plain, output_hidden_states=True).logits
        assert torch.equal(got, expected), step
    assert prepared.step is not None
    assert plain.step is None
    for row, start in enumerate(plain.starts.tolist()):  # padding is never written
        assert torch.equal(prepared.keys[-1][row, :, start:262], plain.keys[-1][row, :, start:262])
    for cache in (prepared, plain):
        cache.crop(100)
        cache.batch_repeat_interleave(2)
    model.load_state_dict({name: tensor * 0.5 for name, tensor in model.state_dict().items() if "norm" in name}, False)
    token = tiny.prompts(4, 1)
    got = model(token, past_key_values=prepared).logits
    assert torch.equal(got, model(token, past_key_values=plain, output_hidden_states=True).logits)


def test_copies_of_a_cache_are_independent(llama: tuple[Any, Any]) -> None:
    import copy

    model, _ = llama
    cache = DynamicCache()
    model(tiny.prompts(1, 9), past_key_values=cache)
    model(tiny.prompts(1, 1), past_key_values=cache)
    copied = copy.deepcopy(cache)
    assert copied.step is None
    expected = model(tiny.prompts(1, 1, seed=5), past_key_values=copied).logits
    assert (cache.get_seq_length(), copied.get_seq_length()) == (10, 11)
    assert torch.equal(model(tiny.prompts(1, 1, seed=5), past_key_values=cache).logits, expected)


def test_threads_and_inference_mode(llama: tuple[Any, Any]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    model, _ = llama
    ids = tiny.prompts(1, 6)
    expected = model.generate(ids, max_new_tokens=20, min_new_tokens=20)
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(model.generate, ids, max_new_tokens=20, min_new_tokens=20) for _ in range(8)]
        assert all(torch.equal(run.result(), expected) for run in runs)
    cache = DynamicCache()
    with torch.inference_mode():
        first = model.generate(ids, max_new_tokens=5, min_new_tokens=5, past_key_values=cache)
    second = model.generate(first.clone(), max_new_tokens=15, min_new_tokens=15, past_key_values=cache)
    assert torch.equal(second, expected)


def test_position_ids(llama: tuple[Any, Any]) -> None:
    model, reference = llama
    ids = tiny.prompts(1, 6)
    positions = torch.tensor([[3, 4, 5, 9, 10, 11]])
    exact, naive = exact_and_naive(reference, ids, position_ids=positions)
    within_rule(model(ids, position_ids=positions).logits, naive, exact)


def test_longer_than_the_context(llama: tuple[Any, Any]) -> None:
    model, reference = llama
    ids = tiny.prompts(1, 300)
    exact, naive = exact_and_naive(reference, ids)
    within_rule(model(ids).logits, naive, exact)


REJECTED = [
    ({"input_ids": [[1, 2]]}, TypeError, "input_ids: expected an int64 tensor"),
    ({"input_ids": torch.ones(1, 2)}, TypeError, "input_ids: expected an int64 tensor"),
    ({"input_ids": torch.tensor([1, 2])}, ValueError, "input_ids: expected shape"),
    ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, ValueError, "input_ids: expected shape"),
    ({"input_ids": torch.tensor([[1, 211]])}, ValueError, "ids from 0 to 210, got 211"),
    ({"input_ids": torch.tensor([[-1, 1]])}, ValueError, "ids from 0 to 210, got -1"),
    ({"attention_mask": torch.ones(1, 3)}, ValueError, r"attention_mask: expected \(1, 2\)"),
    ({"attention_mask": torch.tensor([[1, 0]])}, NotImplementedError, "padding on the left"),
    ({"attention_mask": torch.tensor([[0, 0]])}, ValueError, "at least one real token"),
    ({"position_ids": torch.tensor([[1, 2, 3]])}, ValueError, "position_ids: expected"),
    ({"position_ids": torch.tensor([[-1, 2]])}, ValueError, "position_ids: expected positions from 0"),
    ({"past_key_values": "cache"}, TypeError, "past_key_values must be a DynamicCache"),
    ({"past_key_values": DynamicCache(), "use_cache": False}, ValueError, "use_cache=False contradicts"),
    ({"logits_to_keep": -1}, ValueError, "logits_to_keep: expected an integer of at least 0"),
    ({"logits_to_keep": torch.tensor([7])}, ValueError, "logits_to_keep: expected positions below 2"),
    ({"foo": 1}, TypeError, "foo"),
]


@pytest.mark.parametrize(("kwargs", "error", "message"), REJECTED, ids=lambda value: str(value)[:40])
def test_forward_rejects(llama: tuple[Any, Any], kwargs: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        llama[0](**{"input_ids": torch.tensor([[1, 2]]), **kwargs})


def test_cache_of_another_batch(llama: tuple[Any, Any]) -> None:
    cache = DynamicCache()
    llama[0](tiny.prompts(2, 5), past_key_values=cache)
    with pytest.raises(ValueError, match=r"past_key_values: expected .*new DynamicCache\(\)"):
        llama[0](tiny.prompts(1, 5), past_key_values=cache)
    assert cache.get_seq_length() == 5


def test_module_surface(llama: tuple[Any, Any]) -> None:
    import copy
    import pickle

    model, _ = llama
    ids = tiny.prompts(1, 4)
    expected = model(ids).logits
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) > 0
    assert not any(p.requires_grad for p in model.parameters())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(ids).logits, expected)
        with torch.no_grad():
            copied.norm.mul_(2)
        assert not torch.equal(copied(ids).logits, expected)
        copied.load_state_dict(model.state_dict())
        assert torch.equal(copied(ids).logits, expected)


# The default model. Its reference: the same GGUF, dequantised by transformers, fp32, eager.

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea,",
    "1, 1, 2, 3, 5, 8,",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
]
# Mean KL divergence from the reference over 1,024 tokens of the GPL, by activation.
KL_BOUNDS = {"fp32": 1e-5, "bf16": 3e-4, "int8": 4e-3}


@pytest.fixture(scope="module")
def smollm2() -> tuple[Path, Any, Any]:
    import transformers

    path = pull("smollm2")
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    return path, AutoTokenizer.from_pretrained(path), reference.eval()


@torch.no_grad()
def test_gguf_greedy_tokens(smollm2: tuple[Path, Any, Any]) -> None:
    path, tokenizer, reference = smollm2
    model = AutoModelForCausalLM.from_pretrained(path, activation="fp32")
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    ours = model.generate(**batch, max_new_tokens=64, min_new_tokens=64)
    for row, mask in zip(ours, batch["attention_mask"], strict=True):
        row = row[int(mask.numel() - mask.sum()) :]
        # The reference's choice after every prefix of our sequence, in one pass: the same choice at all 64 places
        # is the same greedy sequence.
        logits = reference(row[None, :-1]).logits[0, -64:]
        logits[:, reference.config.eos_token_id] = -torch.inf
        assert torch.equal(logits.argmax(-1), row[-64:])
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    settings = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    assert torch.equal(model.generate(ids, **settings), reference.generate(ids, **settings))


@torch.no_grad()
def test_gguf_kl_divergence(smollm2: tuple[Path, Any, Any]) -> None:
    path, tokenizer, reference = smollm2
    text = Path("/usr/share/common-licenses/GPL-3")
    if not text.exists():
        pytest.skip(f"{text} is not on this machine (it is part of Debian's base-files)")
    ids = torch.tensor([tokenizer.encode(text.read_text())[:1024]])
    expected = reference(ids).logits[0].double().log_softmax(-1)
    for activation, bound in KL_BOUNDS.items():
        model = AutoModelForCausalLM.from_pretrained(path, activation=activation)
        got = model(ids).logits[0].double().log_softmax(-1)
        divergence = (expected.exp() * (expected - got)).sum(-1).mean().item()
        assert 0 <= divergence <= bound, f"{activation}: {divergence:.3g}"


@pytest.mark.parametrize("activation", ["int8", "fp32"])
def test_batch_equals_each_alone(activation: str) -> None:
    path = pull("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, activation=activation)
    batch = tokenizer(PROMPTS[:3], padding=True, return_tensors="pt")
    together = model.generate(
        **batch, max_new_tokens=8, min_new_tokens=8, output_logits=True, return_dict_in_generate=True
    )
    for row, prompt in enumerate(PROMPTS[:3]):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        alone = model.generate(
            ids, max_new_tokens=8, min_new_tokens=8, output_logits=True, return_dict_in_generate=True
        )
        assert torch.equal(together.sequences[row, -8:], alone.sequences[0, -8:])
        if activation == "int8":
            for a, b in zip(together.logits, alone.logits, strict=True):
                assert torch.equal(a[row], b[0])


def test_answer_names_paris() -> None:
    path = pull("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, activation="fp32")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    batch = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    out = model.generate(**batch, max_new_tokens=20)
    assert re.search("Paris", tokenizer.decode(out[0, batch["input_ids"].shape[1] :]))
