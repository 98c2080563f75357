"""The schemes of the libraries whose quantised folders can be loaded, and which of them a config names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tilewright.io.errors import FormatError
from tilewright.io.folder import HFFolder
from tilewright.models.config_groups import CompressedTensors
from tilewright.models.fields import Fields
from tilewright.models.scheme import Scheme, StoredMatrix, compiled
from tilewright.quant import QuantizedWeight, from_awq, from_bitsandbytes, from_eetq, from_fp8, from_gptq, from_hqq
from tilewright.quant.bitsandbytes import FourBitState
from tilewright.quant.pieces import FLOATS


class GPTQ(Scheme):
    """GPTQModel, AutoGPTQ. `dynamic` overrides bits by module name ("-:REGEX": the module is not quantised)."""

    marks = (".qweight",)

    def configure(self) -> None:
        fields = self.fields
        self.bits = self._bits(fields)
        key = "checkpoint_format" if fields.get("checkpoint_format") is not None else "format"
        form = fields.text(key, "gptq")
        if form not in ("gptq", "gptq_v2") or fields.get("is_marlin_format"):
            raise fields.unsupported(key, f"{form!r} is not supported, supported: gptq, gptq_v2")
        self.zero_offset = 1 if form == "gptq" else 0
        if fields.text("pack_dtype", "int32") != "int32":
            raise fields.unsupported("pack_dtype", f"{fields.get('pack_dtype')!r} is not supported, only int32 is")
        for name in ("rotation", "adapter"):
            if fields.get(name):
                raise fields.unsupported(name, f"{fields.get(name)!r} is not supported")
        self.dynamic: list[tuple[re.Pattern[str], int | None]] = []
        for text in fields.mapping("dynamic"):
            bare = text[2:] if text.startswith(("+:", "-:")) else text
            pattern = compiled(fields, "dynamic", bare)
            if text.startswith("-:"):
                self.dynamic.append((pattern, None))
                continue
            overrides = fields.section("dynamic").section(text)
            for name in ("format", "checkpoint_format", "method", "quant_method", "rotation", "adapter"):
                if overrides.get(name) is not None:
                    raise overrides.unsupported(name, "an override of it is not supported")
            self.dynamic.append((pattern, self._bits(overrides, self.bits)))

    def matrix(self, module: str) -> StoredMatrix:
        bits = next((bits for pattern, bits in self.dynamic if pattern.match(module)), self.bits)
        if bits is None:
            raise self.fields.error("dynamic", "modules that are not quantised after '-:'", module)
        words, n = self.sizes(module, "qweight")
        return StoredMatrix(
            (n, words * 32 // bits),
            self.tensors(module, "qweight", "qzeros", "scales", optional=("g_idx",)),
            lambda t: from_gptq(
                t["qweight"], t["qzeros"], t["scales"], t.get("g_idx"), bits, zero_offset=self.zero_offset
            ),
        )

    def ignorable(self, name: str) -> bool:
        # Early tools wrote a bias of zeros for every matrix.
        module, _, kind = name.rpartition(".")
        if kind != "bias" or f"{module}.weight" not in self.matrices or self.dtype(module, kind) not in FLOATS:
            return False
        return not bool(self.folder.tensor(name).any())

    @staticmethod
    def _bits(fields: Fields, *default: int) -> int:
        bits = fields.integer("bits", *default)
        if bits not in (2, 3, 4, 8):
            raise fields.unsupported("bits", f"{bits} is not supported, supported: 2, 3, 4, 8")
        return bits


class AWQ(Scheme):
    """AutoAWQ's "gemm" files."""

    marks = (".qweight",)

    def configure(self) -> None:
        fields = self.fields
        key = "version" if fields.get("version") is not None else "format"
        form = fields.text(key, "gemm").lower()
        if form != "gemm":
            raise fields.unsupported(key, f"{form!r} is not supported, only 'gemm' is")
        if fields.integer("bits", 4) != 4:
            raise fields.unsupported("bits", f"{fields.get('bits')} is not supported, only 4 is")

    def matrix(self, module: str) -> StoredMatrix:
        k, words = self.sizes(module, "qweight")
        return StoredMatrix(
            (8 * words, k),
            self.tensors(module, "qweight", "qzeros", "scales"),
            lambda t: from_awq(t["qweight"], t["qzeros"], t["scales"]),
        )


class BitsAndBytes(Scheme):
    """bitsandbytes, int8 and 4 bits; which of them each module's tensors tell."""

    marks = (".weight",)
    skip_keys = ("llm_int8_skip_modules",)

    def configure(self) -> None:
        fields = self.fields
        off = fields.get("llm_int8_threshold") == 0
        self.threshold = 0.0 if off else fields.number("llm_int8_threshold", 6.0)

    def matrix(self, module: str) -> StoredMatrix | None:
        states = [f"weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")]
        state = next((part for part in states if self.has(module, part)), None)
        if state is None and self.dtype(module) is torch.uint8:
            state = states[0]  # which is then missed by name
        if state is not None:
            nested = ("weight.nested_absmax", "weight.nested_quant_map")
            names = self.tensors(module, "weight", state, "weight.absmax", optional=("weight.quant_map", *nested))
            try:
                shape = FourBitState.read({state: self.folder.tensor(names[state])}).shape
            except (TypeError, ValueError) as error:
                raise FormatError(self.folder.path, names[state], str(error)) from None
            return StoredMatrix(shape, names, lambda t: from_bitsandbytes(t.pop("weight"), t))
        if self.has(module, "SCB") or self.dtype(module) is torch.int8:
            names = self.tensors(module, "weight", "SCB", optional=("weight_format",))
            shape = self.sizes(module, "weight")
            return StoredMatrix(
                shape, names, lambda t: from_bitsandbytes(t.pop("weight"), {**t, "threshold": self.threshold})
            )
        return None


class HQQ(Scheme):
    """HQQ, whose modules each hold all that there is to know of them as tensors."""

    marks = (".W_q",)
    skip_keys = ("skip_modules",)

    def configure(self) -> None:
        """Nothing: each module says it."""

    def matrix(self, module: str) -> StoredMatrix:
        described = ("shape", "axis", "packing")
        optional = ("group_size", "view_as_float", "quant_scale", "quant_zero", "nbits", "unpack_view_dtype")
        unused = ("compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config")
        unused += ("channel_wise", "optimize", "round_zero")
        names = self.tensors(module, "W_q", "scale", "zero", *described, optional=optional + unused)
        meta: dict[str, Any] = {}
        for part in (*described, "group_size", "view_as_float", "quant_scale", "quant_zero"):
            if part in names:
                meta[part] = self._plain(names[part], is_text=part == "packing")
        shape = meta["shape"]
        if not isinstance(shape, list) or len(shape) != 2:
            raise FormatError(self.folder.path, names["shape"], f"expected two sizes, got {shape}")
        kept = {part: names[part] for part in ("W_q", "scale", "zero")}

        def convert(tensors: dict[str, Tensor]) -> QuantizedWeight:
            w_q, scale, zero = (tensors[part] for part in kept)
            return from_hqq(w_q, {**meta, "scale": scale, "zero": zero})

        return StoredMatrix(tuple(shape), names, convert)

    def _plain(self, name: str, is_text: bool) -> Any:
        """A string, or an integer or a list of them, which HQQ keeps as a tensor."""
        dtype, shape = self.folder.info(name)
        if dtype.is_floating_point or dtype.is_complex or len(shape) > 1 or (is_text and dtype is not torch.uint8):
            raise FormatError(self.folder.path, name, f"expected integers, got {dtype} {shape}")
        values = self.folder.tensor(name)
        return bytes(values.reshape(-1).numpy()).decode("latin-1") if is_text else values.tolist()


class EETQ(Scheme):
    """EETQ: int8, one scale an output, in the order of its kernels."""

    marks = (".weight",)

    def configure(self) -> None:
        if self.fields.text("weights", "int8") != "int8":
            raise self.fields.unsupported("weights", f"{self.fields.get('weights')!r} is not supported, only int8 is")

    def matrix(self, module: str) -> StoredMatrix | None:
        if not self.has(module, "weight_scales") and self.dtype(module) is not torch.int8:
            return None
        names = self.tensors(module, "weight", "weight_scales")
        k, n = self.sizes(module, "weight")
        return StoredMatrix((n, k), names, lambda t: from_eetq(t["weight"], t["weight_scales"]))


class FP8(Scheme):
    """float8_e4m3fn with scales by block, as DeepSeek's and Qwen's files have them, or for the whole matrix."""

    marks = (".weight",)
    skip_keys = ("modules_to_not_convert", "ignored_layers")

    def configure(self) -> None:
        fields = self.fields
        block = fields.get("weight_block_size")
        if block is not None and (
            not isinstance(block, list)
            or len(block) != 2
            or not all(isinstance(size, int) and not isinstance(size, bool) and 0 < size < 2**31 for size in block)
        ):
            raise fields.error("weight_block_size", "two positive integers or null", block)
        self.block, self.has_block = block, f"{fields.prefix}weight_block_size" in fields.values

    def matrix(self, module: str) -> StoredMatrix | None:
        dtype = self.dtype(module)
        part = "weight_scale" if self.has(module, "weight_scale") else "weight_scale_inv"
        if dtype is None or (not self.has(module, part) and (dtype.itemsize > 1 or not dtype.is_floating_point)):
            return None
        names = self.tensors(module, "weight", part, optional=("input_scale", "activation_scale"))
        shape = self.sizes(module, "weight")
        block = self.block
        if not self.has_block and self.folder.info(names[part])[1] not in ((), (1,), (shape[0], 1)):
            block = [128, 128]  # what transformers assumes
        return StoredMatrix(shape, names, lambda t: from_fp8(t["weight"], t[part], block))


def scheme_of(config: Mapping[str, Any], folder: HFFolder) -> Scheme | None:
    """The scheme of a folder whose config.json is ``config``; None for one without a quantization_config."""
    top = Fields(config, folder.path / "config.json")
    if not top.mapping("quantization_config"):
        return None
    fields = top.section("quantization_config")
    schemes: dict[str, type[Scheme]] = {
        "gptq": GPTQ,
        "awq": AWQ,
        "bitsandbytes": BitsAndBytes,
        "hqq": HQQ,
        "eetq": EETQ,
        "compressed-tensors": CompressedTensors,
        "fp8": FP8,
    }
    # Early bitsandbytes configs name no method.
    old = fields.get("load_in_8bit") is True or fields.get("load_in_4bit") is True
    method = fields.text("quant_method", *(["bitsandbytes"] if old else []))
    if method not in schemes:
        raise fields.unsupported("quant_method", f"{method!r} is not supported, supported: {', '.join(schemes)}")
    return schemes[method](fields, folder)
