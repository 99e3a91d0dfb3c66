"""Tiles and scalars from and to global memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tilus.codegen.access import MAX_VECTOR_NBITS, global_vector_size, unit_nbits, vectors
from tilus.codegen.c.context import CContext
from tilus.codegen.c.memory import Access, borrowed, load_into, store_from
from tilus.codegen.c.tile import Array, plain
from tilus.codegen.context import EmitContext
from tilus.codegen.linear import Linear, of_const
from tilus.dtypes import DataType, boolean
from tilus.errors import TilusError
from tilus.instructions.eviction import cache_hint, check_eviction, policy
from tilus.ir.builder import IRBuilder, builtin
from tilus.ir.evaluation import Evaluation
from tilus.ir.expr import Const, Expr, Var, as_expr
from tilus.ir.instruction import Effects, Instruction
from tilus.ir.layout_rules import Access as AccessRule
from tilus.ir.layout_rules import LayoutPriority, LayoutRule
from tilus.ir.tensor import GlobalTensor, RegisterTensor, SharedTensor
from tilus.layout import RegisterLayout, auto
from tilus.ptx.module import Address, Imm, Operand, Reg, RegClass, Vector


def check_access(
    what: str, tensor: GlobalTensor, offsets: Sequence[Expr], shape: Sequence[int], dims: Sequence[int]
) -> None:
    """Raise unless a tile of `shape` along `dims` at `offsets` makes sense for the tensor's rank."""
    if len(offsets) != tensor.rank:
        raise TilusError(
            f"{what}: {len(offsets)} offsets for {tensor.name}, which has rank {tensor.rank}",
            hint="give one offset for each dim of the tensor, also where the tile has fewer axes",
        )
    if len(shape) != len(dims):
        raise TilusError(f"{what}: tile of shape {list(shape)} along {len(dims)} dims {list(dims)}")
    if len(set(dims)) != len(dims) or not all(0 <= d < tensor.rank for d in dims):
        raise TilusError(
            f"{what}: dims {list(dims)} of {tensor.name}, which has rank {tensor.rank}; expected distinct dims"
        )


@dataclass(frozen=True, eq=False)
class LoadGlobal(Instruction):
    """A tile of a global tensor. Tile axis a runs along tensor dim `dims[a]`; elements outside of the tensor read as zero.

    checked: whether the bounds are tested; without, the program promises that the tile lies inside. evict: what the L2 cache
    drops `first` (and the L1 cache does not keep) or `last`; None leaves it to the caches.
    """

    mnemonic = "load"
    layout_priority = LayoutPriority.LOAD

    out: RegisterTensor
    src: GlobalTensor
    offsets: tuple[Expr, ...]
    dims: tuple[int, ...]
    checked: bool = True
    evict: str | None = None

    def effects(self) -> Effects:
        return Effects(reads=(self.src,))

    def verify(self) -> None:
        check_access("load", self.src, self.offsets, self.out.shape, self.dims)
        check_eviction("load", self.evict)
        if self.out.dtype != self.src.dtype:
            raise TilusError(f"load: tile of {self.out.dtype.name} from {self.src.name} of {self.src.dtype.name}")

    def layout_rule(self, num_threads: int) -> LayoutRule:
        return global_access(self.src, self.out, self.offsets, self.dims, self.checked, num_threads, loads=True)

    def evaluate(self, env: Evaluation) -> None:
        env.set_tile(self.out, env.load(self.src, self.offsets, self.out.shape, self.dims, checked=self.checked))

    def emit(self, ctx: EmitContext) -> None:
        layout = ctx.layout(self.out)
        size = global_vector_size(self.src, layout, self.offsets, self.dims, self.checked)
        check_whole_bytes("load", self.src, size)
        opcode = f"ld.global{'.nc' if self.src.base in ctx.read_only else ''}"
        opcode += ".L1::no_allocate" if self.evict == "first" else ""
        opcode += cache_hint(self.evict)
        pieces: list[Reg] = []
        starts = tile_index(ctx, layout, self.offsets, self.dims)
        for vector in vectors(layout, size):
            index = starts(vector.slot)
            guard = None
            if self.checked:
                guard = ctx.in_bounds(self.src, self.offsets, self.dims, self.out.shape, index)
            address = ctx.global_address(self.src, index)
            pieces += load_vector(ctx, opcode, self.src.dtype, size, address, guard, policy(ctx, self.evict))
        ctx.note(self, f"load {self.src.name}: {vectors_note(self.src.dtype, size, layout.num_locals)}")
        ctx.define(self.out, assemble(ctx, self.src.dtype, size, pieces))

    def emit_c(self, ctx: CContext) -> None:
        access = Access(ctx, self.src, self.offsets, self.out.shape, self.dims)
        name = borrowed(access, self.checked)
        if name is None:
            name = ctx.array(self.src.dtype, self.out.size, self.out.name).name
            load_into(access, name, "0", self.checked, self.out.size)
        ctx.define(self.out, plain(self.out.dtype, self.out.shape, Array(name), access.layout))


@dataclass(frozen=True, eq=False)
class StoreGlobal(Instruction):
    """Write a tile to a global tensor; elements outside of the tensor are dropped (when `checked`)."""

    mnemonic = "store"
    layout_priority = LayoutPriority.STORE

    dst: GlobalTensor
    src: RegisterTensor
    offsets: tuple[Expr, ...]
    dims: tuple[int, ...]
    checked: bool = True

    def effects(self) -> Effects:
        return Effects(writes=(self.dst,))

    def verify(self) -> None:
        check_access("store", self.dst, self.offsets, self.src.shape, self.dims)
        if self.src.dtype != self.dst.dtype:
            raise TilusError(
                f"store: tile of {self.src.dtype.name} to {self.dst.name} of {self.dst.dtype.name}",
                hint=f"cast it: tilus.cast(tile, {self.dst.dtype.name})",
            )

    def layout_rule(self, num_threads: int) -> LayoutRule:
        return global_access(self.dst, self.src, self.offsets, self.dims, self.checked, num_threads)

    def evaluate(self, env: Evaluation) -> None:
        env.store(self.dst, self.offsets, self.dims, env.tile(self.src), checked=self.checked)

    def emit(self, ctx: EmitContext) -> None:
        layout = ctx.layout(self.src)
        size = global_vector_size(self.dst, layout, self.offsets, self.dims, self.checked)
        check_whole_bytes("store", self.dst, size)
        starts = tile_index(ctx, layout, self.offsets, self.dims)
        owner = ctx.first_replica(layout)
        words = ctx.words(self.src)
        for vector in vectors(layout, size):
            index = starts(vector.slot)
            inside = None
            if self.checked:
                inside = ctx.in_bounds(self.dst, self.offsets, self.dims, self.src.shape, index)
            address = ctx.global_address(self.dst, index)
            store_vector(ctx, "st.global", self.dst.dtype, vector.slot, size, address, words, ctx.both(owner, inside))
        ctx.note(self, f"store {self.dst.name}: {vectors_note(self.dst.dtype, size, layout.num_locals)}")

    def emit_c(self, ctx: CContext) -> None:
        access = Access(ctx, self.dst, self.offsets, self.src.shape, self.dims)
        tile = replace(ctx.read(self.src), unrounded=False)  # codes are rounded when they are made
        leaf = tile.array
        if leaf is None or leaf.layout != access.layout:
            leaf = ctx.computed(tile, self.src.name, access.layout).leaves[0]
        store_from(access, leaf.name, "0", self.checked)


@dataclass(frozen=True, eq=False)
class LoadScalar(Instruction):
    """One element of a global tensor as a scalar of the block; the index must lie inside of the tensor."""

    mnemonic = "load_scalar"

    out: Var
    src: GlobalTensor
    index: tuple[Expr, ...]

    def effects(self) -> Effects:
        return Effects(reads=(self.src,))

    def verify(self) -> None:
        if len(self.index) != self.src.rank:
            raise TilusError(f"{len(self.index)} indices for {self.src.name}, which has rank {self.src.rank}")
        if self.src.dtype.name not in ("int32", "f32"):
            raise TilusError(
                f"scalar load from {self.src.name} of {self.src.dtype.name}, expected int32 or f32",
                hint="load a tile of shape [1] instead",
            )

    def evaluate(self, env: Evaluation) -> None:
        value = env.load(self.src, self.index, (), (), checked=False)
        env.set_scalar(self.out, value)

    def emit(self, ctx: EmitContext) -> None:
        index = [ctx.scalars.linear(e) for e in self.index]
        cache = ".nc" if self.src.base in ctx.read_only else ""
        address = ctx.global_address(self.src, index)
        ctx.scalars.variables[self.out] = ctx.b.emit(f"ld.global{cache}.b32", address)

    def emit_c(self, ctx: CContext) -> None:
        access = Access(ctx, self.src, self.index, (), ())
        ctx.define_scalar(self.out, f"{access.pointer}[{access.start}]")


def global_access(
    tensor: GlobalTensor, tile: RegisterTensor, offsets: Sequence[Expr], dims: Sequence[int], checked: bool,
    num_threads: int, *, loads: bool = False,
) -> LayoutRule:  # fmt: skip
    """The layouts in which a tile meets global memory."""

    @functools.cache
    def access_nbits(layout: RegisterLayout) -> int:
        return global_vector_size(tensor, layout, offsets, dims, checked) * tensor.dtype.nbits

    return AccessRule(tile, coalesced(tensor, tile.shape, dims, num_threads), access_nbits, loads)


def coalesced(tensor: GlobalTensor, shape: tuple[int, ...], dims: Sequence[int], num_threads: int) -> RegisterLayout:
    """The layout in which neighbouring threads move neighbouring 16-byte vectors of a tile."""
    strides = [tensor.strides[d] for d in dims]
    inner = next((a for a, s in enumerate(strides) if isinstance(s, Const) and s.value == 1), len(shape) - 1)
    order = (inner, *(a for a in reversed(range(len(shape))) if a != inner)) if shape else ()
    whole_bytes = 8 // math.gcd(8, tensor.dtype.nbits)
    per_thread = max(1, math.prod(shape) // num_threads)
    widest = max(whole_bytes, 1 << (per_thread.bit_length() - 1))
    unit = tensor.dtype.nbits & -tensor.dtype.nbits  # 16 elements of 6 bits move in units of 4 bytes
    return auto(shape, num_threads, min(MAX_VECTOR_NBITS // unit, widest), order)


def tile_index(
    ctx: EmitContext, layout: RegisterLayout, offsets: Sequence[Expr], dims: Sequence[int]
) -> Callable[[int], list[Linear]]:
    """A function slot -> index into the tensor (one linear form per dim) of the thread's element in that slot."""
    base = [ctx.scalars.linear(e) for e in offsets]
    for axis, part in enumerate(ctx.thread_index(layout)):
        base[dims[axis]] = base[dims[axis]] + part

    def at(slot: int) -> list[Linear]:
        index = list(base)
        for axis, part in enumerate(ctx.local_index(layout, slot)):
            index[dims[axis]] = index[dims[axis]] + of_const(part)
        return index

    return at


def check_whole_bytes(what: str, tensor: GlobalTensor | SharedTensor, size: int) -> None:
    """Raise unless accesses of `size` elements are whole bytes; inference gives such layouts wherever they exist."""
    if size * tensor.dtype.nbits % 8:
        whole = 8 // math.gcd(8, tensor.dtype.nbits)
        raise TilusError(
            f"{what}: threads hold runs of {size} elements of {tensor.dtype.name} of {tensor.name}, "
            f"which is {size * tensor.dtype.nbits} bits; memory is accessed in whole bytes",
            hint=f"use multiples of {whole} for the contiguous dim of tile, offset and tensor, a layout with longer runs, "
            "or tilus.view of bytes",
        )


def load_vector(
    ctx: EmitContext, opcode: str, dtype: DataType, size: int, address: Address, guard: Reg | None,
    tail: Sequence[Operand] = (),
) -> list[Reg]:  # fmt: skip
    """`size` consecutive elements; 32-bit registers (64-bit for 64-bit types), those of units below 32 bits zero-extended.

    A guarded access leaves zeros where it does not read. tail: operands behind the address.
    """
    unit, word = unit_nbits(dtype, size), 64 if dtype.nbits == 64 else 32
    return [
        reg
        for nbits in range(0, size * dtype.nbits, unit)
        for reg in _load_unit(ctx, opcode, unit, word, (offset_by(address, nbits // 8), *tail), guard)
    ]


def _load_unit(
    ctx: EmitContext, opcode: str, nbits: int, word_nbits: int, srcs: Sequence[Operand], guard: Reg | None
) -> list[Reg]:
    b = ctx.b
    if nbits < 32:
        narrow = b.reg(RegClass.B16)
        if guard is not None:
            b.mov(narrow, Imm(0))
        b.emit_to(f"{opcode}.{'u8' if nbits == 8 else 'u16'}", narrow, *srcs, guard=ctx.guard(guard))
        return [b.emit("cvt.u32.u16", narrow)]
    count = nbits // word_nbits
    regs = [b.reg(RegClass.B64 if word_nbits == 64 else RegClass.B32) for _ in range(count)]
    if guard is not None:
        for reg in regs:
            b.mov(reg, Imm(0))
    dst = regs[0] if count == 1 else Vector(tuple(regs))
    vec = "" if count == 1 else f".v{count}"
    b.emit_to(f"{opcode}{vec}.b{word_nbits}", dst, *srcs, guard=ctx.guard(guard))
    return regs


def assemble(ctx: EmitContext, dtype: DataType, size: int, pieces: Sequence[Reg]) -> list[Reg]:
    """A tile's words from the results of `load_vector` in slot order."""
    if dtype == boolean:
        return [ctx.b.emit("setp.ne.u32", piece, Imm(0)) for piece in pieces]
    nbits = unit_nbits(dtype, size)
    if nbits >= 32:
        return list(pieces)
    if nbits == 16:
        return [_pair(ctx, pieces[i : i + 2]) for i in range(0, len(pieces), 2)]
    return ctx.pack(nbits, pieces)


def offset_by(address: Address, nbytes: int) -> Address:
    return Address(address.base, address.offset + nbytes)


def _pair(ctx: EmitContext, halves: Sequence[Reg]) -> Reg:
    if len(halves) == 1:
        return halves[0]
    return ctx.b.emit("prmt.b32", halves[0], halves[1], Imm(0x5410))


def store_vector(
    ctx: EmitContext, opcode: str, dtype: DataType, slot: int, size: int, address: Address, words: Sequence[Reg],
    guard: Reg | None,
) -> None:  # fmt: skip
    """Write slots `slot .. slot + size` of a tile to consecutive elements."""
    b, unit, at = ctx.b, unit_nbits(dtype, size), ctx.guard(guard)
    if dtype == boolean:
        byte = b.emit("selp.b32", Imm(1), Imm(0), words[slot])
        b.emit_to(f"{opcode}.u8", address, b.emit("cvt.u16.u32", byte), guard=at)
        return
    word_nbits = 64 if dtype.nbits == 64 else 32
    count = unit // word_nbits
    for nbits in range(0, size * dtype.nbits, unit):
        place, first = offset_by(address, nbits // 8), slot * dtype.nbits + nbits
        if unit < 32:
            code = b.emit("cvt.u16.u32", ctx.extract(unit, words, first // unit))
            b.emit_to(f"{opcode}.{'u8' if unit == 8 else 'u16'}", place, code, guard=at)
        else:
            src = tuple(words[first // word_nbits : first // word_nbits + count])
            vec = "" if count == 1 else f".v{count}"
            b.emit_to(f"{opcode}{vec}.b{word_nbits}", place, src[0] if count == 1 else Vector(src), guard=at)


def vectors_note(dtype: DataType, size: int, num_locals: int) -> str:
    """The line of the report that says how many accesses of how many bits there are."""
    unit = unit_nbits(dtype, size)
    return f"{num_locals * dtype.nbits // unit} x {unit} bits per thread"


@builtin
def load(
    b: IRBuilder, src: GlobalTensor, offsets: Sequence[Expr | int], shape: Sequence[int], *,
    dims: Sequence[int] | None = None, layout: RegisterLayout | None = None, checked: bool = True,
    evict: str | None = None,
) -> RegisterTensor:  # fmt: skip
    """The tile of `shape` that starts at `offsets` of a global tensor; elements outside of the tensor read as zero.

    dims: the tensor dims that the tile's axes run along, by default the last ones. layout: pins the tile's layout.
    checked=False drops the bounds tests: the tile must then lie inside of the tensor. evict: "first" for what is read once and
    should not push other data out of the caches, "last" for what the L2 cache shall keep.
    """
    shape = tuple(shape)
    axes = tuple(range(src.rank - len(shape), src.rank)) if dims is None else tuple(dims)
    out = b.tile(src.dtype, shape, layout, src.name.split("[")[0])
    return b.emit(LoadGlobal(out, src, tuple(as_expr(o) for o in offsets), axes, checked, evict)).out


@builtin
def store(
    b: IRBuilder, dst: GlobalTensor, offsets: Sequence[Expr | int], value: RegisterTensor, *,
    dims: Sequence[int] | None = None, checked: bool = True,
) -> None:  # fmt: skip
    """Write a tile to a global tensor at `offsets`; elements outside of the tensor are not written."""
    axes = tuple(range(dst.rank - value.rank, dst.rank)) if dims is None else tuple(dims)
    b.emit(StoreGlobal(dst, value, tuple(as_expr(o) for o in offsets), axes, checked))


@builtin
def load_scalar(b: IRBuilder, src: GlobalTensor, *index: Expr | int) -> Var:
    """One int32 or f32 element as a scalar; `x[i, j]` is the same. The index must lie inside of the tensor."""
    out = Var(b.fresh(f"{src.name.split('[')[0]}_value"), src.dtype)
    b.emit(LoadScalar(out, src, tuple(as_expr(i) for i in index)))
    return out


@builtin
def narrow(b: IRBuilder, x: GlobalTensor, dim: int, start: Expr | int, length: Expr | int) -> GlobalTensor:
    """The part of a global tensor from index `start` of `dim` on that is `length` long; nothing is loaded yet.

    Tiles that reach beyond it read zeros and are not written there. The part must lie inside of `x`; `x[start:stop]` is the
    same for bounds that may lie outside, which are cut as Python does. Both may be run-time values: rows of one sequence of a
    ragged batch are `narrow(x, 0, first, count)`.
    """
    if not -x.rank <= dim < x.rank:
        raise TilusError(f"narrow: dim {dim} of {x.name}, which has rank {x.rank}")
    first, count = as_expr(start), as_expr(length)
    if not (first.dtype.is_integer and count.dtype.is_integer):
        raise TilusError(f"narrow: start of {first.dtype.name} and length of {count.dtype.name}, expected integers")
    return x.narrow(dim % x.rank, first, count)
