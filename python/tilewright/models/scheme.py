"""What every quantised folder has in common: matrices made of several tensors, found by name and checked.

What the file holds decides whether a matrix is quantised; the config has to agree where it speaks of the module.
Only weights count: how a library would round inputs or caches is not imitated (`activation` of from_pretrained says how
inputs are rounded), and the scales for that are left out.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tilewright.io.errors import FormatError
from tilewright.io.folder import HFFolder
from tilewright.models.fields import Fields
from tilewright.quant import QuantizedWeight


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix (N, K) made of several tensors. tensors: their names in the folder, by those in `convert`'s dict."""

    shape: tuple[int, int]
    tensors: dict[str, str]
    convert: Callable[[dict[str, Tensor]], QuantizedWeight]


class Scheme(ABC):
    """A library's way of storing quantised matrices, as one folder's config sets it.

    Raises FormatError for a config or a set of tensors that contradict themselves, NotImplementedError for what is not
    supported; both name the field or the tensor. `matrices` maps "MODULE.weight" to what is stored for it.
    """

    marks: ClassVar[tuple[str, ...]]  # a quantised module has a tensor whose name ends in one of these
    skip_keys: ClassVar[tuple[str, ...]] = ("modules_to_not_convert",)  # the first that is there counts

    def __init__(self, fields: Fields, folder: HFFolder) -> None:
        self.fields, self.folder = fields, folder
        self.names = frozenset(folder.names())
        self.skip_key = next((key for key in self.skip_keys if fields.get(key) is not None), "")
        # As in transformers: a pattern covers a module from its start to the end of a part, or as its end.
        self.skips = [
            (text, compiled(fields, self.skip_key, rf"(?:{text})(?:(?<=\.)|(?=\.|$))"))
            for text in (fields.names(self.skip_key) if self.skip_key else ())
        ]
        self.configure()
        self.matrices = self._find()

    @abstractmethod
    def configure(self) -> None:
        """Read and check what else the config says."""

    @abstractmethod
    def matrix(self, module: str) -> StoredMatrix | None:
        """What is stored for a module with one of the marks, None if that is dense."""

    def ignorable(self, name: str) -> bool:
        """Whether a tensor that belongs to no matrix may be left out."""
        return False

    def has(self, module: str, part: str) -> bool:
        return f"{module}.{part}" in self.names

    def dtype(self, module: str, part: str = "weight") -> torch.dtype | None:
        """None where the file has no such tensor."""
        return self.folder.info(f"{module}.{part}")[0] if self.has(module, part) else None

    def sizes(self, module: str, part: str) -> tuple[int, int]:
        """The shape of a tensor with two dimensions."""
        shape = self.folder.info(f"{module}.{part}")[1]
        if len(shape) != 2:
            raise FormatError(self.folder.path, f"{module}.{part}", f"expected two dimensions, got shape {shape}")
        return shape

    def tensors(self, module: str, *required: str, optional: tuple[str, ...] = ()) -> dict[str, str]:
        """The names of a module's tensors by their last part."""
        for part in required:
            if not self.has(module, part):
                raise FormatError(
                    self.folder.path,
                    f"{module}.{part}",
                    f"expected this tensor for a matrix quantised with {self.fields.get('quant_method')}, the file has "
                    "none of that name",
                )
        return {part: f"{module}.{part}" for part in (*required, *optional) if self.has(module, part)}

    def _find(self) -> dict[str, StoredMatrix]:
        found: dict[str, StoredMatrix] = {}
        for name in self.folder.names():
            mark = next((mark for mark in self.marks if name.endswith(mark)), None)
            if mark is None:
                continue
            module = name.removesuffix(mark)
            matrix = self.matrix(module)
            if matrix is None:
                continue
            for text, pattern in self.skips:
                if pattern.match(module) or module.endswith(text):
                    raise self.fields.error(self.skip_key, f"modules that are not quantised ({module} is)", text)
            found[f"{module}.weight"] = matrix
        return found


def compiled(fields: Fields, name: str, text: str) -> re.Pattern[str]:
    """A pattern of the config. Raises FormatError for one that is none."""
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise fields.error(name, f"regular expressions ({error})", text) from None
