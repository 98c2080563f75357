"""The CUDA extension from Python: which devices it serves, and its ops with the signatures of `triton_kernels`.

The extension, `tilewright._cuda`, is there if the package was built with TILEWRIGHT_CUDA; it is imported when a tensor
on a GPU first needs it, and asks for a driver when something is launched. Launches go to torch's current stream of
the tensors' device. Nothing synchronises or reads a tensor's values, and memory comes from torch's allocator, so a
CUDA graph can capture every call. What is not valid raises as on the CPU, except values in device memory: a rope
position outside the tables gives NaN, a token without a slot or page is not written, a QuantizedKV without room is
left as it is, a row of logits from which nothing can be drawn gives -1, and rows beyond the sum of group sizes NaN.
"""

from __future__ import annotations

import functools
import importlib
import math
from types import ModuleType

import torch
from torch import Tensor

from tilewright.ops.attention_reference import Operands, Options
from tilewright.quant.weight import CODES
from tilewright.triton_kernels.weight import GpuWeight  # plain torch; does not import triton

_OP = "quantized_linear"
_INTEGERS = ("int4", "int5", "int6", "int8")


@functools.cache
def extension() -> ModuleType | None:
    """The extension, None if it was not built (or torch runs on AMD's GPUs)."""
    if torch.version.hip:
        return None
    try:
        return importlib.import_module("tilewright._cuda")
    except ModuleNotFoundError:
        return None


def serves(built_for: str, major: int, minor: int) -> bool:
    """Whether machine code for ``built_for``, such as "80;90a", runs on a device of this compute capability: code of a
    minor version does on higher ones of its major version, that of "a" on its own alone."""
    for name in filter(None, built_for.split(";")):
        number = int(name.rstrip("a"))
        built = number // 10, number % 10
        if built == (major, minor) or (not name.endswith("a") and built[0] == major and built[1] < minor):
            return True
    return False


@functools.cache
def missing(device: torch.device) -> str:
    """Why the extension does not serve a CUDA device; empty if it does."""
    found = extension()
    if found is None:
        return "tilewright was built without CUDA kernels (TILEWRIGHT_CUDA=ON builds them)"
    major, minor = torch.cuda.get_device_capability(device)
    if not serves(found.built_for(), major, minor):
        return (
            f"the CUDA kernels were built for {found.built_for()}, and {device} has compute capability {major}.{minor} "
            "(TILEWRIGHT_CUDA_ARCHITECTURES chooses)"
        )
    return ""


def launch(name: str, t: Tensor, *arguments: object) -> None:
    """Call a function of the extension on the device and current stream of ``t``, its first argument."""
    stream = torch.cuda.current_stream(t.device).cuda_stream
    getattr(extension(), name)(t.device.index, stream, t, *arguments)


def norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool
) -> tuple[Tensor, Tensor | None]:
    """`tilewright.rms_norm`, or with ``centred`` `tilewright.layer_norm`: (normalised, x + residual or None)."""
    x = _contiguous_last(x)
    out = torch.empty_like(x)
    total = None
    if residual is not None:
        residual, total = _contiguous_last(residual), torch.empty_like(x)
    op = "layer_norm" if centred else "rms_norm"
    launch("norm", x, op, residual, weight, bias, out, total, eps, centred)
    return out, total


def act_mul(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`tilewright.silu_mul` and `tilewright.gelu_mul`; activation: "silu", "gelu" or "gelu_tanh"."""
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    launch("act_mul", _contiguous_last(gate), _contiguous_last(up), out, activation)
    return out


def rope_into(
    out_q: Tensor, out_k: Tensor, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None,
    interleaved: bool, rotary_dim: int | None,
) -> None:  # fmt: skip
    """out_q, out_k = `tilewright.rope`; they may be q and k themselves."""
    launch("rope", q, k, cos, sin, positions, out_q, out_k, interleaved, rotary_dim)


def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    positions: Tensor | None = None,
    *,
    block_table: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`tilewright.rope` and `tilewright.kv_append` in one launch: the rotated q, in ``out`` (which may be q itself),
    while the rotated k and v go to the caches. A token's angle is that of its slot's number."""
    out = torch.empty_like(q) if out is None else out
    slot = (positions, block_table, cache_seqlens)
    launch("rope_append", q, k, v, cos, sin, cache_k, cache_v, *slot, interleaved, rotary_dim, out)
    return out


def kv_append(
    cache_k: Tensor,
    cache_v: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None = None,
    block_table: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
) -> None:
    """`tilewright.kv_append`, whose docstring says what goes where."""
    launch("kv_append", cache_k, cache_v, k, v, positions, block_table, cache_seqlens)


def kv_append_quantized(*arguments: object) -> None:
    """`tilewright.kv_append` for the tensors and numbers of a QuantizedKV, then k and v."""
    launch("kv_append_quantized", *arguments)


def gather(source: Tensor, target: Tensor, from_index: Tensor | None = None, to_index: Tensor | None = None) -> Tensor:
    """target[to_index[i]] = source[from_index[i]], both (rows, heads, tokens, dim) of one dtype, indices int64 or None
    for 0, 1, 2, ...: beams, pages. Indices outside are passed over. Returns ``target``."""
    launch("gather", source, from_index, to_index, target)
    return target


def sample(
    logits: Tensor, uniform: Tensor | None, temperature: float, top_k: int, top_p: float, min_p: float
) -> Tensor:
    """`tilewright.sample` for given numbers ``uniform``."""
    out = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    launch("sample", _contiguous_last(logits), uniform, out, temperature, top_k, top_p, min_p)
    return out


def attention_lacks(q: Tensor, k: Tensor, v_dim: int) -> str:
    """What of an attention call the kernels do not have; empty if they have it."""
    if q.dtype not in (torch.bfloat16, torch.float16) or k.dtype not in (q.dtype, torch.uint8):
        return f"the CUDA kernels of attention take bfloat16 or float16, got q {q.dtype} and k {k.dtype}"
    if max(q.shape[-1], v_dim) > 256:
        return f"the CUDA kernels of attention take head_dims up to 256, got {max(q.shape[-1], v_dim)}"
    return ""


def attention(t: Operands, options: Options, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """`tilewright.attention_packed`: (out, lse or None), out laid out as q."""
    shape = (*t.q.shape[:3], t.v.shape[3])
    out = torch.empty_like(t.q) if t.q.shape == shape else t.q.new_empty(shape)
    lse = torch.empty(shape[:3], dtype=torch.float32, device=t.q.device) if return_lse else None
    if t.q_start is not None:  # rows that belong to no sequence
        out.zero_()
        if lse is not None:
            lse.fill_(-math.inf)
    found = extension()
    sizes = (t.q, t.k, t.v, t.q_start, t.q_end, t.k_batch, t.block_table)
    workspace = _workspace(t.q, found.attention_workspace(t.q.device.index or 0, *sizes))
    launch("attention", *t, *options, out, lse, workspace)
    return out, lse


def attention_quantized(q: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    """(out, lse) of attention to a QuantizedKV: its tensors and numbers, then mask, bias, slopes, sinks, seed and the
    numbers of the call."""
    cache, (mask, bias, alibi, sinks, seed), options = arguments[:12], arguments[12:17], arguments[17:]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    alibi, sinks = (x if x is None else x.float().contiguous() for x in (alibi, sinks))
    workspace = _workspace(q, extension().attention_quantized_workspace(q.device.index or 0, q, *cache))
    launch("attention_quantized", q, *cache, mask, bias, alibi, sinks, seed, *options, out, lse, workspace)
    return out, lse


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    t: Operands,
    options: Options,
    out: Tensor,
    lse: Tensor,
    needs_bias: bool,
    needs_alibi: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v (in their dtypes) and of bias, alibi slopes and sinks (float32; None for those that are
    absent or not needed)."""
    grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (t.q, t.k, t.v)]
    wanted = ((t.bias, needs_bias), (t.alibi, needs_alibi), (t.sinks, t.sinks is not None))
    extra = [
        torch.zeros_like(x, dtype=torch.float32, memory_format=torch.contiguous_format) if needed else None
        for x, needed in ((x, x is not None and needed) for x, needed in wanted)
    ]
    slopes = None if extra[1] is None else torch.empty_like(lse)
    arguments = (out, lse, grad_out, grad_lse, torch.empty_like(lse), *grads, *extra, slopes)
    launch("attention_backward", *t, *options, *arguments)
    return *grads, *extra


def linear_lacks(x: Tensor, codes: int, activation: str, outlier_threshold: float) -> str:
    """What of a linear layer the kernels do not have; empty if they have it. codes: a number of `CODES`."""
    integers = activation.startswith("int8")
    if CODES[codes] not in _INTEGERS:
        return f"the CUDA kernels read {', '.join(_INTEGERS)}, not {CODES[codes]}"
    if activation == "fp32" and x.dtype == torch.float32:
        return "the CUDA kernels multiply in bfloat16, float16 or int8, not in float32"
    if integers and outlier_threshold:
        return "the CUDA kernels have no outlier_threshold"
    return ""


def linear(
    x: Tensor,
    weight: GpuWeight,
    bias: Tensor | None,
    activation: str,
    group_sizes: Tensor | None = None,
    outlier_threshold: float = 0.0,
) -> Tensor:
    """`tilewright.quantized_linear`, with ``group_sizes`` `grouped_linear`; result in x's dtype. activation "fp32"
    multiplies in x's dtype, "bf16" in bfloat16, "int8" and "int8_token" in integers."""
    if x.dim() == 0 or x.shape[-1] != weight.k:
        raise ValueError(f"{_OP}: the last dimension of x must be {weight.k}, got {tuple(x.shape)}")
    if group_sizes is not None and (x.dim() != 2 or group_sizes.numel() == 0 or weight.n % group_sizes.numel()):
        raise ValueError(
            f"grouped_linear: x must be (rows, columns) and the groups divide {weight.n} rows, got {tuple(x.shape)} "
            f"and {group_sizes.numel()} groups"
        )
    out = x.new_empty((*x.shape[:-1], weight.n // (1 if group_sizes is None else group_sizes.numel())))
    if bias is not None and (bias.dtype != torch.float32 or not bias.is_contiguous()):
        bias = bias.float().contiguous()
    if weight.k == 0:  # an empty sum
        return out.zero_() if bias is None or group_sizes is not None else out.copy_(bias)
    flat = _contiguous_last(x.reshape(-1, weight.k))
    kind, workspace = activation if activation.startswith("int8") else "float", None
    if kind != "float":
        workspace = _workspace(x, extension().linear_workspace_bytes(*flat.shape))
    elif activation == "bf16":
        flat = flat.bfloat16()
    launch(
        "linear", flat, weight.codes, weight.scales, weight.offsets, weight.bits, weight.middle, weight.group, weight.k,
        weight.offset, bias, group_sizes, kind, workspace, out.view(-1, out.shape[-1]),
    )  # fmt: skip
    return out


def _workspace(like: Tensor, size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=like.device)


def _contiguous_last(t: Tensor) -> Tensor:
    return t if t.dim() == 0 or t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous()
