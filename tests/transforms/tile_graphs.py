"""Random programs that mean something: loads, arithmetic, products, reductions, loop variables, and pins in odd places.

All values are small integers, so that results are the same in every order of evaluation.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np

from tilus.dtypes import DataType, f16, f32, int32, uint4
from tilus.errors import Loc
from tilus.instructions.cast import cast
from tilus.instructions.convert import with_layout
from tilus.instructions.elementwise import BinaryTile
from tilus.instructions.fill import full
from tilus.instructions.memory import load, store
from tilus.instructions.mma import dot
from tilus.instructions.reduce import max, sum
from tilus.instructions.view import Assign, reshape, transpose
from tilus.ir.builder import IRBuilder
from tilus.ir.expr import Var, as_expr
from tilus.ir.stmt import For
from tilus.ir.tensor import GlobalTensor, RegisterTensor
from tilus.ir.visit import seq
from tilus.layout import Digit, RegisterLayout, auto

SIDE = 32
BOUND = 8  # values of tiles, so that products of rows stay exact in f16 and f32
STORES = 4  # each to tensors of its own: threads do not wait for each other between them
DTYPES = {"a": f16, "c": f32, "w": uint4}
DTYPES |= {f"{name}{i}": dtype for i in range(STORES) for name, dtype in (("out", f32), ("codes", uint4))}


@dataclass
class Graph:
    """Emits a program over the tensors of `DTYPES`, each [SIDE, SIDE]; every line of the source is one call."""

    rng: random.Random
    num_warps: int
    pins: float
    line: int = 0
    tiles: list[RegisterTensor] = field(default_factory=list[RegisterTensor])

    def build(self, b: IRBuilder, **tensors: GlobalTensor) -> None:
        inputs = [tensors[name] for name in ("a", "c", "w")]
        self.tiles = []
        for _ in range(self.rng.randrange(2, 5)):
            self.tiles.append(self.load(b, self.rng.choice(inputs)))
        for _ in range(self.rng.randrange(3, 8)):
            self.tiles.append(self.step(b, inputs))
        if self.rng.random() < 0.7:
            self.tiles.append(self.loop(b, inputs))
        for i, tile in enumerate((self.tiles[-1], *self.rng.sample(self.tiles, STORES - 1))):
            self.store(b, tensors[f"out{i}"], tensors[f"codes{i}"], tile)

    def at(self, b: IRBuilder) -> None:
        self.line += 1
        b.loc = Loc("program", self.line)

    def pin(self, shape: tuple[int, ...]) -> RegisterLayout | None:
        return random_layout(self.rng, shape, 32 * self.num_warps) if self.rng.random() < self.pins else None

    def load(self, b: IRBuilder, tensor: GlobalTensor) -> RegisterTensor:
        self.at(b)
        dims = self.rng.choice([(0, 1), (1, 0)])
        start = self.rng.choice([0, 0, 8])  # the rest of the tile reads as zeros
        return load.build(b, tensor, [0, start], shape=(SIDE, SIDE), dims=dims, layout=self.pin((SIDE, SIDE)))

    def step(self, b: IRBuilder, inputs: list[GlobalTensor]) -> RegisterTensor:
        kind = self.rng.randrange(7)
        self.at(b)
        if kind == 0:
            return self.load(b, self.rng.choice(inputs))
        if kind == 1:
            tile = self.rng.choice(self.tiles)
            return with_layout.build(b, tile, random_layout(self.rng, tile.shape, 32 * self.num_warps))
        if kind == 2:
            tile = self.rng.choice(self.tiles)
            split = reshape.build(b, tile, (4, tile.size // 32, 8) if tile.size >= 32 else (1, tile.size, 1))
            return reshape.build(b, transpose.build(b, split, self.rng.sample(range(3), 3)), tile.shape)
        if kind == 3:
            tile = self.number(b, self.rng.choice([f16, f32]))
            reduced = self.rng.choice([sum, max]).build(b, tile, self.rng.randrange(2), keepdims=True)
            return self.clipped(b, reduced)
        if kind == 4:
            a, c = self.square(b, f16), self.square(b, f16)
            return self.clipped(b, dot.build(b, a, c))
        return self.binary(b, self.rng.choice([f16, f32]))

    def binary(self, b: IRBuilder, dtype: DataType) -> RegisterTensor:
        lhs, rhs = self.number(b, dtype), self.number(b, dtype)
        shape = np.broadcast_shapes(lhs.shape, rhs.shape)
        return self.clipped(b, b.emit(BinaryTile(b.tile(dtype, shape), self.rng.choice("+-*"), lhs, rhs)).out)

    def number(self, b: IRBuilder, dtype: DataType) -> RegisterTensor:
        """Some tile as a float type."""
        tile = cast.build(b, self.rng.choice(self.tiles), dtype)
        assert isinstance(tile, RegisterTensor)
        return tile

    def square(self, b: IRBuilder, dtype: DataType) -> RegisterTensor:
        tile = self.number(b, dtype)
        if tile.shape == (SIDE, SIDE):
            return tile
        zeros = full.build(b, (SIDE, SIDE), 0.0, dtype)
        return b.emit(BinaryTile(b.tile(dtype, (SIDE, SIDE)), "+", zeros, tile)).out

    def clipped(self, b: IRBuilder, tile: RegisterTensor) -> RegisterTensor:
        for op, bound in (("min", BOUND), ("max", -BOUND)):
            limit = full.build(b, (1, 1), float(bound), tile.dtype)
            tile = b.emit(BinaryTile(b.tile(tile.dtype, tile.shape), op, tile, limit)).out
        return tile

    def loop(self, b: IRBuilder, inputs: list[GlobalTensor]) -> RegisterTensor:
        """Two trips that change a variable, which may be pinned by its first value and by what it is assigned."""
        self.at(b)
        start = self.square(b, f32)
        if (layout := self.pin(start.shape)) is not None:
            start = with_layout.build(b, start, layout)
        variable = b.tile(f32, start.shape, start.layout, "variable", mutable=True)
        b.emit(Assign(variable, start))
        outside = list(self.tiles)
        with b.block() as body:
            self.tiles.append(variable)
            for _ in range(self.rng.randrange(1, 4)):
                self.tiles.append(self.step(b, inputs))
            self.at(b)
            value = self.square(b, f32)
            product = dot.build(b, self.square(b, f16), self.square(b, f16), variable)
            value = self.clipped(b, product if self.rng.random() < 0.5 else value)
            if (layout := self.pin(value.shape)) is not None:
                self.at(b)
                value = with_layout.build(b, value, layout)
            self.at(b)
            b.emit(Assign(variable, value))
        b.append(For(Var("trip", int32), as_expr(0), as_expr(2), 1, seq(*body)))
        self.tiles = outside  # what the body defines is not known behind the loop
        return variable

    def store(self, b: IRBuilder, out: GlobalTensor, codes: GlobalTensor, tile: RegisterTensor) -> None:
        self.at(b)
        if tile.dtype == uint4:
            store.build(b, codes, [0, 0], tile, dims=self.rng.choice([(0, 1), (1, 0)]))
            return
        value = cast.build(b, tile, f32)
        assert isinstance(value, RegisterTensor)
        store.build(b, out, [0, 0], value)


def random_layout(rng: random.Random, shape: tuple[int, ...], num_threads: int) -> RegisterLayout:
    """Powers of two only: each bit of the tile's index goes to the thread or to the slot; spare threads replicate."""
    if rng.random() < 0.4:
        return auto(shape, num_threads, rng.choice([1, 2, 8]), rng.sample(range(len(shape)), len(shape)))
    bits = [Digit(2, d, 1 << i) for d, n in enumerate(shape) for i in range(n.bit_length() - 1)]
    rng.shuffle(bits)
    lanes = num_threads.bit_length() - 1
    threads = bits[:lanes] + [Digit(2, None, 0)] * (lanes - len(bits[:lanes]))
    rng.shuffle(threads)
    return RegisterLayout(shape, tuple(threads), tuple(bits[lanes:]))
