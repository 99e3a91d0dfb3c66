"""Packing loses nothing, for any type, shape and group."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from weights import CODE_TYPES, random_weight

import tilus
from tilus import TilusError
from tilus.dtypes import DataType
from tilus.kernels.quantize import pack, unpack


@st.composite
def group_sizes(draw: st.DrawFn) -> tuple[int, int]:
    """(K, group): one of the usual groups that divides K, or all of K."""
    group = draw(st.sampled_from([16, 32, 64, 128, 0]))
    if group == 0:
        k = draw(st.integers(1, 200))
        return k, k
    return group * draw(st.integers(1, 384 // group)), group


@given(st.sampled_from(CODE_TYPES), st.integers(1, 140), group_sizes(), st.booleans(), st.integers(0, 2**32))
def test_unpack_inverts_pack(dtype: DataType, n: int, sizes: tuple[int, int], mins: bool, seed: int) -> None:
    k, group = sizes
    weight = random_weight(dtype, n, k, group, mins=mins, seed=seed)
    packed = pack(weight.codes, weight.scales, dtype, weight.mins)
    codes, scales, minimums = unpack(packed)
    assert packed.shape == (n, k)
    assert packed.group == group
    np.testing.assert_array_equal(codes, weight.codes)
    np.testing.assert_array_equal(scales, weight.scales)
    if weight.mins is None:
        assert minimums is None
    else:
        np.testing.assert_array_equal(minimums, weight.mins)


@pytest.mark.parametrize("dtype", CODE_TYPES, ids=str)
def test_every_code_in_every_place(dtype: DataType) -> None:
    """One tile per code, filled with it, beside a tile with all codes: packing mixes up no places and no bits."""
    codes = np.repeat(np.arange(dtype.num_codes, dtype=np.uint8), 64)[:, None].repeat(128, 1)
    codes[:, 64:] = (np.arange(codes.shape[0])[:, None] * 7 + np.arange(64)) % dtype.num_codes
    packed = pack(codes, np.ones((codes.shape[0], 1), np.float16), dtype)
    np.testing.assert_array_equal(unpack(packed)[0], codes)
    assert packed.codes.nbytes * 8 == codes.size * dtype.nbits  # not a bit more than the codes have


def test_torch_tensors_stay_torch_tensors() -> None:
    packed = random_weight(tilus.uint4, 64, 64, 32, mins=True).packed()
    assert all(isinstance(part, torch.Tensor) for part in (packed.codes, packed.scales, packed.minimums))
    assert packed.to("cpu").codes.dtype == torch.uint8


CODES = np.zeros((4, 64), np.uint8)


@pytest.mark.parametrize(
    ("codes", "scales", "options", "message"),
    [
        (
            CODES,
            np.ones((4, 3), np.float16),
            {},
            r"scales of shape \[4, 3\] .* codes of shape \[4, 64\], expected float16 \[N",
        ),
        (CODES, np.ones((4, 2), np.float32), {}, "dtype float32"),
        (CODES, np.ones((4, 8), np.float16), {}, "groups of 8 columns, expected one of 16, 32, 64, 128 or K = 64"),
        (CODES, np.ones((4, 2), np.float16), {"group": 16}, r"group is 16, the scales of shape \[4, 2\] imply 32"),
        (CODES.astype(np.int8), np.ones((4, 2), np.float16), {}, r"dtype int8, expected uint8 \[N, K\]"),
        (CODES + 16, np.ones((4, 2), np.float16), {}, "code 16, expected less than 16 for uint4"),
        (CODES, np.ones((4, 2), np.float16), {"mins": np.ones((4, 1), np.float16)}, r"mins of shape \[4, 1\]"),
        (CODES, np.ones((4, 2), np.float16), {"dtype": tilus.f16}, "weights of f16, expected a type of 1 to 8 bits"),
    ],
)
def test_misfits_are_named_with_both_values(
    codes: object, scales: object, options: dict[str, object], message: str
) -> None:
    with pytest.raises(TilusError, match=message):
        pack(codes, scales, **{"dtype": tilus.uint4, **options})
