"""Layout conversions as kernels: every type, any layouts, on all executions; and what the plan claims against what is run."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_pairs import pair_within_warps, random_pair

import tilus
from tilus import Const, Tensor, f32, int32
from tilus.compiler import Compiled, compile_function
from tilus.dtypes import DTYPES, DataType, boolean, int16
from tilus.errors import TilusError
from tilus.instructions.convert import Convert
from tilus.ir.builder import IRBuilder
from tilus.ir.layout_rules import tile_conversion
from tilus.layout import RegisterLayout, column_spatial, local, replicated, spatial
from tilus.layout.conversion import ScratchWay
from tilus.ptx.assembler import assemble
from tilus.runtime.emulator import run_kernel
from tilus.target import get_target

DEVICES = ["emulator", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
INTEGERS = [dtype for dtype in DTYPES.values() if dtype.is_integer and dtype.nbits < 32]
WHOLE = [dtype for dtype in DTYPES.values() if dtype.nbits in (8, 16, 32, 64) and dtype != boolean]


@tilus.kernel
def convert_codes(x: Tensor[int32, "n"], y: Tensor[int32, "n"], *, via: Const, src: Const, dst: Const, warps: Const):
    """Through a tile of any integer type: what memory holds has 32 bits."""
    tilus.grid(1, warps=warps)
    tile = tilus.cast(tilus.load(x, [0], shape=src.shape, layout=src), via)
    tilus.store(y, [0], tilus.cast(tilus.with_layout(tile, dst), int32))


@tilus.kernel
def convert_flags(x: Tensor[int32, "n"], y: Tensor[int32, "n"], *, src: Const, dst: Const, warps: Const):
    tilus.grid(1, warps=warps)
    flags = tilus.load(x, [0], shape=src.shape, layout=src) != 0
    tilus.store(y, [0], tilus.cast(tilus.with_layout(flags, dst), int32))


@tilus.kernel
def convert_values(x: Tensor["t", "n"], y: Tensor["t", "n"], *, src: Const, dst: Const, warps: Const):
    tilus.grid(1, warps=warps)
    tile = tilus.load(x, [0], shape=src.shape, layout=src)
    tilus.store(y, [0], tilus.with_layout(tile, dst))


@tilus.kernel
def convert_in_turns(x: Tensor[f32, "n"], y: Tensor[f32, "n"], *, src: Const, dst: Const, other: Const, warps: Const):
    """Conversions of the block and of single warps take turns in scratch memory."""
    tilus.grid(1, warps=warps)
    tile = tilus.load(x, [0], shape=src.shape, layout=src)
    for _ in tilus.range(0, 3):
        tile = tilus.with_layout(tilus.with_layout(tilus.with_layout(tile, dst), other), src) + 1.0
    tilus.store(y, [0], tile)


def flat(pair: tuple[RegisterLayout, RegisterLayout]) -> tuple[RegisterLayout, RegisterLayout]:
    """The same digits for the tile in one dimension, as memory has it."""
    src, dst = (layout.reshape((layout.size,)) for layout in pair)
    return src, dst


def some_pair(rng: random.Random, num_warps: int) -> tuple[RegisterLayout, RegisterLayout]:
    within = num_warps in (1, 2, 4) and rng.random() < 0.4
    return flat(pair_within_warps(rng, rng.choice([1, 2, 4, 8]), num_warps) if within else random_pair(rng, num_warps))


def check_integers(
    dtype: DataType, src: RegisterLayout, dst: RegisterLayout, warps: int, device: str, seed: int
) -> None:
    low, high = int(dtype.min_value), int(dtype.max_value)
    generator = np.random.default_rng(seed)
    x = generator.integers(low, high, src.size, endpoint=True).astype(np.int64).astype(np.int32)
    y = np.zeros_like(x)
    convert_codes.on(device)(x, y, via=dtype, src=src, dst=dst, warps=warps)
    np.testing.assert_array_equal(y, x)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_every_integer_type(dtype: DataType, device: str) -> None:
    rng = random.Random(dtype.name)
    for num_warps in (1, 2):
        check_integers(dtype, *some_pair(rng, num_warps), num_warps, device, rng.getrandbits(20))


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=15)
@given(st.randoms(use_true_random=False), st.sampled_from([1, 2, 3, 4]))
def test_integers_in_any_layouts(device: str, rng: random.Random, num_warps: int) -> None:
    check_integers(rng.choice(INTEGERS), *some_pair(rng, num_warps), num_warps, device, rng.getrandbits(20))


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=10)
@given(st.randoms(use_true_random=False), st.sampled_from([1, 2, 3, 4]))
def test_flags_in_any_layouts(device: str, rng: random.Random, num_warps: int) -> None:
    src, dst = some_pair(rng, num_warps)
    x = np.random.default_rng(rng.getrandbits(20)).integers(0, 2, src.size).astype(np.int32)
    y = np.full_like(x, 7)
    convert_flags.on(device)(x, y, src=src, dst=dst, warps=num_warps)
    np.testing.assert_array_equal(y, x)


def random_bits(dtype: DataType, count: int, seed: int) -> npt.NDArray[Any]:
    """Elements of any bits, NaN included: a conversion changes none."""
    return np.random.default_rng(seed).integers(0, 256, count * dtype.nbits // 8).astype(np.uint8)


@pytest.mark.parametrize("dtype", WHOLE, ids=str)
def test_every_whole_type_keeps_all_bits(dtype: DataType) -> None:
    rng = random.Random(dtype.name)
    for num_warps in (1, 2, 4):
        src, dst = some_pair(rng, num_warps)
        kernel = compiled(dtype, src, dst, num_warps)
        x = random_bits(dtype, src.size, rng.getrandbits(20))
        y = np.zeros_like(x)
        run(kernel, x, y, rng.getrandbits(16))
        np.testing.assert_array_equal(y, x)


def compiled(dtype: DataType, src: RegisterLayout, dst: RegisterLayout, warps: int, target: str = "sm_90a") -> Compiled:
    kernel = convert_values.specialize(t=dtype, n=src.size, src=src, dst=dst, warps=warps)
    return compile_function(kernel.function, get_target(target))


def run(kernel: Compiled, x: npt.NDArray[Any], y: npt.NDArray[Any], seed: int = 0) -> Any:
    dynamic = kernel.lowered.shared_nbytes if kernel.lowered.dynamic_shared else 0
    return run_kernel(
        kernel.ptx, kernel.kernel_name, (1, 1, 1), [x, y], dynamic_shared_nbytes=dynamic, seed=seed, profile=True
    ).stats


@given(st.randoms(use_true_random=False), st.sampled_from([1, 2, 3, 4]))
@settings(max_examples=25)
def test_the_emulator_counts_what_the_plan_claims(rng: random.Random, num_warps: int) -> None:
    check_counts(rng.choice(WHOLE), *some_pair(rng, num_warps), num_warps)


def check_counts(dtype: DataType, src: RegisterLayout, dst: RegisterLayout, num_warps: int) -> None:
    """Wavefronts and conflicts of both sides, shuffles, selects, permutes and barriers."""
    kernel = compiled(dtype, src, dst, num_warps)
    bits = random_bits(dtype, src.size, 1)
    stats = run(kernel, bits, np.zeros_like(bits))
    way = tile_conversion(dtype, src, dst).chosen
    per_slot = 2 if dtype.nbits == 64 else 1
    executed = {name: count for name, count in stats.instructions.items() if "shfl" in name or "bar." in name}
    if not isinstance(way, ScratchWay):
        assert not stats.shared
        assert sum(executed.values()) == per_slot * way.program.rounds * num_warps
        return
    scratch = way.scratch
    repeats = num_warps if scratch.is_per_warp else 1
    for kind, side in (("st", scratch.store), ("ld", scratch.load)):
        sites = [site for site in stats.shared.values() if site.opcode.startswith(kind)]
        assert sum(site.transactions for site in sites) == repeats * side.wavefronts
        assert sum(site.conflicts for site in sites) == repeats * side.extra
        assert len(sites) == len(side.vectors)
    assert executed == {"bar.warp.sync" if scratch.is_per_warp else "bar.sync": 2 * num_warps}


@pytest.mark.parametrize("device", DEVICES)
def test_conversions_take_turns_in_scratch_memory(device: str) -> None:
    """A warp's own region is not the block's: warps that are ahead must not write where others still read."""
    src = spatial(4, 8, 4).local(1, 1, 8).reshape((1024,))
    within = (spatial(4, 1, 1) * local(1, 1, 8).spatial(1, 8, 4)).reshape((1024,))
    across = local(8).spatial(128)
    assert tile_conversion(f32, src, within).warp_scratch_nbytes > 0
    assert tile_conversion(f32, within, across).block_scratch_nbytes > 0
    x = np.arange(1024, dtype=np.float32)
    for _ in range(3):
        y = np.zeros_like(x)
        convert_in_turns.on(device)(x, y, src=src, dst=within, other=across, warps=4)
        np.testing.assert_array_equal(y, x + 3)


@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_ptx_assembles(target: str) -> None:
    rng = random.Random(target)
    for dtype in (tilus.int8, tilus.f16, f32, tilus.int64):
        for num_warps in (1, 2, 4):
            chosen = get_target(target)
            assemble(compiled(dtype, *some_pair(rng, num_warps), num_warps, target).ptx, chosen)


def test_a_shuffle_reads_any_function_of_the_lane() -> None:
    """Lanes in order of their bits reversed, rotated, and by a table that no XOR of bits gives."""
    rng = random.Random(2)
    for layout in (column_spatial(8, 4), column_spatial(2, 16), spatial(2, 4, 4).permute([1, 0, 2])):
        src, dst = flat((spatial(*layout.shape), layout))
        assert tile_conversion(int16, src, dst).chosen.name == "shuffles"
        check_integers(int16, src, dst, 1, "emulator", rng.getrandbits(20))
    check_integers(int16, spatial(96), column_spatial(3, 32).reshape((96,)), 3, "emulator", 4)
    check_integers(int16, replicated(96, 1).local(96), spatial(96), 3, "emulator", 5)


def test_a_conversion_keeps_the_type() -> None:
    b = IRBuilder()
    with pytest.raises(TilusError, match="convert of a tile of f32 to one of int16, expected the same dtype"):
        Convert(b.tile(int16, (32,)), b.tile(f32, (32,))).verify()
    with pytest.raises(TilusError, match=r"convert: shapes \[32\] and \[64\] differ"):
        Convert(b.tile(f32, (32,)), b.tile(f32, (64,))).verify()
