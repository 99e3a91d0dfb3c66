"""Random kernels over the hazards of C that is written late: tiles are expressions over memory that may change meanwhile.

Text in the language, over tiles of small integers, so that every order of evaluation gives the same numbers.
"""

from __future__ import annotations

import random

SIDE, BLOCKS = 16, 2
VARIABLES = ("a", "b", "c")
FRAME = """
@tilus.kernel
def program(
    x: tilus.Tensor[tilus.int32, 3, 24, 24], y: tilus.Tensor[tilus.int32, 2, 16, 16],
    counts: tilus.Tensor[tilus.int32, 20, 20], out: tilus.Tensor[tilus.int32, 2, 3, 16, 16],
):
    tilus.grid(2, warps=2)
    i = tilus.block_id(0)
    mine, memory = y[i], tilus.shared(tilus.int32, [16, 16])
    acc = tilus.zeros([16, 16])
    a = tilus.load(x, [0, i, 0], [16, 16])
    b = tilus.load(x, [1, 0, 12], [16, 16], dims=[2, 1])
    c = tilus.arange(16, shape=[16, 16], axis=1) + i
    tilus.store_shared(memory, c)
    tilus.sync()
{body}
    for index, tile in enumerate((a, b, c)):
        tilus.store(out, [i, index, 0, 0], tile)
"""


class Program:
    """Writes one kernel. `names` are the tiles in scope, `trip` the counters of the loops around."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.fresh = 0

    def text(self) -> str:
        return FRAME.format(body="\n".join("    " + line for line in self.block(3, [*VARIABLES], ["i"], False)))

    def block(self, depth: int, names: list[str], trips: list[str], loop: bool) -> list[str]:
        """Names that it defines end with it."""
        names = list(names)
        lines: list[str] = []
        for _ in range(self.rng.randrange(2, 5)):
            lines += self.statement(depth, names, trips, loop)
        return lines

    def statement(self, depth: int, names: list[str], trips: list[str], loop: bool) -> list[str]:
        rng = self.rng
        u, v = rng.sample(VARIABLES, 2)
        kind = rng.randrange(14 if depth else 10)
        if kind < 2:
            return [f"{u} = {self.tile(2, names, trips)}"]
        if kind == 2:
            return rng.choice([[f"{u}, {v} = {v}, {u}"], [f"{u}, {v} = {v}.T, {u}"], [f"{u} = {u}.T"]])
        if kind < 6:  # a tile that is read behind the assignment to, or the overwriting of, what it was made of
            nested = depth and rng.random() < 0.5
            change = self.nested(depth, names, trips, loop) if nested else self.overwritten(names, trips)
            return self.kept(names, trips, change)
        if kind == 6:
            return [f"acc = tilus.dot({self.operands(self.tile(1, names, trips), v)}, acc)"]
        if kind == 7:
            return [f"tilus.atomic_add(counts, [{self.number(trips)}, 6], {self.tile(1, names, trips)})"]
        if kind < 10:
            leave = rng.choice(["break", "continue"]) if loop else "return" if rng.random() < 0.1 else "pass"
            return [f"if {self.condition(trips)}:", f"    {leave}"]
        return self.nested(depth, names, trips, loop)

    def nested(self, depth: int, names: list[str], trips: list[str], loop: bool) -> list[str]:
        if self.rng.random() < 0.3:
            lines = [f"if {self.condition(trips)}:", *self.inner(depth, names, trips, loop)]
            return lines + (["else:", *self.inner(depth, names, trips, loop)] if self.rng.random() < 0.5 else [])
        trip = f"k{depth}"
        header = f"for {trip} in tilus.range({self.rng.choice(['3', 'i + 1', 'i, 3'])}):"
        return [header, *self.inner(depth, names, [*trips, trip], True)]

    def inner(self, depth: int, names: list[str], trips: list[str], loop: bool) -> list[str]:
        return ["    " + line for line in self.block(depth - 1, names, trips, loop)]

    def kept(self, names: list[str], trips: list[str], change: list[str]) -> list[str]:
        self.fresh += 1
        name = f"t{self.fresh}"
        lines = [f"{name} = {self.tile(2, names, trips)}", *change]
        names.append(name)
        target = self.rng.choice(VARIABLES)
        return lines + [f"{target} = ({name} + {self.tile(1, names, trips)}) % 97"]

    def overwritten(self, names: list[str], trips: list[str]) -> list[str]:
        tile = self.tile(1, names, trips)
        kind = self.rng.randrange(3)
        if kind == 0:
            return [f"{self.rng.choice(VARIABLES)} = {tile}"]
        if kind == 1:
            return ["tilus.sync()", f"tilus.store_shared(memory, {tile})", "tilus.sync()"]
        return ["tilus.sync()", f"tilus.store(mine, [{self.number(trips)}, 0], {tile})", "tilus.sync()"]

    def number(self, trips: list[str]) -> str:
        return f"{self.rng.choice(trips)} % 3" if self.rng.random() < 0.5 else str(self.rng.randrange(3))

    def condition(self, trips: list[str]) -> str:
        return f"({' + '.join(trips)}) % 3 {self.rng.choice(['==', '!=', '<'])} {self.rng.randrange(3)}"

    def operands(self, p: str, q: str) -> str:
        """Of a product of small numbers; one of them is constant at times."""
        both = [f"tilus.cast({t} % 5, tilus.f16)" for t in (p, q)]
        if self.rng.random() < 0.3:
            both[self.rng.randrange(2)] = "tilus.full([16, 16], 2, tilus.f16)"
        return ", ".join(both)

    def tile(self, depth: int, names: list[str], trips: list[str]) -> str:
        """An expression of shape [16, 16] and values 0 to 96."""
        rng, number = self.rng, self.number(trips)
        if depth == 0 or rng.random() < 0.1:
            return rng.choice([*names, *names, f"{rng.choice(names)}.T", "tilus.load_shared(memory)"])
        p, q = (self.tile(depth - 1, names, trips) for _ in range(2))
        axis = rng.randrange(2)
        row = f"tilus.max({p}, axis={axis}, keepdims=True)"
        wide = f"tilus.broadcast({row}, [16, 16])"
        return rng.choice([
            f"(({p} {rng.choice('+*')} {q}) % 97)", f"(({p} + {number}) % 97)", f"(({row} + {q}) % 97)",
            f"tilus.where({p} > {q}, {q}, {p}.T)", f"{wide}.reshape([4, 64]).reshape([16, 16])",
            f"tilus.transpose(tilus.reshape({p}, [4, 4, 16]), {rng.sample(range(3), 3)}).reshape([16, 16])",
            f"((tilus.sum({wide}, axis={axis}, keepdims=True) + tilus.sum({wide}, axis={1 - axis}, keepdims=True)) % 97)",
            f"((tilus.select({p}, {axis}, {rng.randrange(16)})[:, None] + {q}) % 97)",
            f"(tilus.cumsum({p}, axis={axis}) % 97)",
            f"(tilus.cast(tilus.dot({self.operands(p, q)}), tilus.int32) % 97)",
            f"tilus.cast(tilus.cast({p} % 16, tilus.uint4), tilus.int32)",
            f"tilus.load(x, [{number}, {number}, 4], [16, 16], dims={rng.choice([[1, 2], [2, 1]])})",
            f"tilus.load(mine, [{number}, 0], [16, 16], dims={rng.choice([[0, 1], [1, 0]])})",
            f"tilus.gather(x, [{number}, 0, {number}], tilus.select({p}, {axis}, 3) % 24, [16, 16])",
            "(tilus.cast(acc, tilus.int32) % 97)",
        ])  # fmt: skip
