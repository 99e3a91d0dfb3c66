"""Queries whose bits are in shared memory become f16 where they are, of any width of heads; the emulator reports races."""

from __future__ import annotations

import pytest
import torch

import tilus
from tilus import Const, Tensor, bf16, f16
from tilus.kernels.paged_prefill_softmax import convert_bits


@tilus.kernel
def converted(bits: Tensor[f16, "rows", "width"], out: Tensor[f16, "rows", "width"], *, rows: Const, width: Const):
    tilus.grid(1, warps=4)
    held = tilus.shared(f16, [rows, width])
    tilus.store_shared(held, tilus.load(bits, [0, 0], [rows, width]), [0, 0])
    tilus.sync()
    convert_bits(held, bf16)
    tilus.store(out, [0, 0], tilus.load_shared(held))


@pytest.mark.parametrize("device", ["reference", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("width", [64, 96, 128, 256])
def test_every_number_is_converted_once(width: int, device: str) -> None:
    numbers = torch.randn(64, width, generator=torch.Generator().manual_seed(width)).bfloat16()
    bits, out = numbers.view(torch.float16), torch.zeros(64, width).half()
    if device == "cuda":
        bits, out = bits.cuda(), out.cuda()
    converted.on(device)(bits, out, rows=64, width=width)
    assert torch.equal(out.cpu(), numbers.half())
