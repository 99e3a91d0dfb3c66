"""Steps of a quantised linear layer on Hopper on their way through shared memory."""

from __future__ import annotations

import tilus
from tilus import uint8
from tilus.dtypes import DataType
from tilus.kernels.quantize.tiles import TILE, WHOLE
from tilus.kernels.warpgroup_operands import Shape, copy_weights, tile_nbytes
from tilus.kernels.warpgroup_plan import WarpgroupPlan


class Stages:
    """Steps on their way through shared memory, each with a barrier that says that it is there and one that it is free."""

    def __init__(self, plan: WarpgroupPlan, x, codes, wdtype: DataType, factors, shape: Shape, group):
        self.count, self.splits, self.sharing, self.group = plan.stages, plan.splits, plan.sharing, group
        self.shape = shape
        self.sources = (x, codes, factors)
        count = self.count
        self.codes = tilus.shared(uint8, [count, shape.rows, shape.depth * tile_nbytes(wdtype)])
        self.x = tilus.shared(x.dtype, [count, shape.tokens, shape.columns])
        self.factors = [
            None
            if array is None or shape.span == WHOLE
            else tilus.shared(uint8, [count, shape.rows, shape.sets * TILE * dtype.nbytes])
            for array, dtype in factors
        ]
        self.full = tilus.mbarrier(count)
        self.empty = tilus.mbarrier(count, arrivals=self.sharing)

    def fill(self, tiles, constant):
        """The producer: all steps of a block. It asks for the first weights before the kernel in front has ended."""
        row_tile, token = tiles.start(0)
        begin, end = tiles.extent(0)
        ahead = min(end - begin, self.count)
        for i in tilus.range(ahead):
            self.copy_weights(i, row_tile, begin + i)
        tilus.wait_dependencies(constant=constant)
        for i in tilus.range(ahead):
            self.copy_activations(i, token, begin + i, tiles.own)
        for index in tiles.numbers():
            row_tile, token = tiles.start(index)
            begin, end = tiles.extent(index)
            filled = tiles.before(index)
            for i in tilus.range(max(ahead - filled, 0), end - begin):
                stage = (filled + i) % self.count
                tilus.wait_barrier(self.empty[stage], ((filled + i) // self.count + 1) % 2)
                self.copy_weights(stage, row_tile, begin + i)
                self.copy_activations(stage, token, begin + i, tiles.own)

    def begin_tile(self, first):
        """Consumers: the block's steps are counted from `first` on."""
        self.first = first

    def copy_weights(self, stage, row_tile, step):
        """Ask for codes and factors, and tell the barrier how much is to come, activations included."""
        nbytes = self.codes[0].nbytes + self.x[0].nbytes
        for buffer in self.factors:
            if buffer is not None:
                nbytes = nbytes + buffer[0].nbytes
        tilus.arrive(self.full[stage], nbytes=nbytes)
        _, codes, factors = self.sources
        copy_weights(codes, factors, self.codes, self.factors, self.full, stage, row_tile, step, self.shape)

    def copy_activations(self, stage, token, step, own):
        start = [token, step * self.shape.columns]
        if self.sharing == 1:
            tilus.copy_tensor(self.x[stage], self.sources[0], start, barrier=self.full[stage])
        else:
            part = self.shape.tokens // self.sharing
            tilus.copy_tensor(
                self.x[stage], self.sources[0], [token + own * part, start[1]], shape=[part, self.shape.columns],
                dst_offsets=[own * part, 0], barrier=self.full[stage], multicast=((1 << self.sharing) - 1) << self.group,
            )  # fmt: skip

    def at(self, step):
        return (self.first + step) % self.count

    def wait(self, step):
        """The stage of a step, once it is there."""
        stage = self.at(step)
        tilus.wait_barrier(self.full[stage], (self.first + step) // self.count % 2)
        return stage

    def give_back(self, stage):
        """All blocks that bring parts of this stage may fill it again."""
        if self.sharing == 1:
            tilus.arrive(self.empty[stage])
        else:
            for block in range(self.sharing):
                tilus.arrive(self.empty[stage], block=self.group + block, reads_only=True)
