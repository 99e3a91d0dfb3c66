"""Random programs over every instruction class, for laws of the text form: well named and scoped, but not meaningful."""

from __future__ import annotations

import random
import types
import typing
from dataclasses import fields
from typing import Any

from tilus.dtypes import DTYPES, DataType, bf16, boolean, f16, f32, int32, int64
from tilus.instructions import INSTRUCTIONS
from tilus.ir.expr import BlockId, Const, Expr, GridDim, Var, binary, cast, const, select, unary
from tilus.ir.function import Function, Param, ScalarParam, TensorParam
from tilus.ir.instruction import Instruction, is_out
from tilus.ir.stmt import Break, Continue, For, If, Inst, Return, Role, Seq, SetScalar, Stmt, While
from tilus.ir.tensor import GlobalTensor, RegisterTensor, SharedTensor
from tilus.layout import RegisterLayout, SharedLayout, column_major, local, replicated, row_major, spatial

REGISTER_LAYOUTS = (
    spatial(4, 8).local(2, 1), local(2, 1).spatial(8, 4).local(1, 2), replicated(4, 2).spatial(8, 1).local(1, 3),
    spatial(8, 4).local(1, 2).permute([1, 0]), spatial(4, 8).reshape((32,)), spatial(3).local_replicated(2),
    (spatial(2, 4) * local(4, 2) * spatial(2, 2)).reshape((16, 16)), replicated(32, 0),
)  # fmt: skip
SHARED_LAYOUTS = (
    row_major((8, 16)),
    column_major((8, 16)),
    row_major((3, 5)),
    row_major((8, 64)).swizzled(3, 3, 3),
    row_major((7,)),
)
NAMES = ("x", "acc", "x", "i", "t", "größe", "a.b", "x[0]", "range", "for", "0", "x_1", "min")


class Programs:
    """One random function; `things` are the values in scope by kind."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.tiles: list[RegisterTensor] = []
        self.scalars: list[Var] = []
        self.shared = [self.shared_tensor() for _ in range(2)]
        self.globals: list[GlobalTensor] = []

    def function(self) -> Function:
        rng = self.rng
        dims = [self.var() for _ in range(3)]
        numbers = [
            Var(f"p{i}", rng.choice([int32, f32]), lower=rng.choice([None, -3])) for i in range(rng.randrange(3))
        ]
        self.scalars = [*dims, *numbers]
        params: list[Param] = [ScalarParam(var.name, var) for var in numbers]
        for i in range(rng.randrange(1, 4)):
            name = rng.choice(["x", "weights", "for", "align"]) + str(i)
            base = Var(rng.choice([name, f"{name}_ptr", 'the "base"']), int64)
            rank = rng.randrange(3)
            sides = tuple(rng.choice([*dims, const(64), self.expr(2)]) for _ in range(2 * rank))
            shape, strides = sides[:rank], sides[rank:]
            tensor = GlobalTensor(self.dtype(), shape, strides, base, self.expr(1), rng.choice([1, 16]), name)
            params.append(TensorParam(name, tensor))
            self.globals.append(tensor)
        whole = GlobalTensor(f32, tuple(dims), tuple(dims), Var("whole", int64), name="whole")  # makes all dims known
        params.append(TensorParam("whole", whole))
        self.globals.append(whole)
        rng.shuffle(params)
        grid = tuple(self.expr(2) for _ in range(rng.randrange(1, 4)))
        first = Inst(self.instruction(INSTRUCTIONS["full"]))  # a tile that others may read
        body = Seq((first, self.block(3)))
        return Function("program", tuple(params), grid, rng.randrange(1, 9), body, None, rng.choice([1, 2]))

    def dtype(self) -> DataType:
        return DTYPES[self.rng.choice(list(DTYPES))]

    def name(self) -> str:
        return self.rng.choice(NAMES)

    def var(self, mutable: bool = False) -> Var:
        rng = self.rng
        facts = rng.choice([None, 0, -7]), rng.choice([None, 100]), rng.choice([1, 16])
        return Var(self.name(), rng.choice([int32, f32, boolean, int64]), *facts, mutable)

    def tile(self) -> RegisterTensor:
        layout = self.rng.choice([None, *REGISTER_LAYOUTS])
        shape = layout.shape if layout is not None else tuple(self.rng.choices([1, 3, 16], k=self.rng.randrange(4)))
        return RegisterTensor(self.dtype(), shape, layout, self.name(), self.rng.random() < 0.3)

    def shared_tensor(self) -> SharedTensor:
        layout = self.rng.choice([None, *SHARED_LAYOUTS])
        return SharedTensor(self.dtype(), layout.shape if layout is not None else (4, 64), layout, self.name())

    def global_tensor(self) -> GlobalTensor:
        """A parameter, or a view of one."""
        tensor = self.rng.choice(self.globals)
        while tensor.rank and self.rng.random() < 0.5:
            tensor = tensor.select(self.expr(1))
        return tensor

    # Scalars.

    def expr(self, depth: int) -> Expr:
        rng = self.rng
        if depth == 0 or rng.random() < 0.2:
            return rng.choice([self.constant(), BlockId(rng.randrange(3)), GridDim(rng.randrange(3)), *self.scalars])
        a, c = self.expr(depth - 1), self.expr(depth - 1)
        kind = rng.randrange(6)
        if kind == 0:
            return unary(rng.choice(["neg", "abs"]), a)
        if kind == 1:
            return a if isinstance(a, Const) else cast(a, rng.choice([int32, int64, f32]))
        if kind == 2:
            return select(binary("<", a, c), a, c)
        if kind == 3:
            return binary(rng.choice(["<", "<=", "==", "!=", ">", ">="]), a, c)
        if kind == 4:
            op = rng.choice(["and", "or"])
            return binary(op, binary("<", a, 3), unary("not", binary("!=", c, a)))
        # Not of two constants: whole numbers only and no division by zero would need care that is not the point here.
        op = rng.choice(["+", "-", "*", "/", "//", "%", "min", "max", "&", "|", "^", "<<", ">>"])
        return binary(op, rng.choice([BlockId(0), *self.scalars]), a if not isinstance(a, Const) else const(7))

    def constant(self) -> Const:
        return self.rng.choice(
            [
                const(3), const(-5), const(2**31), const(-(2**31)), const(-(2**31) - 1), const(4, int64), const(0.1),
                const(1e-30), const(float("inf")), const(float("-inf")), const(True), const(False), const(1.5, f16),
                const(-0.0), const(3.0, bf16), const(200, DTYPES["uint8"]),
            ]
        )  # fmt: skip

    # Statements.

    def block(self, depth: int) -> Stmt:
        stmts = [self.statement(depth) for _ in range(self.rng.randrange(5))]
        return Seq(tuple(stmts)) if self.rng.random() < 0.8 or not stmts else Seq((Seq(tuple(stmts)),))

    def statement(self, depth: int) -> Stmt:
        rng = self.rng
        kind = rng.randrange(11 if depth else 6)
        if kind == 0:
            return rng.choice([Break(), Continue(), Return()])
        if kind == 1:
            value = self.expr(3)
            mutable = [v for v in self.scalars if v.mutable]
            var = rng.choice(mutable) if mutable and rng.random() < 0.5 else self.var(rng.random() < 0.5)
            self.scalars.append(var)
            return SetScalar(var, value)
        if kind < 6:
            return Inst(self.instruction(rng.choice(list(INSTRUCTIONS.values()))))
        if kind == 6:
            start, stop, var = self.expr(2), self.expr(2), self.var()
            self.scalars.append(var)
            return For(var, start, stop, rng.choice([1, 64]), self.block(depth - 1), rng.choice([1, 4]))
        if kind == 7:
            return While(self.expr(2), self.block(depth - 1))
        if kind == 8:
            return Role(rng.randrange(9), rng.randrange(1, 5), self.block(depth - 1), rng.choice([None, 40]))
        return If(self.expr(2), self.block(depth - 1), self.block(depth - 1) if rng.random() < 0.5 else Seq(()))

    def instruction(self, cls: type[Instruction]) -> Instruction:
        hints = typing.get_type_hints(cls)
        values = {f.name: self.value(hints[f.name]) for f in fields(cls) if not is_out(f.name)}
        values |= {f.name: self.result(hints[f.name]) for f in fields(cls) if is_out(f.name)}
        return cls(**values)

    def result(self, hint: Any) -> Any:
        if hint is Var:
            self.scalars.append(self.var())
            return self.scalars[-1]
        mutable = [t for t in self.tiles if t.mutable]
        self.tiles.append(self.rng.choice(mutable) if mutable and self.rng.random() < 0.3 else self.tile())
        return self.tiles[-1]

    def value(self, hint: Any) -> Any:
        """A value for a field of this type; a new kind of field needs a case here, and perhaps in the text form."""
        rng, args = self.rng, typing.get_args(hint)
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            return self.value(rng.choice(args))
        if typing.get_origin(hint) is tuple:
            count = rng.randrange(4) if args[-1] is Ellipsis else len(args)
            return tuple(self.value(args[0] if args[-1] is Ellipsis else args[i]) for i in range(count))
        choices: dict[Any, Any] = {
            Expr: lambda: self.expr(2), RegisterTensor: lambda: rng.choice(self.tiles),
            SharedTensor: lambda: rng.choice(self.shared), GlobalTensor: self.global_tensor,
            int: lambda: rng.choice([0, 1, -1, 7]), bool: lambda: rng.random() < 0.5, type(None): lambda: None,
            str: lambda: rng.choice(["+", "max", 'a "b"\\', "ü\n"]), DataType: self.dtype,
            RegisterLayout: lambda: rng.choice(REGISTER_LAYOUTS), SharedLayout: lambda: rng.choice(SHARED_LAYOUTS),
            float: lambda: rng.choice([0.5, -1.0]),
        }  # fmt: skip
        return choices[hint]()
