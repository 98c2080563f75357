"""``patch_sdpa()``: run code that calls ``torch.nn.functional.scaled_dot_product_attention`` on Tilewright."""

from __future__ import annotations

import functools
import threading
from types import TracebackType

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.nn import functional

from tilewright.ops.attention import scaled_dot_product_attention
from tilewright.ops.attention_reference import FLOATS

_torch_sdpa = functional.scaled_dot_product_attention
# The last two stand for plain tensors while torch.compile traces the nn modules.
_PLAIN = (Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)

# One state for the process, because what is patched is one attribute of one module: how many times the patch is on,
# and what to put back when it goes off.
_lock = threading.Lock()
_depth = 0
_replaced = _torch_sdpa
_fastpath = True


class patch_sdpa:
    """Send ``torch.nn.functional.scaled_dot_product_attention`` through Tilewright while active.

    Use ``with patch_sdpa(): ...``, ``@patch_sdpa()``, or ``patch_sdpa().enable()`` and later
    ``patch_sdpa().disable()``. Uses may nest and repeat: the patch is off when every ``enable`` has met its
    ``disable``, however the block is left. torch's fused nn.MultiheadAttention and nn.TransformerEncoder path, which
    never calls SDPA, is switched off meanwhile and put back afterwards.

    Reached is whatever looks the function up when it calls it: ``F.scaled_dot_product_attention``,
    nn.MultiheadAttention(need_weights=False), nn.TransformerEncoder, models of other libraries. Code that did
    ``from torch.nn.functional import scaled_dot_product_attention`` *before* holds torch's own function and keeps it;
    code that does so *inside* holds ours, which hands on to torch once the patch is off.

    The patch belongs to the process, not to a thread: every thread's calls go through Tilewright while any thread has
    it on. Switching it is thread-safe.

    Calls that Tilewright's kernels are not made for go to torch, unchanged: tensors off the CPU, tensor subclasses,
    nested, sparse and quantised tensors, dtypes other than float32, bfloat16, float16 and float64, torch.func
    transforms (vmap, grad, jvp), forward-mode gradients, and torch.jit.trace. Differences in values beside rounding: a
    query that may attend to nothing gives 0, where some of torch's backends give NaN; with ``dropout_p > 0`` other
    weights are dropped than torch would drop after the same torch.manual_seed.
    """

    def enable(self) -> patch_sdpa:
        """Switch the patch on; returns self."""
        global _depth, _replaced, _fastpath
        with _lock:
            if _depth == 0:
                _replaced = functional.scaled_dot_product_attention
                _fastpath = torch.backends.mha.get_fastpath_enabled()
                functional.scaled_dot_product_attention = _sdpa
                torch.backends.mha.set_fastpath_enabled(False)
            _depth += 1
        return self

    def disable(self) -> None:
        """Undo one ``enable`` of any patch_sdpa object. Raises RuntimeError where none is left to undo."""
        global _depth
        with _lock:
            if _depth == 0:
                raise RuntimeError("patch_sdpa: disable() without a matching enable()")
            _depth -= 1
            if _depth == 0:
                # Somebody who wrapped us meanwhile stays: _sdpa hands on to what it replaced.
                if functional.scaled_dot_product_attention is _sdpa:
                    functional.scaled_dot_product_attention = _replaced
                torch.backends.mha.set_fastpath_enabled(_fastpath)

    def __enter__(self) -> patch_sdpa:
        return self.enable()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()

    def __call__(self, function):
        """Decorator: ``function`` runs with the patch on."""

        @functools.wraps(function)
        def patched(*args, **kwargs):
            with patch_sdpa():
                return function(*args, **kwargs)

        return patched


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What ``F.scaled_dot_product_attention`` is while the patch is on; torch's signature."""
    if _depth == 0 or not _served(query, key, value, attn_mask):
        return _replaced(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    query, key, value = autocast_like_sdpa(query, key, value)
    return scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _served(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> bool:
    for t in (query, key, value) if attn_mask is None else (query, key, value, attn_mask):
        if type(t) not in _PLAIN or t.device.type != "cpu" or t.layout != torch.strided or t.is_nested:
            return False
    if query.dtype not in FLOATS or key.dtype not in FLOATS or value.dtype not in FLOATS:
        return False
    # None of these reaches the kernel through plain tensors, although the tensors look plain.
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return not transformed and (torch.compiler.is_compiling() or torch._C._get_tracing_state() is None)


def autocast_like_sdpa(*tensors: Tensor) -> tuple[Tensor, ...]:
    """``tensors`` as ``torch.autocast`` hands them to torch's SDPA: float32, bf16 and fp16 cast to its dtype."""
    if not torch.is_autocast_enabled("cpu"):
        return tensors
    dtype = torch.get_autocast_dtype("cpu")
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)
