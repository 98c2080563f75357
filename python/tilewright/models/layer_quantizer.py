"""The weights of one layer after another, quantised by one of METHODS.

The methods that calibrate see the inputs that a matrix will get: the states of the calibration text have run through
the layers that are done, as they are now, and run through the layer at hand as far as that is done.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tilewright.models.compressed import coded_tensors
from tilewright.models.layerwise import GROUPS, MATRICES, NORMS, Layer, LayerReader, hf_name, linear
from tilewright.models.linear import Matrix
from tilewright.models.sources import HF_NAMES
from tilewright.quant import QuantizedWeight
from tilewright.quant.methods.awq import awq_codes, awq_scales
from tilewright.quant.methods.gptq import gptq
from tilewright.quant.methods.grid import Coded, Grid, Settings, range_grid, stored
from tilewright.quant.methods.hqq import hqq_grid

METHODS = ("rtn", "hqq", "gptq", "awq")
CALIBRATED = METHODS[2:]
# What the factors by which AWQ multiplies a group's columns are taken out of: a norm, or the rows of a matrix.
_BEFORE = {GROUPS[0]: "attention_norm", GROUPS[1]: "v", GROUPS[2]: "mlp_norm", GROUPS[3]: "up"}


@dataclass(frozen=True)
class Recipe:
    """What is to be done to a checkpoint. skip: names of modules that stay dense, whole or their last part."""

    method: str = "rtn"
    bits: int = 4
    group_size: int = 32
    symmetric: bool = True
    skip: tuple[str, ...] = ("lm_head",)
    act_order: bool = True  # see `quant.methods.gptq`

    def settings(self, module: str, columns: int, dtype: torch.dtype) -> Settings | None:
        """For a module with so many columns in a folder of ``dtype``, which its scales have too; None: it stays dense.

        compressed-tensors has no short groups: where the group size does not divide the columns, the largest smaller
        one that does is taken.
        """
        if module in self.skip or module.rpartition(".")[2] in self.skip:
            return None
        scales = None if dtype == torch.float32 else dtype  # None: fp16 numbers, which the kernels like better
        sizes = (self.group_size, *(size for size in (64, 32, 16) if size < self.group_size))
        for size in sizes:
            if size == -1 or columns % size == 0:
                return Settings(self.bits, size, self.symmetric, scales)
        return None


class Statistics:
    """What calibration has to know about the inputs of a group of matrices."""

    def __init__(self) -> None:
        self.squares: Tensor | int = 0
        self.sizes: Tensor | int = 0
        self.count = 0

    def add(self, x: Tensor) -> None:
        """Inputs float32 (..., K)."""
        x = x.reshape(-1, x.shape[-1])
        self.squares = self.squares + x.t() @ x
        self.sizes = self.sizes + x.abs().sum(0)
        self.count += len(x)

    @property
    def hessian(self) -> Tensor:
        """The mean of ``x.T @ x``, (K, K)."""
        return self.squares / self.count

    @property
    def magnitude(self) -> Tensor:
        """The mean of |x|, (K,)."""
        return self.sizes / self.count


class LayerQuantizer:
    """Quantises layer after layer of an open checkpoint."""

    def __init__(self, reader: LayerReader, recipe: Recipe) -> None:
        self.reader, self.recipe = reader, recipe
        self.plan = {module: recipe.settings(module, k, reader.dtype) for module, k in reader.linear_columns()}
        if reader.config.tie_word_embeddings:  # the embedding, which is looked up in rather than multiplied
            self.plan[HF_NAMES.head] = None

    def layer(self, index: int, states: Tensor | None) -> dict[str, Tensor]:
        """The layer's tensors under the names that the folder has. states: float32 (samples, seq, hidden), the
        layer's inputs in calibration, which become its outputs; None without calibration."""
        layer = self.reader.layer(index)
        self.coded: dict[str, Coded] = {}
        if states is None:
            for name in MATRICES:
                self._round(layer, (name,), None)
        else:
            self._calibrate(layer, states)
        tensors = {f"{hf_name(name, index)}.weight": self._dense(layer.weights[name]) for name in NORMS}
        for name in MATRICES:
            module = hf_name(name, index)
            if name in self.coded:
                tensors |= coded_tensors(module, self.coded[name], self.reader.dtype)
            else:
                tensors[f"{module}.weight"] = self._dense(layer.weights[name])
            if name in layer.biases:
                tensors[f"{module}.bias"] = self._dense(layer.biases[name])
        return tensors

    def outside(self, states: Tensor | None) -> dict[str, Tensor]:
        """The tensors that belong to no layer; states as `layer` left them."""
        norm = self.reader.norm()
        tensors = {f"{HF_NAMES.norm}.weight": self._dense(norm)}
        tensors[f"{HF_NAMES.embedding}.weight"] = self._dense(self.reader.embedding())
        if self.reader.config.tie_word_embeddings:
            return tensors
        head, settings = self.reader.head(), self.plan[HF_NAMES.head]
        if settings is None:
            return tensors | {f"{HF_NAMES.head}.weight": self._dense(head)}
        hessian = None if states is None else _seen(self.reader.normed(norm, states)).hessian
        coded = self._codes(self.reader.head_weight(), settings, hessian)
        return tensors | coded_tensors(HF_NAMES.head, coded, self.reader.dtype)

    def _calibrate(self, layer: Layer, states: Tensor) -> None:
        reader = self.reader
        self._round(layer, GROUPS[0], _seen(reader.normed(layer.weights["attention_norm"], states)))

        width = layer.weights["output"].shape[1]
        inputs = torch.empty(*states.shape[:2], width)
        for piece, x in reader.attended(layer, states):
            inputs[piece] = x
        scales = self._round(layer, GROUPS[1], _seen([(slice(None), x) for x in inputs]))
        for x, state in zip(inputs, states, strict=True):
            state += linear(layer, "output", x / scales)
        del inputs

        self._round(layer, GROUPS[2], _seen(reader.normed(layer.weights["mlp_norm"], states)))
        self._round(layer, GROUPS[3], _seen(reader.gated(layer, states)))
        for piece, x in reader.gated(layer, states):
            states[piece] += linear(layer, "down", x)

    def _round(self, layer: Layer, names: tuple[str, ...], statistics: Statistics | None) -> Tensor:
        """Quantise matrices that read the same input, and leave in the layer what they stand for now. Returns the
        factors (K,) by which that input is smaller now; what makes it is changed in the layer accordingly."""
        factors = torch.ones(layer.weights[names[0]].shape[1])
        covered = [name for name in names if self.plan[hf_name(name, layer.index)] is not None]
        if not covered:
            return factors
        settings = self.plan[hf_name(covered[0], layer.index)]  # that of all: they have the same columns
        w = torch.cat([layer.weights[name] for name in covered])
        if self.recipe.method == "awq":
            factors = awq_scales(w, statistics.hessian, self._shared(names, statistics.magnitude), settings)
            factors = self._divide(layer, _BEFORE[names], factors)
            for name in names:
                layer.weights[name] *= factors
            w = torch.cat([layer.weights[name] for name in covered])
        hessian = None if statistics is None else statistics.hessian / factors / factors[:, None]
        coded, start = self._codes(w, settings, hessian), 0
        for name in covered:
            stop = start + len(layer.weights[name])
            self.coded[name] = coded.rows(start, stop)
            layer.weights[name] = self.coded[name].dequantize()
            start = stop
        return factors

    def _codes(self, w: Tensor, settings: Settings, hessian: Tensor | None) -> Coded:
        match self.recipe.method:
            case "rtn":
                return Coded.nearest(w, range_grid(settings.split(w), settings))
            case "hqq":
                return Coded.nearest(w, hqq_grid(settings.split(w), settings))
            case "gptq":
                return gptq(w, hessian, settings, act_order=self.recipe.act_order)
            case _:
                return awq_codes(w, hessian, settings)

    def _shared(self, names: tuple[str, ...], magnitude: Tensor) -> Tensor:
        """The magnitudes that factors are made from: query heads that read the same values get the same ones."""
        if names != GROUPS[1]:
            return magnitude
        config = self.reader.config
        heads = magnitude.view(config.num_key_value_heads, -1, config.head_dim)
        return heads.mean(1, keepdim=True).expand_as(heads).flatten()

    def _divide(self, layer: Layer, name: str, factors: Tensor) -> Tensor:
        """Make the outputs of a norm or a matrix smaller by factors (K,), as far as the folder's dtype can say that,
        and return by how much they are."""
        if name in NORMS:
            old = layer.weights[name]
            new = (old / factors).to(self.reader.dtype).float()
            usable = (new != 0) & new.isfinite()
            layer.weights[name] = torch.where(usable, new, old)
            return torch.where(usable, old / new, torch.ones_like(old))
        config, rows = self.reader.config, factors
        if name == "v":  # the factors of the query heads that read one head of values are the same
            rows = factors.view(config.num_key_value_heads, -1, config.head_dim)[:, 0].flatten()
        if name in layer.biases:
            layer.biases[name] = layer.biases[name] / rows
        if name not in self.coded:
            layer.weights[name] = layer.weights[name] / rows[:, None]
            return factors
        coded = self.coded[name]
        scales = stored(coded.grid.scales / rows[:, None], coded.grid.settings.scale_dtype)
        self.coded[name] = Coded(coded.codes, Grid(scales, coded.grid.zeros, coded.grid.settings))
        layer.weights[name] = self.coded[name].dequantize()
        return factors

    def _dense(self, tensor: Matrix) -> Tensor:
        """A tensor that stays dense, in the folder's dtype."""
        dense = tensor.dequantize() if isinstance(tensor, QuantizedWeight) else tensor
        dense = dense.to(self.reader.dtype)
        if not bool(dense.isfinite().all()):
            raise ValueError(
                f"{self.reader.path}: expected finite numbers in the range of {self.reader.dtype}, got others"
            )
        return dense


def _seen(inputs: Iterable[tuple[slice, Tensor]]) -> Statistics:
    statistics = Statistics()
    for _, x in inputs:
        statistics.add(x)
    return statistics
