"""Codes in packed order (docs/casts.md): a thread's bits are permuted so that casts find their fields in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tilus.codegen.c.codes import Codes
from tilus.codegen.c.context import CContext
from tilus.codegen.c.numbers import converted
from tilus.codegen.c.threads import from_threads, pack, thread_bytes
from tilus.codegen.c.tile import plain
from tilus.codegen.cast_plan import plan_unpack, scale_exponent
from tilus.codegen.code_order import CodeOrder
from tilus.codegen.context import EmitContext
from tilus.codegen.lanes import emit_permutation
from tilus.codegen.packed_order import packed_order
from tilus.dtypes import DataType, bf16, f16, pack_bits, unpack_bits
from tilus.errors import TilusError
from tilus.instructions.cast import cast_tile, convert_values
from tilus.ir.builder import IRBuilder, builtin
from tilus.ir.evaluation import Array, Evaluation
from tilus.ir.instruction import Instruction
from tilus.ir.tensor import RegisterTensor
from tilus.layout import RegisterLayout, row_major


@dataclass(frozen=True, eq=False)
class PackCodes(Instruction):
    """Each thread's codes, in the order of its slots, as the bytes of their packed order. Both tiles have pinned layouts."""

    mnemonic = "pack_codes"

    out: RegisterTensor
    src: RegisterTensor
    packed_as: DataType
    packed_for: DataType

    @property
    def order(self) -> CodeOrder:
        return CodeOrder(self.src.dtype, packed_order(self.packed_as, self.packed_for).bits)

    def verify(self) -> None:
        _check("pack_codes", self.src, self.out, self.src.dtype, self.packed_as, self.packed_for)

    def evaluate(self, env: Evaluation) -> None:
        data = self.order.pack(_by_thread(env.tile(self.src), self.src))
        codes = unpack_bits(data, self.out.dtype, data.shape[-1] * 8 // self.out.dtype.nbits)
        env.set_tile(self.out, self.out.dtype.decode(_from_threads(codes, self.out)))

    def emit(self, ctx: EmitContext) -> None:
        ctx.define(self.out, emit_permutation(ctx.b, ctx.words(self.src), self.order.bits))

    def emit_c(self, ctx: CContext) -> None:
        if self.src.layout is None or self.out.layout is None:
            raise ValueError("packed codes without layouts passed the verifier")
        ctx.define(
            self.out, pack(ctx, ctx.read(self.src), self.src.layout, self.order, self.out.dtype, self.out.layout)
        )


@dataclass(frozen=True, eq=False)
class UnpackCodes(Instruction):
    """The inverse of `pack_codes`, joined with a cast: `out = cast(codes)`, times 2^-residual when `scaled`.

    Both tiles have pinned layouts. The residual is that of the plan (`scale_exponent`).
    """

    mnemonic = "unpack_codes"

    out: RegisterTensor
    src: RegisterTensor
    code: DataType
    packed_as: DataType
    packed_for: DataType
    scaled: bool

    @property
    def order(self) -> CodeOrder:
        return CodeOrder(self.code, packed_order(self.packed_as, self.packed_for).bits)

    def verify(self) -> None:
        _check("unpack_codes", self.out, self.src, self.code, self.packed_as, self.packed_for)
        if self.scaled and self.out.dtype not in (f16, bf16):
            raise TilusError(
                f"unpack_codes to {self.out.dtype} with scaled=True, expected f16 or bf16",
                hint="leave scaled away: the cast is then exact by itself",
            )

    def evaluate(self, env: Evaluation) -> None:
        data = pack_bits(_by_thread(env.tile(self.src), self.src), self.src.dtype)
        codes = _from_threads(self.order.unpack(data), self.out)
        value = convert_values(self.code.decode(codes), self.code, self.out.dtype)
        if self.scaled:
            value = value * np.float32(2.0 ** -scale_exponent(self.code, self.out.dtype))
        env.set_tile(self.out, value)

    def emit(self, ctx: EmitContext) -> None:
        words = ctx.words(self.src)
        plan = plan_unpack(self.order, self.out.dtype, ctx.target, len(words), scaled=self.scaled)
        ctx.define(self.out, plan.emit(ctx.b, words))
        ctx.note(self, plan.summary())

    def emit_c(self, ctx: CContext) -> None:
        if self.src.layout is None or self.out.layout is None:
            raise ValueError("packed codes without layouts passed the verifier")
        factor = 2.0 ** -scale_exponent(self.code, self.out.dtype) if self.scaled else 1.0
        slots = self.out.layout.num_locals
        shape, registers = (self.out.layout.num_threads, slots), self.src.layout
        packed = thread_bytes(ctx, ctx.read(self.src), registers, 4)
        ctx.needs_values_of(self.code)
        if converted(self.code, self.out.dtype, "")[1] or not self.out.dtype.is_float:
            codes = Codes.of(*packed, self.code, self.order, slots)
            numbers = plain(self.code, shape, codes, row_major(shape))
            numbers = cast_tile(ctx, numbers, self.out.dtype)
        else:
            codes = Codes.of(*packed, self.code, self.order, slots, self.out.dtype, factor)
            numbers = plain(self.out.dtype, shape, codes, row_major(shape))
        ctx.define(self.out, from_threads(ctx, numbers, self.out.layout))


def _check(
    what: str, tile: RegisterTensor, packed: RegisterTensor, code: DataType, packed_as: DataType, packed_for: DataType
) -> None:
    """A thread's codes, the slots of `tile`, must fill its bits of `packed` in whole chunks."""
    if code.nbits != packed_as.nbits:
        raise TilusError(
            f"{what}: codes of {code} ({code.nbits} bits) in the packed order of {packed_as} ({packed_as.nbits} bits)",
            hint="packed_as must have as many bits as the codes",
        )
    if tile.layout is None or packed.layout is None:
        raise TilusError(
            f"{what} needs the layouts of both tiles",
            hint=f"load the operand with layout=..., and give the result's layout to tilus.{what}",
        )
    if tile.layout.num_threads != packed.layout.num_threads:
        raise TilusError(
            f"{what} between a layout of {tile.layout.num_threads} threads and one of {packed.layout.num_threads}"
        )
    order = packed_order(packed_as, packed_for)
    have, want = packed.layout.num_locals * packed.dtype.nbits, tile.layout.num_locals * code.nbits
    if have != want or tile.layout.num_locals % order.chunk:
        raise TilusError(
            f"{what}: a thread holds {have} packed bits and {tile.layout.num_locals} codes of {code} ({want} bits), "
            f"expected the same bits and a multiple of {order.chunk} codes",
            hint="the layouts' slots decide how many codes and how many bytes a thread holds",
        )


def _by_thread(value: Array, tile: RegisterTensor) -> npt.NDArray[np.generic]:
    """Codes of a tile [..., *shape] as [..., thread, slot], dtype `storage`."""
    codes = value if tile.dtype.kind == "uint" else tile.dtype.encode(value)
    return codes.reshape(*codes.shape[:3], -1)[..., _positions(tile)]


def _from_threads(codes: Array, tile: RegisterTensor) -> Array:
    """[..., thread, slot] as [..., *shape] of a tile."""
    flat = np.empty((*codes.shape[:3], tile.size), codes.dtype)
    flat[..., _positions(tile)] = codes
    return flat.reshape(*codes.shape[:3], *tile.shape)


def _positions(tile: RegisterTensor) -> npt.NDArray[np.intp]:
    """The row-major position of every (thread, slot)."""
    if tile.layout is None:
        raise ValueError("packed codes without layouts passed the verifier")
    return np.asarray(np.ravel_multi_index(tuple(np.moveaxis(tile.layout.table(), -1, 0)), tile.shape))


@builtin
def pack_codes(
    b: IRBuilder, x: RegisterTensor, dtype: DataType, shape: Sequence[int], layout: RegisterLayout, *,
    packed_as: DataType | None = None, packed_for: DataType = f16,
) -> RegisterTensor:  # fmt: skip
    """Each thread's codes of `x`, in the order of its slots, as the bits of their packed order: a tile of `dtype` in `layout`.

    The layout of `x` must be pinned, and give each thread whole chunks of codes. The order is that of
    `packed_order(packed_as, packed_for)`. packed_as: the type that the codes will be read as, by default that of `x`. packed_for:
    the type that they will be cast to, f16 or bf16; f32 stands for the little-endian order, as values of 32 bits have no lanes to
    share.
    """
    return b.emit(PackCodes(b.tile(dtype, tuple(shape), layout), x, packed_as or x.dtype, packed_for)).out


@builtin
def unpack_codes(
    b: IRBuilder, x: RegisterTensor, code: DataType, dtype: DataType, shape: Sequence[int], layout: RegisterLayout, *,
    packed_as: DataType | None = None, packed_for: DataType = f16, scaled: bool = False,
) -> RegisterTensor:  # fmt: skip
    """Each thread's bits of `x`, codes of type `code` in packed order, as a tile of `dtype` in `layout`.

    The layout of `x` must be pinned; a thread's codes come in the order of the result's slots. The result is the cast of the
    codes; dtype `code` itself leaves them as they are. The order is `packed_order(packed_as, packed_for)`, as in `pack_codes`:
    little-endian for f32.
    scaled: the result is the cast divided by 2^`scale_exponent(code, dtype)`, without a multiplication, for a caller that
    multiplies by a scale in any case; `dtype` is then f16 or bf16.
    """
    out = b.tile(dtype, tuple(shape), layout)
    return b.emit(UnpackCodes(out, x, code, packed_as or code, packed_for, scaled)).out
