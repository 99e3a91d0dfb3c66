"""A Triton kernel to compare with: y = x W^T of f16 activations and symmetric 4-bit codes, one f16 scale for each group of 128.

The weight is the left operand, so that few tokens waste no rows of the tensor cores. One iteration of the loop takes 128 or 256
columns (`step`): a 16-bit word of the packed weight holds one code of each quarter of them, so that unpacked quarters are whole
operands, without shuffling. Codes become f16 by the bits of 1024 + code (and 1024 + 16 * code) and are multiplied by their scale
in f16. For few tokens blocks split K; the last one to arrive adds up the partial sums in f32.

Needs triton; the rest of the benchmarks does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.runtime import errors

TooLarge = errors.OutOfResources  # what a tile raises that is too large for the GPU
BIAS = 8  # what is subtracted from the stored code


@dataclass(frozen=True)
class Config:
    """One way to cut a product into blocks. step: columns of an iteration, for which the weight must be packed."""

    step: int
    block_n: int
    block_m: int
    splits: int
    warps: int
    stages: int


def configs(n: int, k: int, m: int, num_sms: int = 132) -> list[Config]:
    """A handful for M tokens; the fastest of them counts."""
    if m <= 64:
        block_m = max(16, triton.next_power_of_2(m))
        found: list[Config] = []
        for block_n, warps, stages in ((64, 4, 4), (64, 4, 6), (128, 8, 4), (128, 8, 5)):
            blocks = triton.cdiv(n, block_n)
            for per_sm in (2, 4):
                splits = max(1, min(per_sm * num_sms // blocks, k // 256, 8))
                found.append(Config(256, block_n, block_m, splits, warps, stages - (block_m == 64)))
        return list(dict.fromkeys(found))
    if m <= 256:
        splits = max(1, min(num_sms // (triton.cdiv(n, 128) * triton.cdiv(m, 128)), 4))
        return [
            Config(256, 128, 64, splits, 4, 4), Config(256, 128, 128, splits, 8, 2), Config(128, 128, 128, splits, 8, 4),
            Config(128, 64, 128, splits, 4, 4),
        ]  # fmt: skip
    return [Config(128, 128, 256, 1, 8, 3), Config(128, 128, 128, 1, 8, 4), Config(128, 64, 256, 1, 4, 3)]


def pack(codes: torch.Tensor, step: int) -> torch.Tensor:
    """Stored codes 0 to 15, uint8 [N, K], as int16 [N, K / 4]."""
    n, k = codes.shape
    if k % step:
        raise ValueError(f"K = {k}, the Triton kernel needs a multiple of {step}")
    quarters = codes.view(n, k // step, 4, step // 4)
    words = torch.zeros(n, k // step, step // 4, dtype=torch.int16, device=codes.device)
    for index in range(4):
        words |= quarters[:, :, index].to(torch.int16) << (4 * index)
    return words.view(n, k // 4)


@triton.jit
def unpacked(words):
    """Four operands of code - 8 in f16, from each 4 bits of the words; two neighbours in one register."""
    return tl.inline_asm_elementwise(
        asm="""
        {
        .reg .b32 high, low_bias, scale, high_bias;
        mov.b32 low_bias, 0x64086408;
        mov.b32 scale, 0x2c002c00;
        mov.b32 high_bias, 0xd480d480;
        shr.u32 high, $4, 8;
        lop3.b32 $0, $4, 0x000f000f, 0x64006400, 0xea;
        lop3.b32 $1, $4, 0x00f000f0, 0x64006400, 0xea;
        lop3.b32 $2, high, 0x000f000f, 0x64006400, 0xea;
        lop3.b32 $3, high, 0x00f000f0, 0x64006400, 0xea;
        sub.f16x2 $0, $0, low_bias;
        fma.rn.f16x2 $1, $1, scale, high_bias;
        sub.f16x2 $2, $2, low_bias;
        fma.rn.f16x2 $3, $3, scale, high_bias;
        }
        """,
        constraints="=&r,=&r,=&r,=&r,r",
        args=[words],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def add_quarter(total, w, x, rows_m, in_m, columns, stride):
    """total [BN, BM] plus the product of an unpacked quarter [BN, step / 4] and the activations of its columns."""
    right = tl.load(x + rows_m[None, :] * stride + columns[:, None], mask=in_m[None, :], other=0.0)
    return tl.dot(w, right, total)


@triton.jit(do_not_specialize=["m", "splits"])
def product(
    x, words, scales, y, partial, tickets, m, n, k, words_of_row, splits,
    columns_of_step: tl.constexpr, block_n: tl.constexpr, block_m: tl.constexpr, is_split: tl.constexpr,
):  # fmt: skip
    quarter: tl.constexpr = columns_of_step // 4
    groups: tl.constexpr = columns_of_step // 128
    tile_n, tile_m, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows_n = tile_n * block_n + tl.arange(0, block_n)
    rows_m = tile_m * block_m + tl.arange(0, block_m)
    in_n, in_m = rows_n < n, rows_m < m
    lanes = tl.arange(0, quarter)
    steps = k // columns_of_step
    per_split = (steps + splits - 1) // splits
    first = split * per_split
    word_at = words + rows_n[:, None] * words_of_row + lanes[None, :]
    scale_at = scales + rows_n[:, None] * (k // 128)
    total = tl.zeros([block_n, block_m], tl.float32)
    for step in range(first, min(first + per_split, steps)):
        raw = tl.load(word_at + step * quarter, mask=in_n[:, None], other=0)
        # A row's scales lie side by side, so most of these loads find them in the L1 cache: their latency is not hidden.
        scale0 = tl.load(scale_at + groups * step, mask=in_n[:, None], other=0.0)
        scale1 = tl.load(scale_at + groups * step + (groups - 1), mask=in_n[:, None], other=0.0)
        w0, w1, w2, w3 = unpacked(raw)
        columns = step * columns_of_step + lanes
        total = add_quarter(total, w0 * scale0, x, rows_m, in_m, columns, k)
        total = add_quarter(total, w1 * scale0, x, rows_m, in_m, columns + quarter, k)
        total = add_quarter(total, w2 * scale1, x, rows_m, in_m, columns + 2 * quarter, k)
        total = add_quarter(total, w3 * scale1, x, rows_m, in_m, columns + 3 * quarter, k)

    place = rows_m[None, :] * n + rows_n[:, None]
    inside = in_n[:, None] & in_m[None, :]
    if not is_split:
        tl.store(y + place, total.to(tl.float16), mask=inside)
    else:
        tl.store(partial + split * m * n + place, total, mask=inside)
        tl.debug_barrier()  # the partial sums of all threads come before the ticket
        slot = tickets + tile_m * tl.num_programs(0) + tile_n
        arrived = tl.atomic_add(slot, 1, sem="acq_rel", scope="gpu")
        if arrived == splits - 1:
            tl.debug_barrier()
            total = tl.zeros([block_n, block_m], tl.float32)
            for other in range(splits):
                total += tl.load(partial + other * m * n + place, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(y + place, total.to(tl.float16), mask=inside)
            tl.atomic_xchg(slot, 0)


@dataclass(frozen=True, eq=False)
class Weight:
    """words: int16 [N, K / 4], packed for `step`. scales: f16 [N, K / 128]."""

    step: int
    words: torch.Tensor
    scales: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.scales.nbytes

    def clone(self) -> Weight:
        return Weight(self.step, self.words.clone(), self.scales.clone())


def weight(codes: torch.Tensor, scales: torch.Tensor, step: int) -> Weight:
    """Two's complement codes -8 to 7 as uint8 [N, K], and scales [N, K / 128] that are numbers of f16."""
    return Weight(step, pack(codes ^ BIAS, step), scales.half())


def launcher(config: Config, m: int, w: Weight) -> Callable[[torch.Tensor, Weight, torch.Tensor], None]:
    """A function (x [M, K], weight, y [M, N]) that launches the kernel; it owns what the blocks exchange."""
    n, k = w.words.shape[0], 4 * w.words.shape[1]
    grid = (triton.cdiv(n, config.block_n), triton.cdiv(m, config.block_m), config.splits)
    device = w.words.device
    exchanged = (config.splits, m, n) if config.splits > 1 else (1,)
    partial = torch.empty(exchanged, dtype=torch.float32, device=device)
    tickets = torch.zeros(grid[0] * grid[1], dtype=torch.int32, device=device)

    def launch(x: torch.Tensor, w: Weight, y: torch.Tensor) -> None:
        product[grid](
            x, w.words, w.scales, y, partial, tickets, m, n, k, k // 4, config.splits,
            config.step, config.block_n, config.block_m, config.splits > 1,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    return launch
