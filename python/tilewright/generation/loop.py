"""The generation loop: prefill the prompt, then choose a token and run it through the model, until done."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tilewright.cache.dynamic import DynamicCache
from tilewright.generation.config import PARAMETERS, GenerationConfig
from tilewright.generation.logits import eos_tensor, processors, warp
from tilewright.generation.stopping import finished
from tilewright.generation.stopping import stopping_criteria as make_criteria
from tilewright.generation.streamers import as_streamer
from tilewright.models.inputs import check_ids, left_padding
from tilewright.models.outputs import GenerateOutput
from tilewright.ops import sample

if TYPE_CHECKING:
    from tilewright.models.decoder import CausalLM

# Arguments of transformers' generate that do nothing here yet; None and False ask for nothing.
_NOT_YET = (
    "assistant_tokenizer",
    "custom_generate",
    "inputs_embeds",
    "negative_prompt_attention_mask",
    "negative_prompt_ids",
    "position_ids",
    "prefix_allowed_tokens_fn",
    "synced_gpus",
    "token_type_ids",
    "trust_remote_code",
)
_OTHERS = ("generator", "inputs", "tokenizer")
_DEFAULT_NEW_TOKENS = 20


@dataclass
class _Prompt:
    """ids: int64 (batch, n), as given and returned; new: the part of it that the cache lacks;
    starts: int64 (batch,), first real token of each row counted from the cache's first, or None;
    ids_starts: the same counted from the first of `ids`."""

    ids: Tensor
    new: Tensor
    starts: Tensor | None
    ids_starts: Tensor | None


def generate(
    model: CausalLM,
    input_ids: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: Sequence[Callable[[Tensor, Tensor], Tensor]] | None = None,
    stopping_criteria: Sequence[Callable[..., Any]] | None = None,
    streamer: Any = None,
    assistant_model: Any = None,
    attention_mask: Tensor | None = None,
    past_key_values: DynamicCache | None = None,
    return_dict_in_generate: bool = False,
    **kwargs: Any,
) -> Tensor | GenerateOutput:
    """Continue `input_ids`; returns whole sequences, int64 (batch, length), finished rows filled with pad.

    Names, defaults and the order of processors are those of transformers' `generate`; parameters come from
    `kwargs`, then `generation_config`, then the model's own. Beside these:

    input_ids: int64 (batch, n), None starts from bos; attention_mask: 0 for padding, on the left.
    past_key_values: a DynamicCache of an earlier turn. `input_ids` then repeats the cached tokens and adds
    new ones, or holds only new ones while `attention_mask` covers both.
    generator: torch.Generator for sampling, default torch's own; tokenizer: needed for stop_strings.
    streamer: an object with put and end, or a callable: it receives each step's ids as list[int], or text
    with `tokenizer`.

    Raises TypeError or ValueError that names the argument, NotImplementedError for what transformers has and
    this library does not. An exception in the middle (also Ctrl-C) leaves the cache with whole tokens only.
    """
    extras = _extras(kwargs, assistant_model)
    if "inputs" in extras:
        if input_ids is not None:
            raise ValueError("generate: inputs and input_ids are the same argument; pass one of them")
        input_ids = extras["inputs"]
    user, config = _settings(model, generation_config, kwargs)
    tokenizer, generator = extras.get("tokenizer"), extras.get("generator")
    cache = _cache(past_key_values, config)
    prompt = _prompt(model, input_ids, attention_mask, config, cache)
    max_length = _max_length(user, config, prompt.ids.shape[1], model.config.max_position_embeddings)
    stream = as_streamer(streamer, tokenizer)
    process = processors(config, prompt.ids.shape[1], prompt.ids_starts, logits_processor)
    criteria = make_criteria(config, tokenizer, stopping_criteria)
    eos, pad = eos_tensor(config), config.pad_token_id
    if pad is None and eos is not None:
        pad = int(eos[0])

    repeats = config.num_return_sequences
    if stream is not None:
        stream.put(prompt.ids.repeat_interleave(repeats, dim=0) if repeats > 1 else prompt.ids)
    logits = model.run(prompt.new, cache, starts=prompt.starts)[:, -1]
    ids, starts = prompt.ids, prompt.starts
    if repeats > 1:
        logits, ids = logits.repeat_interleave(repeats, dim=0), ids.repeat_interleave(repeats, dim=0)
        starts = None if starts is None else starts.repeat_interleave(repeats)
        cache.batch_repeat_interleave(repeats)

    wants_dict = return_dict_in_generate or config.return_dict_in_generate
    all_scores: list[Tensor] | None = [] if wants_dict and config.output_scores else None
    all_logits: list[Tensor] | None = [] if wants_dict and config.output_logits else None
    sequence, length = _Sequence(ids), ids.shape[1]
    running = torch.ones(ids.shape[0], dtype=torch.bool)
    while True:
        if all_logits is not None:
            all_logits.append(logits.clone())
        tokens = _choose(logits, sequence.ids, process, config, generator, all_scores)
        if pad is not None and len(running) > 1:
            tokens = torch.where(running, tokens, pad)
        sequence.append(tokens)
        length += 1
        if stream is not None:
            stream.put(tokens)
        if criteria:
            running &= ~finished(criteria, sequence.ids, None if all_scores is None else tuple(all_scores))
        if length >= max_length or not bool(running.any()):
            break
        if length == model.config.max_position_embeddings + 1:
            warnings.warn(
                f"generate: the sequence is now longer than the model's context of {length - 1} tokens "
                "(max_position_embeddings); what follows may not make sense",
                stacklevel=2,
            )
        if config.use_cache:
            logits = model.run(tokens[:, None], cache)[:, -1]
        else:
            logits = model.run(sequence.ids, DynamicCache(), starts=starts)[:, -1]
    if stream is not None:
        stream.end()
    if not wants_dict:
        return sequence.ids
    return GenerateOutput(
        sequences=sequence.ids,
        scores=None if all_scores is None else tuple(all_scores),
        logits=None if all_logits is None else tuple(all_logits),
        past_key_values=cache if config.use_cache else None,
    )


def _choose(
    logits: Tensor,
    ids: Tensor,
    process: Sequence[Callable[[Tensor, Tensor], Tensor]],
    config: GenerationConfig,
    generator: torch.Generator | None,
    all_scores: list[Tensor] | None,
) -> Tensor:
    """The next token of every row, int64 (batch,); appends the processed scores to `all_scores`."""
    scores = logits
    for processor in process:
        scores = processor(ids, scores)
    if not config.do_sample:
        if all_scores is not None:
            all_scores.append(scores)
        return scores.argmax(-1)
    if all_scores is not None:
        all_scores.append(warp(scores, config))
    # Sampling warps for itself, so that asking for scores does not change the tokens.
    return sample(
        scores,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p or 0.0,
        generator=generator,
    )


class _Sequence:
    """Token ids (batch, length) that grow by a column without being copied each time."""

    def __init__(self, ids: Tensor) -> None:
        self.length = ids.shape[1]
        self.buffer = torch.empty(ids.shape[0], 2 * self.length + 64, dtype=torch.int64)
        self.buffer[:, : self.length] = ids
        self.ids = self.buffer[:, : self.length]

    def append(self, tokens: Tensor) -> None:
        """Add int64 (batch,)."""
        if self.length == self.buffer.shape[1]:
            self.buffer = torch.cat([self.buffer, torch.empty_like(self.buffer)], dim=1)
        self.buffer[:, self.length] = tokens
        self.length += 1
        self.ids = self.buffer[:, : self.length]


def _extras(kwargs: dict[str, Any], assistant_model: Any) -> dict[str, Any]:
    """The keywords that are no generation parameters. Raises for those that are unknown or do nothing yet."""
    unsupported = {name: kwargs.get(name) for name in _NOT_YET} | {"assistant_model": assistant_model}
    for name, value in unsupported.items():
        if value is not None and value is not False:
            raise NotImplementedError(
                f"generate: {name} is not supported yet; supported: greedy decoding and sampling of input_ids"
            )
    known = {*PARAMETERS, *_NOT_YET, *_OTHERS}
    for name in kwargs:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"generate: unknown argument {name!r}{hint}")
    extras = {name: kwargs[name] for name in _OTHERS if kwargs.get(name) is not None}
    generator = extras.get("generator")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generate: generator must be a torch.Generator, got {type(generator).__name__}")
    return extras


def _settings(
    model: CausalLM, given: GenerationConfig | None, kwargs: dict[str, Any]
) -> tuple[GenerationConfig, GenerationConfig]:
    """What this call sets, and all settings. max_length stays None if the model does not set it either."""
    user = GenerationConfig(**{name: value for name, value in kwargs.items() if name in PARAMETERS})
    if given is not None:
        if not isinstance(given, GenerationConfig):
            raise TypeError(
                "generate: generation_config must be a tilewright.GenerationConfig, got "
                f"{type(given).__module__}.{type(given).__name__}"
            )
        given.validate()
        user = user.over(given)
    merged = user.over(model.generation_config)
    merged.check_supported()
    merged.validate(sampling=bool(merged.do_sample))
    if merged.num_return_sequences not in (None, 1) and not merged.do_sample:
        raise ValueError(
            f"generate: num_return_sequences={merged.num_return_sequences} needs do_sample=True; greedy "
            "decoding would return the same sequence each time"
        )
    user.do_sample = merged.do_sample
    for name in user.ignored_without_sampling():
        warnings.warn(f"generate: {name}={getattr(user, name)!r} has no effect without do_sample=True", stacklevel=3)
    config = merged.complete()
    config.max_length = merged.max_length
    return user, config


def _cache(given: DynamicCache | None, config: GenerationConfig) -> DynamicCache:
    if given is None:
        return DynamicCache()
    if not isinstance(given, DynamicCache):
        raise TypeError(
            "generate: past_key_values must be a tilewright.DynamicCache, got "
            f"{type(given).__module__}.{type(given).__name__}"
        )
    if not config.use_cache:
        raise ValueError("generate: use_cache=False contradicts past_key_values; leave one of them out")
    return given


def _prompt(
    model: CausalLM, ids: Tensor | None, mask: Tensor | None, config: GenerationConfig, cache: DynamicCache
) -> _Prompt:
    """Check the ids and the mask, and find what the cache does not hold yet."""
    if ids is None:
        if config.bos_token_id is None:
            raise ValueError("generate: input_ids is None and the model has no bos_token_id to start from")
        ids = torch.tensor([[config.bos_token_id]])
    check_ids(ids, model.config.vocab_size)
    ids = ids.long()
    batch, length = ids.shape
    past = cache.get_seq_length()
    if mask is None:
        starts = None if past else _leading_padding(ids, config)
        ids_starts, new = starts, ids[:, past:]
    else:
        # A mask of the ids' own length says that these are the whole sequence.
        total = length if mask.shape == ids.shape else past + length
        starts = left_padding(mask, batch, total)
        ids_starts, new = (starts - (total - length)).clamp(min=0), ids[:, past - (total - length) :]
    if new.shape[1] == 0:
        raise ValueError(
            f"generate: input_ids has {length} tokens and past_key_values already holds {past}; pass the "
            "cached tokens and at least one new one (or an attention_mask over both), or crop the cache"
        )
    return _Prompt(ids, new, starts, ids_starts)


def _leading_padding(ids: Tensor, config: GenerationConfig) -> Tensor | None:
    """Where each row's text begins, taken from pad tokens in front of it; None without any."""
    pad, eos = config.pad_token_id, eos_tensor(config)
    if pad is None or not bool((ids[:, 0] == pad).any()):
        return None
    if eos is not None and pad in eos.tolist():
        if ids.shape[0] > 1:
            warnings.warn(
                "generate: input_ids begins with the pad token, which is also an end of sequence, so padding "
                "cannot be told from text; pass attention_mask",
                stacklevel=4,
            )
        return None
    real = ids != pad
    if not bool(real.any(1).all()):
        raise ValueError("generate: input_ids has a row of pad tokens only")
    return real.int().argmax(1)


def _max_length(user: GenerationConfig, config: GenerationConfig, prompt_length: int, context: int) -> int:
    """The length at which to stop, prompt included."""
    if config.max_new_tokens is not None:
        if user.max_length is not None:
            warnings.warn(
                f"generate: max_new_tokens={config.max_new_tokens} takes precedence over "
                f"max_length={config.max_length}",
                stacklevel=3,
            )
        max_length = prompt_length + config.max_new_tokens
    elif config.max_length is not None:
        max_length = config.max_length
    else:
        max_length = min(prompt_length + _DEFAULT_NEW_TOKENS, context)
        warnings.warn(
            f"generate: using the default of {_DEFAULT_NEW_TOKENS} new tokens; set max_new_tokens",
            stacklevel=3,
        )
    if prompt_length >= max_length:
        raise ValueError(
            f"generate: input_ids has {prompt_length} tokens, which leaves none to generate up to max_length="
            f"{max_length}; set max_new_tokens"
        )
    least = max(config.min_length, prompt_length + (config.min_new_tokens or 0))
    if least > max_length:
        warnings.warn(
            f"generate: min_length or min_new_tokens asks for {least} tokens in all, generation stops at {max_length}",
            stacklevel=3,
        )
    return max_length
