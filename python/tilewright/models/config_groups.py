"""Folders in the compressed-tensors format: which config group covers a module, and what is stored for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from tilewright.io.errors import FormatError
from tilewright.models.scheme import Scheme, StoredMatrix, compiled
from tilewright.quant.compressed_tensors import FORMATS, WeightScheme, from_compressed_tensors

_INPUTS = tuple(f"{what}_{kind}" for what in ("input", "output") for kind in ("scale", "zero_point", "global_scale"))
_CACHE_SCALE = re.compile(r"\.self_attn\.[qkv]_(scale|zero_point|global_scale)$")


class CompressedTensors(Scheme):
    """compressed-tensors, with a group of modules for each kind of quantisation.

    A target or an entry of `ignore` is a module's name, "re:" and a regular expression that matches from its start, or
    the name of its class. Of several groups a module takes that with an exact name, else with the first matching
    expression, else its class.
    """

    marks = (".weight_packed", ".weight")
    skip_keys = ()

    def configure(self) -> None:
        fields = self.fields
        self.ignored = [self._target("ignore", text) for text in fields.names("ignore")]
        if fields.section("transform_config").mapping("config_groups"):
            raise fields.unsupported("transform_config", "weights that need transformed inputs are not supported")
        if fields.section("sparsity_config").text("format", "dense") != "dense":
            raise fields.unsupported("sparsity_config", "only the format 'dense' is supported")
        groups = fields.section("config_groups")
        self.groups: dict[str, dict[str, Any]] = {}
        targets: dict[str, str] = {}
        for name in fields.mapping("config_groups"):
            if isinstance(groups.get(name), list):
                raise groups.unsupported(name, "the name of a preset is not supported, only its settings are")
            group = groups.section(name)
            scheme = {**groups.mapping(name), "format": group.text("format", None) or fields.text("format", "dense")}
            self.groups[name] = scheme
            if group.mapping("weights") and scheme["format"] != "dense":
                self._check(name, scheme)
            for target in group.names("targets"):
                targets[target] = name
        # Names in order, then expressions, as the library sorts them.
        ordered = sorted(targets, key=lambda text: ("re:" in text, text))
        self.targets = [(self._target("config_groups", text), targets[text]) for text in ordered]

    def matrix(self, module: str) -> StoredMatrix | None:
        packed = self.has(module, "weight_packed")
        if packed and self.has(module, "weight"):
            raise FormatError(self.folder.path, f"{module}.weight", "expected none beside weight_packed")
        dtype = self.dtype(module)
        stored = packed or (dtype is not None and dtype.itemsize == 1)
        group = self._group(module)
        name = f"{module}.{'weight_packed' if packed else 'weight'}"
        if group is None or self.groups[group]["format"] == "dense" or not self.groups[group].get("weights"):
            if stored:
                raise FormatError(
                    self.folder.path, name, "expected a dense weight: no group of config_groups quantises this module"
                )
            return None
        scheme = self.groups[group]
        if not stored or packed != (scheme["format"] == "pack-quantized"):
            if len(self.folder.info(name)[1]) != 2 and not stored:
                return None  # a norm
            raise FormatError(
                self.folder.path, name, f"expected a {scheme['format']} weight by config_groups.{group}, got {dtype}"
            )
        optional = ("weight_zero_point", "weight_g_idx", *_INPUTS)
        if packed:
            names = self.tensors(module, "weight_packed", "weight_scale", "weight_shape", optional=optional)
            shape = self._shape(names["weight_shape"])
        else:
            names = self.tensors(module, "weight", "weight_scale", optional=optional)
            shape = self.sizes(module, "weight")
        return StoredMatrix(shape, names, lambda t: from_compressed_tensors(t, scheme))

    def ignorable(self, name: str) -> bool:
        return _CACHE_SCALE.search(name) is not None

    def _check(self, group: str, scheme: Mapping[str, Any]) -> None:
        """Complain now about settings that no weight could be read with."""
        if scheme["format"] == "mixed-precision":
            raise self.fields.error("format", f"each group's own format ({', '.join(FORMATS)})", "mixed-precision")
        try:
            WeightScheme.parse(scheme)
        except NotImplementedError as error:
            raise self.fields.unsupported(f"config_groups.{group}", str(error)) from None
        except ValueError as error:
            raise FormatError(self.fields.path, f"quantization_config.config_groups.{group}", str(error)) from None

    def _group(self, module: str) -> str | None:
        kind = "Embedding" if module.endswith("embed_tokens") else "Linear"
        if any(_matches(target, module, kind) for target in self.ignored):
            return None
        by_name = (group for target, group in self.targets if target != kind and _matches(target, module, kind))
        by_kind = (group for target, group in self.targets if target == kind)
        return next(by_name, next(by_kind, None))

    def _target(self, key: str, text: str) -> str | re.Pattern[str]:
        return compiled(self.fields, key, text.removeprefix("re:")) if text.startswith("re:") else text

    def _shape(self, name: str) -> tuple[int, int]:
        dtype, shape = self.folder.info(name)
        if dtype not in (torch.int64, torch.int32) or shape != (2,):
            raise FormatError(self.folder.path, name, f"expected two integers, got {dtype} {shape}")
        n, k = self.folder.tensor(name).tolist()
        return n, k


def _matches(target: str | re.Pattern[str], module: str, kind: str) -> bool:
    return target in (module, kind) if isinstance(target, str) else target.match(module) is not None
