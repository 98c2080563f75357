"""The converters beside the libraries whose formats they read, where those are installed. The definitions that always
run stand in hf_packers.py; these tests say that the libraries mean the same."""

from __future__ import annotations

import pytest
import torch
from hf_cases import CASES, convert, make

from tilewright import quant

COMPRESSED = [name for name in CASES if name.startswith("ct-") and name not in ("ct-int4-act-order", "ct-fp8-group")]


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_tensors(name: str) -> None:
    """The library rounds the product to the dtype of the scale. (Of the cases left out it dropped act-order, and it
    refuses a short last group.)"""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    stored = make(name)
    weights = dict(stored.config["config_groups"]["group_0"]["weights"], actorder=None)
    compressor = BaseCompressor.get_value_from_registry(stored.config["format"])
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    theirs = compressor.decompress(dict(stored.tensors), scheme)["weight"]
    assert torch.equal(convert(stored).dequantize().to(theirs.dtype), theirs)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes(kind: str, blocksize: int, nested: bool, dtype: torch.dtype, storage: torch.dtype) -> None:
    """Rows are whole numbers of blocks here: 0.50's kernel for CPUs takes each row to begin a block, where its
    quantising, and its kernels for GPUs, do not."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight, state = functional.quantize_4bit(
        torch.randn(96, 128, dtype=dtype),
        blocksize=blocksize,
        compress_statistics=nested,
        quant_type=kind,
        quant_storage=storage,
    )
    theirs = functional.dequantize_4bit(weight, state)
    for given in (state, state.as_dict(), state.as_dict(packed=True)):
        assert torch.equal(quant.from_bitsandbytes(weight, given).dequantize().to(dtype), theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group_size", [64, None])
@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2, 1.58, 1])
def test_hqq(bits: float, group_size: int | None, dtype: torch.dtype) -> None:
    """Against the library's codes, zeros and scales, multiplied in float64 (itself, it rounds at each step)."""
    library = pytest.importorskip("hqq.core.quantize")
    config = library.BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=1)
    layer = library.HQQLinear(torch.nn.Linear(128, 96, bias=False), config, compute_dtype=dtype, device="cpu")
    meta = layer.meta
    codes = library.Quantizer.unpack[meta["packing"]](layer.W_q.data, dtype=torch.float64)
    codes = codes[: 96 * 128 // meta["group_size"]]
    exact = ((codes - meta["zero"].double()) * meta["scale"].double()).view(96, 128)
    ours = quant.from_hqq(layer.W_q.data, meta).dequantize()
    if dtype is torch.float32:  # min = -zero * scale is rounded
        torch.testing.assert_close(ours, exact.float(), rtol=0, atol=1e-6 * float(exact.abs().max()))
    else:
        assert torch.equal(ours, exact.float())
