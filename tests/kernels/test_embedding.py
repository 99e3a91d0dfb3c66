"""Embedding rows: bit for bit, since the product of a code and a scale is exact in f32 and rounded once."""

from __future__ import annotations

import pytest
import torch

from tilus import TilusError
from tilus.kernels import embedding

VOCABULARY = 11
IDS = torch.tensor([3, 0, 10, 3], dtype=torch.int32)


def random_table(hidden: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(hidden)
    if dtype == torch.int8:
        return torch.randint(-128, 128, (VOCABULARY, hidden), generator=generator, dtype=dtype)
    return torch.randn(VOCABULARY, hidden, generator=generator).to(dtype)


@pytest.mark.parametrize("hidden", [1, 100, 576, 1024, 1025, 2048])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dense(device: str, hidden: int, dtype: torch.dtype) -> None:
    table = random_table(hidden, dtype)
    assert torch.equal(embedding(IDS, table, device=device), table[IDS.long()])


@pytest.mark.sampled(9)
@pytest.mark.parametrize(
    ("hidden", "group"), [(32, 32), (576, 32), (1024, 32), (1056, 32), (4096, 32), (100, 4), (576, 64)]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_quantized(device: str, hidden: int, group: int, dtype: torch.dtype) -> None:
    codes, scales = random_table(hidden, torch.int8), random_table(hidden // group, dtype)
    expected = codes[IDS.long()].double().view(len(IDS), -1, group) * scales[IDS.long()].double()[..., None]
    found = embedding(IDS, codes, scales, device=device)
    assert torch.equal(found, expected.view(len(IDS), hidden).to(dtype))


def test_ids_outside_of_the_table_give_zeros(device: str) -> None:
    ids = torch.tensor([-1, 2, VOCABULARY, 2**31 - 1], dtype=torch.int32)
    table = random_table(64, torch.float16)
    found = embedding(ids, table, device=device)
    assert torch.equal(found[1], table[2])
    assert not found[[0, 2, 3]].any()
    codes, scales = random_table(64, torch.int8), random_table(2, torch.float16)
    found = embedding(ids, codes, scales, device=device)
    assert found[1].any()
    assert not found[[0, 2, 3]].any()


def test_misfits_are_named_with_both_values() -> None:
    table, codes = random_table(64, torch.float16), random_table(64, torch.int8)
    with pytest.raises(TilusError, match=r"ids of shape \[2, 2\] and a table of shape \[11, 64\], expected \[tokens\]"):
        embedding(IDS.view(2, 2), table)
    with pytest.raises(TilusError, match="parameter ids: found dtype int64, expected int32"):
        embedding(IDS.long(), table)
    with pytest.raises(
        TilusError, match=r"scales of shape \[11, 3\] for a table of shape \[11, 64\], expected \[11, 64 / gro"
    ):
        embedding(IDS, codes, torch.ones(11, 3, dtype=torch.float16))
    with pytest.raises(TilusError, match="found vocabulary = 10, expected 11"):
        embedding(IDS, codes, torch.ones(10, 2, dtype=torch.float16))
