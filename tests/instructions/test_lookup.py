"""Tables of 16 entries: every code in every place of a word, random tables, all bit patterns of f16 and bf16 that are numbers."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tile_programs import WARP_COUNTS, Array, assembles, random_layout, run_all

from tilus.dtypes import DataType, bf16, f16, f32, uint4, uint8
from tilus.errors import TilusError
from tilus.instructions.cast import cast
from tilus.instructions.lookup import lookup
from tilus.instructions.memory import load, store
from tilus.instructions.view import view
from tilus.ir.builder import IRBuilder
from tilus.ir.tensor import GlobalTensor
from tilus.layout import spatial
from tilus.ptx.parser import parse

HALVES = pytest.mark.parametrize("dtype", [f16, bf16], ids=str)


def random_table(dtype: DataType, seed: int) -> Array:
    """Any codes but those of infinities and NaN, as values."""
    codes = np.random.default_rng(seed).integers(0, 1 << 16, 64).astype(np.uint16)
    values = dtype.decode(codes)
    return values[np.isfinite(values)][:16]


def packed_program(b: IRBuilder, codes: GlobalTensor, table: GlobalTensor, y: GlobalTensor) -> None:
    """Each of 32 threads looks up 16 codes, packed in 8 bytes."""
    raw = load.build(b, codes, [0], [256], layout=spatial(32).local(8))
    unpacked = view.build(b, raw, uint4, [512], spatial(32).local(16))
    store.build(b, y, [0], lookup.build(b, load.build(b, table, [0], [16]), unpacked))


@HALVES
@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_every_code_in_every_place(dtype: DataType, target: str) -> None:
    """Thread t holds code (t + i) % 16 in slot i, and once (t - 3 i) % 16: each code meets each place and other neighbours."""
    thread, slot = np.arange(32)[:, None], np.arange(16)
    for codes in ((thread + slot) % 16, (thread - 3 * slot) % 16):
        table = random_table(dtype, 0)
        nibbles = codes.ravel().astype(np.uint8)
        arrays = {
            "codes": (uint8, nibbles[::2] | nibbles[1::2] << 4),
            "table": (dtype, table),
            "y": (dtype, np.zeros(512, np.float32)),
        }
        for found in run_all(packed_program, arrays, target=target):
            np.testing.assert_array_equal(found["y"], table[nibbles])


@HALVES
@settings(max_examples=20)
@given(st.randoms(use_true_random=False), st.sampled_from(WARP_COUNTS))
def test_any_layout_and_table(dtype: DataType, rng: random.Random, warps: int) -> None:
    layout = random_layout(rng, 2, warps)
    codes = np.random.default_rng(rng.getrandbits(32)).integers(0, 16, layout.shape, np.uint8)
    table = random_table(dtype, rng.getrandbits(32))

    def build(b: IRBuilder, codes: GlobalTensor, table: GlobalTensor, y: GlobalTensor) -> None:
        small = cast.build(b, load.build(b, codes, [0, 0], layout.shape, layout=layout), uint4)
        store.build(b, y, [0, 0], lookup.build(b, load.build(b, table, [0], [16]), small))

    arrays = {"codes": (uint8, codes), "table": (dtype, table), "y": (dtype, np.zeros(layout.shape, np.float32))}
    for found in run_all(build, arrays, warps):
        np.testing.assert_array_equal(found["y"], table[codes])


@HALVES
def test_cost(dtype: DataType) -> None:
    """21 instructions for eight codes; the table is taken apart once."""
    from tile_programs import compile_function, function, get_target, tensor

    tensors = {
        "codes": tensor("codes", uint8, [256]),
        "table": tensor("table", dtype, [16]),
        "y": tensor("y", dtype, [512]),
    }
    ptx = compile_function(function(packed_program, tensors, 1), get_target("sm_90a")).ptx
    opcodes = [getattr(item, "opcode", "") for item in parse(ptx).kernels[0].body]
    assert opcodes.count("prmt.b32") == 8 + 2 * 16
    assert opcodes.count("lop3.b32") == 2
    assembles(packed_program, {"codes": (uint8, [256]), "table": (dtype, [16]), "y": (dtype, [512])}, 1, "sm_90a")


@pytest.mark.parametrize(
    ("code", "table", "size", "message"),
    [
        (uint8, f16, 16, "lookup of codes of uint8, expected uint4"),
        (uint4, f32, 16, r"lookup in a table of f32\[16\], expected f16 or bf16 \[16\]"),
        (uint4, f16, 8, r"lookup in a table of f16\[8\], expected f16 or bf16 \[16\]"),
    ],
)
def test_misfits(code: DataType, table: DataType, size: int, message: str) -> None:
    def build(b: IRBuilder, codes: GlobalTensor, table: GlobalTensor) -> None:
        lookup.build(b, load.build(b, table, [0], [size]), cast.build(b, load.build(b, codes, [0], [64]), code))

    with pytest.raises(TilusError, match=message):
        run_all(build, {"codes": (uint8, np.zeros(64, np.uint8)), "table": (table, np.zeros(size, np.float32))})
