"""Tilewright as an attention implementation of Hugging Face transformers (5.20 and later).

Importing this module registers it: ``AutoModelForCausalLM.from_pretrained(path, attn_implementation="tilewright")``.

transformers calls two functions under that name. `attention_forward` computes one layer's attention. `attention_mask`
builds the mask that the layers of one forward share: boolean, or None where causality or nothing is all there is to
say, as transformers does for its sdpa; and additive floats, as for its eager code, where a model reads the mask in
code of its own, because such code adds whatever it is given to its scores.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.utils import TransformersKwargs

from tilewright.integrations.sdpa import autocast_like_sdpa
from tilewright.ops.attention import attention, attention_packed
from tilewright.ops.attention_reference import Operands
from tilewright.ops.registry import direct

_OP = "tilewright attention for transformers"

# Keywords of attention that we do not compute, and what they ask for.
_UNSUPPORTED = {
    "indices": "sparse top-k attention",
    "block_indices": "sparse block attention",
    "cache": "transformers' paged cache for continuous batching",
}
# What else may ride along in a model's **kwargs although it says nothing about how attention is computed: what a
# forward returns, positions, which the mask and the rotary embedding, made before, already hold, and what
# transformers' decorators of forward add from the config or read themselves.
_HARMLESS = frozenset(TransformersKwargs.__annotations__) | {
    *("deterministic", "return_dict", "use_cache", "debug_io", "debug_io_dir", "prune_layers"),
    *("vision_feature_layer", "vision_feature_select_strategy", "vision_aspect_ratio"),
}
# Model types for which a mask of None must not mean "causal", although they say that they run on sdpa or flash: the
# first two drop queries before their last layers unless a mask or the name "sdpa" tells them not to, the decoder
# layers of the third do not call themselves causal.
_NEED_CAUSAL_MASK = frozenset({"gemma4_text", "gemma4_unified_text", "pegasus_x"})

_names: set[str] = set()


def register_transformers(name: str = "tilewright") -> None:
    """Make ``name`` an ``attn_implementation`` of transformers, for every model that uses its attention interface.

    Raises ValueError for a name that transformers reads as something else.
    """
    taken = next((part for part in ("sdpa", "flash", "flex", "/", "|") if part in name), None)
    if taken is not None or name in ("", "eager"):
        raise ValueError(
            f"register_transformers: {name!r} cannot be a name, because transformers gives names that are 'eager' or "
            "contain 'sdpa', 'flash', 'flex', '/' or '|' a meaning of their own; choose another, such as 'tilewright'"
        )
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, attention_mask)
    _names.add(name)
    _check_models_on_selection()


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query (batch, heads, seq_q, d), key (batch, kv_heads, seq_k, d), value
    (batch, kv_heads, seq_k, d_v) -> ((batch, seq_q, heads, d_v), None).

    attention_mask: boolean (True = attend) or additive, broadcast to (batch, heads, seq_q, seq_k). Without one, and
    with more than one query, ``is_causal`` (default: the module's attribute, else True for models that support sdpa)
    masks the future, counted from the first key; longer keys are the unused end of a static cache. sliding_window w:
    the last w keys (w - 1 to either side if not causal); applied where there is no mask, as a mask holds it already.
    softcap, position_bias (additive, differentiable), s_aux (heads,) or sinks (batch, heads, seq_q, 1) as in Gemma 2,
    T5, gpt-oss, Inkling.
    cu_seq_lens_q, cu_seq_lens_k: int (sequences + 1,): sequences packed into a batch of one do not see each other.

    dropout: of the attention weights; which ones is drawn from torch's default generator.

    Raises NotImplementedError for keywords of attention that we do not compute, ValueError for output_attentions and
    for arguments that do not fit, TypeError for keywords that we do not know.
    """
    _check_keywords(module, others)
    _check_device(query)
    query, key, value = autocast_like_sdpa(query, key, value)
    batch = max(query.shape[0], key.shape[0])
    if query.shape[0] != key.shape[0]:  # learned queries with batch 1
        query, key, value = (t.expand(batch, -1, -1, -1) for t in (query, key, value))

    causal: str | None = None
    seq_q, seq_k = query.shape[2], key.shape[2]
    window = None if sliding_window is None else (sliding_window - 1, sliding_window - 1)
    masked = attention_mask is not None
    if is_causal is None:
        is_causal = getattr(module, "is_causal", None)
    if is_causal is None:
        is_causal = _runs_on_sdpa(type(module).__module__)
    packed = any(x is not None for x in (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k))
    if packed:
        _check_packed(cu_seq_lens_q, cu_seq_lens_k, query)
        if masked or position_bias is not None:  # attention_packed takes neither
            restriction = _packed_mask(cu_seq_lens_q, cu_seq_lens_k, query, key, is_causal and not masked, window)
            attention_mask = _restricted(attention_mask, restriction) if masked else restriction
            packed = False
    elif not masked and is_causal and seq_q > 1:
        causal = "top_left"
        if seq_k > seq_q:
            key, value = key[:, :, :seq_q], value[:, :, :seq_q]
            position_bias = None if position_bias is None else position_bias[..., :seq_q]
    if attention_mask is not None:
        window = None

    options = {"causal": causal, "window": window, "mask": attention_mask, "bias": position_bias}
    options |= {"softcap": softcap, "sinks": s_aux, "scale": scaling, "dropout_p": dropout}
    if packed:
        q_bounds, k_bounds = cu_seq_lens_q.long(), cu_seq_lens_k.long()
        operands = Operands(
            query, key, value, sinks=s_aux, q_start=q_bounds[:-1], q_end=q_bounds[1:], k_start=k_bounds[:-1],
            k_end=k_bounds[1:],
        )  # fmt: skip
        out, lse = attention_packed(
            operands, scale=scaling, softcap=softcap or 0.0, causal="bottom_right" if is_causal else None,
            window=window or (-1, -1), dropout_p=dropout,
        )  # fmt: skip
    elif sinks is not None:
        out, lse = attention(query, key, value, **options, return_lse=True)
    elif direct(query, key, value, attention_mask, position_bias, s_aux):
        out = query.new_empty(batch, seq_q, query.shape[1], value.shape[3]).transpose(1, 2)
        attention(query, key, value, **options, out=out)
    else:
        out = attention(query, key, value, **options)
    if sinks is not None:  # a sink logit s takes exp(s) / (exp(s) + exp(lse)) of the weight
        out = out * torch.sigmoid(lse - sinks.squeeze(-1).float()).unsqueeze(-1).to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


def attention_mask(*args: Any, config: Any = None, allow_is_causal_skip: bool = True, **options: Any) -> Tensor | None:
    """transformers' mask function: its ``sdpa_mask`` (boolean or None) for models made for that, its ``eager_mask``
    (additive) for those that read masks in code of their own."""
    if config is None or not _config_takes_sdpa_masks(config):
        return eager_mask(*args, config=config, **options)
    skip = allow_is_causal_skip and config.model_type not in _NEED_CAUSAL_MASK
    return sdpa_mask(*args, config=config, allow_is_causal_skip=skip, **options)


@torch.compiler.assume_constant_result
def _config_takes_sdpa_masks(config: Any) -> bool:
    """Whether every model that ``config`` may describe takes masks as sdpa does. The mask function is told the config
    alone, so this looks at the modeling modules beside the config's own module, and at the text model's."""
    kinds = {type(config), type(config.get_text_config())}
    for kind in kinds:
        package = kind.__module__.rpartition(".")[0]
        modules = [name for name in list(sys.modules) if name.startswith(f"{package}.modeling_")]
        if not modules or not all(_runs_on_sdpa(name, kind) for name in modules):
            return False
        if any(_own_attention(sys.modules[name]) for name in modules):
            return False
    return True


_answers: dict[tuple[str, type | None], bool] = {}


@torch.compiler.assume_constant_result
def _runs_on_sdpa(modeling: str, config: type | None = None) -> bool:
    """Whether the models of a modeling module (those for ``config``, where it has such) say that they run on sdpa or
    flash attention, so that boolean masks, and None for causal, are right for them."""
    key = (modeling, config)
    if key not in _answers:
        models = [c for c in _classes(sys.modules.get(modeling)) if issubclass(c, PreTrainedModel)]
        models = [c for c in models if c.config_class is config] or models
        _answers[key] = all(c._supports_sdpa or c._supports_flash_attn for c in models)
    return _answers[key]


def _classes(module: ModuleType | None) -> list[type]:
    members = [] if module is None else vars(module).values()
    return [c for c in members if isinstance(c, type) and c.__module__ == module.__name__]


def _own_attention(module: ModuleType) -> bool:
    """Whether a modeling module has attention classes but never asks for an attention implementation."""
    has_attention = any("Attention" in c.__name__ and issubclass(c, nn.Module) for c in _classes(module))
    return has_attention and not hasattr(module, "ALL_ATTENTION_FUNCTIONS")


def _check_models_on_selection() -> None:
    """Have every model say, when one of our names is selected for it, that it cannot use it: a few choose their
    attention class from a table of their own and would raise a bare KeyError, others compute attention themselves.
    """
    original = PreTrainedModel.get_correct_attn_implementation
    if getattr(original, "tilewright", False):
        return

    def get_correct_attn_implementation(
        self: PreTrainedModel, requested_attention: str | None, is_init_check: bool = False
    ) -> str:
        if requested_attention in _names:
            _check_model(type(self), requested_attention)
        return original(self, requested_attention, is_init_check)

    get_correct_attn_implementation.tilewright = True
    PreTrainedModel.get_correct_attn_implementation = get_correct_attn_implementation


def _check_model(model: type[PreTrainedModel], name: str) -> None:
    module = sys.modules.get(model.__module__)
    for table, classes in vars(module).items() if module is not None else ():
        if isinstance(classes, dict) and "eager" in classes and name not in classes:
            instead = "'sdpa' inside tilewright.patch_sdpa()" if "sdpa" in classes else "'eager'"
            raise ValueError(
                f"{model.__name__} does not support attn_implementation={name!r}: it chooses its attention class from "
                f"{module.__name__}.{table}, which knows {sorted(classes)}; use {instead}"
            )
    if module is not None and _own_attention(module):
        warnings.warn(
            f"{model.__name__} computes attention in its own code and never asks for attn_implementation={name!r}; it "
            "runs as with 'eager', without Tilewright",
            stacklevel=4,
        )


def _check_keywords(module: nn.Module, others: dict[str, Any]) -> None:
    for keyword, value in others.items():
        if value is None:
            continue
        if keyword == "output_attentions" and value:
            raise ValueError(
                f"{_OP}: output_attentions=True, but attention weights are never stored; use "
                "attn_implementation='eager'"
            )
        if keyword in _UNSUPPORTED:
            raise NotImplementedError(
                f"{_OP}: {keyword}= in {type(module).__name__} ({_UNSUPPORTED[keyword]}) is not supported yet; use "
                "attn_implementation='sdpa' or 'eager'"
            )
        if keyword not in _HARMLESS and not _is_model_input(keyword):
            raise TypeError(
                f"{_OP}: unknown keyword {keyword}= ({type(value).__name__}) in {type(module).__name__}; it is not "
                "ignored, in case it changes attention: leave it out, or use attn_implementation='sdpa' or 'eager'"
            )


_model_inputs: dict[str, bool] = {}


@torch.compiler.assume_constant_result
def _is_model_input(keyword: str) -> bool:
    """Whether some loaded model's forward takes ``keyword`` by name: then it is that model's business and merely
    travels on to us in its **kwargs."""
    if not _model_inputs.get(keyword):
        models, found = [PreTrainedModel], False
        while models and not found:
            model = models.pop()
            models += model.__subclasses__()
            found = keyword in inspect.signature(model.forward).parameters
        _model_inputs[keyword] = found
    return _model_inputs[keyword]


def _check_device(query: Tensor) -> None:
    if query.device.type not in ("cpu", "cuda", "meta"):
        raise NotImplementedError(
            f"{_OP}: tensors must be on the CPU or a GPU, got {query.device}; move the model or use 'sdpa'"
        )


def _check_packed(cu_q: Tensor | None, cu_k: Tensor | None, query: Tensor) -> None:
    if cu_q is None or cu_k is None:
        raise ValueError(
            f"{_OP}: cu_seq_lens_q and cu_seq_lens_k must come together (max_length_q and max_length_k add nothing)"
        )
    if query.shape[0] != 1:
        raise ValueError(f"{_OP}: packed sequences (cu_seq_lens_q) need a batch of 1, got {query.shape[0]}")


def _packed_mask(
    cu_q: Tensor, cu_k: Tensor, query: Tensor, key: Tensor, causal: bool, window: tuple[int, int] | None
) -> Tensor:
    """Boolean (seq_q, seq_k): which keys each query may see of packed sequences with bounds cu_q and cu_k. Queries sit
    at the end of their sequence's keys, as in flash-attn's varlen functions. Tokens past the last bound see nothing."""
    cu_q, cu_k = (cu.to(device=query.device, dtype=torch.int64) for cu in (cu_q, cu_k))
    q = torch.arange(query.shape[2], device=query.device).unsqueeze(1)
    k = torch.arange(key.shape[2], device=query.device)
    last = cu_q.shape[0] - 1
    of_q, of_k = (torch.searchsorted(cu[1:], i, right=True) for cu, i in ((cu_q, q), (cu_k, k)))
    allowed = (of_q == of_k) & (of_q < last)
    end = (of_q + 1).clamp(max=last)
    distance = cu_k[end] - (cu_q[end] - q) - k
    if causal:
        allowed = allowed & (distance >= 0)
    if window is not None:
        allowed = allowed & (distance <= window[0]) & (distance >= -window[1])
    return allowed


def _restricted(mask: Tensor, allowed: Tensor) -> Tensor:
    return mask & allowed if mask.dtype == torch.bool else mask.masked_fill(~allowed, -torch.inf)


register_transformers()
