"""The error rule itself: what a broken kernel would return must not pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from buffers import assert_padding_intact, poisoned
from compare import assert_close, assert_same_bits
from torch import Tensor


def case(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A float64 reference and the naive result in dtype."""
    x, w = torch.randn(64, 96).to(dtype), torch.randn(96, 33).to(dtype)
    return x.double() @ w.double(), x @ w


def test_accepts_naive_and_rounded_reference(dtype: torch.dtype) -> None:
    ref, naive = case(dtype)
    assert_close(naive, ref, naive, dtype)
    assert_close(ref.to(dtype), ref, naive, dtype)


def one_nan(t: Tensor) -> None:
    t[3, 5] = float("nan")


def one_inf(t: Tensor) -> None:
    t[3, 5] = float("inf")


def one_flipped_sign(t: Tensor) -> None:
    at = t.abs().argmax()
    t.view(-1)[at] = -t.view(-1)[at]


def one_bad_column(t: Tensor) -> None:
    t[:, 7] = t[:, 8]


def scaled_negative(t: Tensor) -> None:
    t.mul_(-0.5)


def all_zero(t: Tensor) -> None:
    t.zero_()


def small_bias(t: Tensor) -> None:  # below the maximum rule in places, above the rms rule
    t.mul_(1.02)


@pytest.mark.parametrize(
    "damage", [one_nan, one_inf, one_flipped_sign, one_bad_column, scaled_negative, all_zero, small_bias]
)
def test_rejects(damage: Callable[[Tensor], None], dtype: torch.dtype) -> None:
    ref, naive = case(dtype)
    broken = naive.clone()
    damage(broken)
    with pytest.raises(AssertionError):
        assert_close(broken, ref, naive, dtype)


def test_rejects_missing_nan_and_wrong_infinity(dtype: torch.dtype) -> None:
    ref, naive = case(dtype)
    for value, given in (("nan", 0.0), ("inf", "-inf"), ("-inf", 1e4)):
        bad_ref, out = ref.clone(), naive.clone()
        bad_ref[0, 0], out[0, 0] = float(value), float(given)
        with pytest.raises(AssertionError):
            assert_close(out, bad_ref, naive, dtype)
        out[0, 0] = float(value)
        assert_close(out, bad_ref, naive, dtype)


def test_rejects_shape_and_dtype(dtype: torch.dtype) -> None:
    ref, naive = case(dtype)
    with pytest.raises(AssertionError):
        assert_close(naive[:, :-1], ref, naive, dtype)
    with pytest.raises(AssertionError):
        assert_close(naive.double(), ref, naive, dtype)


def test_same_bits_tells_zeros_apart() -> None:
    with pytest.raises(AssertionError):
        assert_same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))


def test_poisoned_buffer(dtype: torch.dtype) -> None:
    t = torch.randn(2, 3, 4, 7).to(dtype)
    view = poisoned(t)
    assert torch.equal(view, t) and view.stride(-1) == 1
    assert_padding_intact(view)
    view.untyped_storage().fill_(0)
    with pytest.raises(AssertionError):
        assert_padding_intact(view)
