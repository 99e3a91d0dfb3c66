"""Packed codes in kernels: every code of every type in every place of a chunk, to every 16-bit float and further."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from weights import CODE_TYPES

import tilus
from tilus import Const, Tensor, TilusError, bf16, f16, f32, uint8
from tilus.codegen.cast_plan import plan_cast, scale_exponent
from tilus.codegen.packed_order import packed_order
from tilus.compiler import compile_function
from tilus.dtypes import DTYPES, DataType, float8_e4m3, pack_bits
from tilus.lang.kernel_file import load_kernel
from tilus.layout import spatial
from tilus.target import TARGETS

SLOTS = 32
THREADS = 256
ROWS = spatial(THREADS, 1).local(1, SLOTS)


def bytes_of(nbits: int):
    return spatial(THREADS, 1).local(1, SLOTS * nbits // 8)


@tilus.kernel
def unpack(
    packed: Tensor[uint8, "t", "nbytes"],
    halves: Tensor[f16, "t", SLOTS],
    brains: Tensor[bf16, "t", SLOTS],
    singles: Tensor[f32, "t", SLOTS],
    small: Tensor[float8_e4m3, "t", SLOTS],
    scaled_halves: Tensor[f16, "t", SLOTS],
    scaled_brains: Tensor[bf16, "t", SLOTS],
    natural: Tensor[uint8, "t", "nbytes"],
    again: Tensor[uint8, "t", "nbytes"],
    *,
    code: Const,
    target: Const = f16,
):
    tilus.grid(1, warps=THREADS // 32)
    nbytes = SLOTS * code.nbits // 8
    raw = tilus.load(packed, [0, 0], [THREADS, nbytes], layout=bytes_of(code.nbits))
    shape = [THREADS, SLOTS]
    tilus.store(halves, [0, 0], tilus.unpack_codes(raw, code, f16, shape, ROWS, packed_for=target))
    tilus.store(brains, [0, 0], tilus.unpack_codes(raw, code, bf16, shape, ROWS, packed_for=target))
    tilus.store(singles, [0, 0], tilus.unpack_codes(raw, code, f32, shape, ROWS, packed_for=target))
    tilus.store(small, [0, 0], tilus.unpack_codes(raw, code, float8_e4m3, shape, ROWS, packed_for=target))
    scaled = tilus.unpack_codes(raw, code, f16, shape, ROWS, packed_for=target, scaled=True)
    tilus.store(scaled_halves, [0, 0], scaled)
    scaled = tilus.unpack_codes(raw, code, bf16, shape, ROWS, packed_for=target, scaled=True)
    tilus.store(scaled_brains, [0, 0], scaled)
    unsigned = DTYPES[f"uint{code.nbits}"]
    codes = tilus.unpack_codes(raw, unsigned, unsigned, shape, ROWS, packed_as=code, packed_for=target)
    tilus.store(natural, [0, 0], tilus.view(codes, uint8, [THREADS, nbytes], bytes_of(code.nbits)))
    raw = tilus.pack_codes(codes, uint8, [THREADS, nbytes], bytes_of(code.nbits), packed_as=code, packed_for=target)
    tilus.store(again, [0, 0], raw)


def float64(x: torch.Tensor) -> Any:
    return x.to(torch.float64).numpy()


PACKED = [(code, packed_for) for code in CODE_TYPES for packed_for in (f16, f32)] + [
    (code, bf16) for code in CODE_TYPES if code.is_float
]


# C takes seconds to compile for each: on the CPU all types in natural order, and the orders that share code with a few.
ON_CPU = [(code, f32) for code in CODE_TYPES] + PACKED[:: len(CODE_TYPES) // 4]
# The emulator takes seconds, too: it sees each type in one order, the orders in turn, and everything with `exhaustive`.
OFTEN = {(code, (f16, f32, bf16)[index % (3 if code.is_float else 2)]) for index, code in enumerate(CODE_TYPES)}
PLACES = [
    pytest.param(name, *case, marks=marks, id=f"{name}-{case[0]}-{case[1]}")
    for name, cases, mark in (
        ("reference", PACKED, ()), ("cpu", dict.fromkeys(ON_CPU), ()), ("emulator", PACKED, (pytest.mark.slow,)),
        ("cuda", PACKED, (pytest.mark.gpu,)),
    )
    for case in cases
    for marks in [mark if name != "emulator" or case in OFTEN else (*mark, pytest.mark.exhaustive)]
]  # fmt: skip


@pytest.mark.sampled(12)
@pytest.mark.parametrize(("device", "code", "packed_for"), PLACES)
def test_every_code_in_every_place(device: str, code: DataType, packed_for: DataType) -> None:
    codes = ((np.arange(THREADS)[:, None] * 7 + np.arange(SLOTS)) % code.num_codes).astype(np.uint8)
    packed = torch.from_numpy(packed_order(code, packed_for).pack(codes))
    sixteen = [torch.empty(THREADS, SLOTS, dtype=t) for t in (torch.float16, torch.bfloat16) * 2]
    singles = torch.empty(THREADS, SLOTS)
    small = torch.empty(THREADS, SLOTS, dtype=torch.float8_e4m3fn)
    natural, again = torch.empty_like(packed), torch.empty_like(packed)
    unpack.on(device)(packed, *sixteen[:2], singles, small, *sixteen[2:], natural, again, code=code, target=packed_for)
    values = code.decode(codes).astype(np.float64)
    for found, scaled, dtype in zip(sixteen[:2], sixteen[2:], (f16, bf16), strict=True):
        np.testing.assert_array_equal(float64(found), values)
        np.testing.assert_array_equal(np.signbit(float64(found)) & (values == 0), np.signbit(values) & (values == 0))
        np.testing.assert_array_equal(float64(scaled) * 2.0 ** scale_exponent(code, dtype), values)
    np.testing.assert_array_equal(float64(singles), values)
    rounded = np.clip(values, -448, 448).astype(np.float32)
    np.testing.assert_array_equal(float64(small), float64(torch.from_numpy(rounded).to(torch.float8_e4m3fn)))
    np.testing.assert_array_equal(natural.numpy(), pack_bits(codes, code))
    np.testing.assert_array_equal(again.numpy(), packed.numpy())


@pytest.mark.parametrize("code", CODE_TYPES, ids=str)
def test_the_order_for_f32_is_little_endian(code: DataType) -> None:
    codes = (np.arange(64) * 7 % code.num_codes).astype(np.uint8)
    bits = (codes[:, None] >> np.arange(code.nbits) & 1).reshape(-1)
    np.testing.assert_array_equal(packed_order(code, f32).pack(codes), np.packbits(bits, bitorder="little"))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "tilus.unpack_codes(tilus.load(x, [0, 0], [32, 16]), int4, f16, [32, 32], spatial(32, 1).local(1, 32))",
            "unpack_codes needs the layouts of both tiles",
        ),
        (
            "tilus.unpack_codes(raw, int4, f16, [32, 16], spatial(32, 1).local(1, 16))",
            "unpack_codes: a thread holds 128 packed bits and 16 codes of int4 (64 bits), "
            "expected the same bits and a multiple of 8 codes",
        ),
        (
            "tilus.unpack_codes(raw, int4, f32, [32, 32], spatial(32, 1).local(1, 32), scaled=True)",
            "unpack_codes to f32 with scaled=True, expected f16 or bf16",
        ),
        (
            "tilus.unpack_codes(raw, int4, f16, [32, 32], spatial(32, 1).local(1, 32), packed_as=uint8)",
            "unpack_codes: codes of int4 (4 bits) in the packed order of uint8 (8 bits)",
        ),
        (
            "tilus.unpack_codes(raw, int4, f16, [32, 32], spatial(32, 1).local(1, 32), packed_for=uint8)",
            "codes of int4 packed for uint8, expected a type of 1 to 8 bits and f16, bf16 or f32",
        ),
        (
            "tilus.pack_codes(raw, uint8, [64, 8], spatial(64, 1).local(1, 8))",
            "pack_codes between a layout of 32 threads and one of 64",
        ),
    ],
)
def test_misfits_are_named(body: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "kernels.py"
    path.write_text(
        "import tilus\nfrom tilus import Tensor, f16, f32, int4, uint8\nfrom tilus.layout import spatial\n\n\n"
        "@tilus.kernel\ndef f(x: Tensor[uint8, 32, 16]):\n    tilus.grid(1, warps=1)\n"
        "    raw = tilus.load(x, [0, 0], [32, 16], layout=spatial(32, 1).local(1, 16))\n"
        f"    y = {body}\n    tilus.print(y)\n"
    )
    with pytest.raises(TilusError) as caught:
        compile_function(load_kernel(path).ir(), TARGETS["sm_80"])
    assert message in str(caught.value) and "kernels.py:10" in str(caught.value)


def test_the_report_names_the_plan() -> None:
    notes = compile_function(unpack.ir(code=tilus.float4_e2m1), TARGETS["sm_90a"]).lowered.notes
    plan = plan_cast(tilus.float4_e2m1, f16, TARGETS["sm_90a"], order=packed_order(tilus.float4_e2m1), scaled=True)
    assert f"float4_e2m1 to f16: {plan.cost:.2f} instructions a value, 8 at a time, times 2^14 left to the caller" in [
        note.text for note in notes
    ]
