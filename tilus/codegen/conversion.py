"""A tile's registers in another layout, by the cheapest way (tilus.layout.conversion)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from tilus.codegen.context import EmitContext
from tilus.codegen.linear import Linear, address32, of_const, of_reg, register
from tilus.codegen.word_program import emit_in_order
from tilus.dtypes import DataType, boolean
from tilus.ir.layout_rules import tile_conversion
from tilus.layout import RegisterLayout
from tilus.layout.conversion import ConversionPlan, RegisterWay, ScratchWay, words_per_access
from tilus.layout.scratch_plan import ScratchPlan, Side
from tilus.ptx.module import Address, Guard, Imm, Reg, RegClass, Vector

FLAGS_PER_WORD = 4


def convert_words(
    ctx: EmitContext, dtype: DataType, words: Sequence[Reg], src: RegisterLayout, dst: RegisterLayout
) -> list[Reg]:
    """The registers of a tile of `dtype` in layout `dst` from those in `src`.

    The scratch memory that the plan names must be reserved: `scratch_nbytes` and `warp_scratch_nbytes` of the instruction.
    """
    return list(stream_words(ctx, dtype, words, src, dst))


def stream_words(
    ctx: EmitContext, dtype: DataType, words: Sequence[Reg], src: RegisterLayout, dst: RegisterLayout
) -> Iterator[Reg]:
    """The same registers in slot order, each emitted when it is asked for; all of them have to be."""
    plan = tile_conversion(dtype, src, dst)
    if plan.slots is not None:
        return iter(ctx.pick(dtype, words, plan.slots))
    if dtype == boolean:
        return iter(_as_predicates(ctx, list(_move(ctx, plan, uint8_words(ctx, words))), dst.num_locals))
    return _move(ctx, plan, words)


def uint8_words(ctx: EmitContext, predicates: Sequence[Reg]) -> list[Reg]:
    """Predicates as bytes 0 and 1, four to a word."""
    words: list[Reg] = []
    for start in range(0, len(predicates), FLAGS_PER_WORD):
        word: Reg | None = None
        for byte, predicate in enumerate(predicates[start : start + FLAGS_PER_WORD]):
            flag = ctx.b.emit("selp.b32", Imm(1 << 8 * byte), Imm(0), predicate)
            word = flag if word is None else ctx.b.emit("or.b32", word, flag)
        words += [word] if word is not None else []
    return words


def _as_predicates(ctx: EmitContext, words: Sequence[Reg], count: int) -> list[Reg]:
    flags = [
        ctx.b.emit("and.b32", words[slot // FLAGS_PER_WORD], Imm(1 << 8 * (slot % FLAGS_PER_WORD)))
        for slot in range(count)
    ]
    return [ctx.b.emit("setp.ne.u32", flag, Imm(0)) for flag in flags]


def _move(ctx: EmitContext, plan: ConversionPlan, words: Sequence[Reg]) -> Iterator[Reg]:
    match plan.chosen:
        case RegisterWay() as way:
            return emit_in_order(ctx.b, way.program, words.__getitem__)
        case ScratchWay() as way:
            return _through_scratch(ctx, way, words)


def _through_scratch(ctx: EmitContext, way: ScratchWay, words: Sequence[Reg]) -> Iterator[Reg]:
    plan = way.scratch
    stored = emit_in_order(ctx.b, way.pack, words.__getitem__)
    guard = _first_replica(ctx, plan)
    _wait(ctx, plan)  # earlier users of the scratch region are done
    for address in _addresses(ctx, plan, plan.store):
        part = list(islice(stored, words_per_access(plan, plan.store)))
        _store(ctx, plan.access_nbytes(plan.store), address, part, guard)
    _wait(ctx, plan)
    addresses, count = _addresses(ctx, plan, plan.load), words_per_access(plan, plan.load)
    loaded: dict[int, list[Reg]] = {}

    def word(number: int) -> Reg:
        access, position = divmod(number, count)
        if access not in loaded:
            loaded[access] = _load(ctx, plan, addresses[access])
        return loaded[access][position]

    yield from emit_in_order(ctx.b, way.unpack, word)


def _wait(ctx: EmitContext, plan: ScratchPlan) -> None:
    if plan.is_per_warp:
        ctx.warp_barrier()
    else:
        ctx.barrier()


def _first_replica(ctx: EmitContext, plan: ScratchPlan) -> Guard | None:
    """Of the threads that hold the same, one stores."""
    found: Reg | None = None
    for stride, size in plan.replicas:
        is_first = ctx.b.pure("setp.eq.s32", register(ctx.b, ctx.digit(stride, size)), Imm(0))
        found = ctx.both(found, is_first)
    return ctx.guard(found)


def _addresses(ctx: EmitContext, plan: ScratchPlan, side: Side) -> list[Address]:
    """Of each access of a side. With a swizzle the address is a string of bits, of which thread and slots decide some each,
    so that the XOR of the parts' swizzles is the swizzle of the whole; what only slots decide is an immediate offset."""
    nbytes, swizzle = plan.unit_nbytes, plan.swizzle
    thread = of_const(0)
    for stride, size, weight in side.pieces:
        thread = thread + ctx.digit(stride, size).scaled(weight * nbytes)
    if swizzle is None:
        return [_address(ctx, plan, thread, start * nbytes) for start in side.starts]
    value = register(ctx.b, thread)
    high_bits = ctx.b.pure("and.b32", value, Imm(swizzle.mask * nbytes))
    base = ctx.b.pure("xor.b32", value, ctx.b.pure("shr.u32", high_bits, Imm(swizzle.shift)))
    by_thread = 0
    for _, size, weight in side.pieces:
        by_thread |= weight * (size - 1)
    by_thread |= swizzle.apply(by_thread)
    result: list[Address] = []
    for start in side.starts:
        low = start % swizzle.period
        moved = swizzle.apply(low)
        flipped = (moved & by_thread) * nbytes
        own = ctx.b.pure("xor.b32", base, Imm(flipped)) if flipped else base
        result.append(_address(ctx, plan, of_reg(own), (start - low + (moved & ~by_thread)) * nbytes))
    return result


def _address(ctx: EmitContext, plan: ScratchPlan, thread: Linear, offset_nbytes: int) -> Address:
    region = of_const(ctx.scratch_offset)
    if plan.is_per_warp:
        region = of_const(ctx.warp_scratch_offset)
        if ctx.num_threads > plan.num_threads:
            warp = ctx.digit(plan.num_threads, ctx.num_threads // plan.num_threads)
            region = region + warp.scaled(ctx.plan.warp_scratch_nbytes)
    return address32(ctx.b, ctx.shared_base(), thread + region + of_const(offset_nbytes))


def _store(ctx: EmitContext, nbytes: int, address: Address, words: Sequence[Reg], guard: Guard | None) -> None:
    if nbytes < 4:
        narrow = ctx.b.emit("cvt.u16.u32", words[0])
        ctx.b.emit_to(f"st.shared.u{8 * nbytes}", address, narrow, guard=guard)
    else:
        source = words[0] if len(words) == 1 else Vector(tuple(words))
        ctx.b.emit_to(f"st.shared{_suffix(words)}", address, source, guard=guard)


def _load(ctx: EmitContext, plan: ScratchPlan, address: Address) -> list[Reg]:
    nbytes = plan.access_nbytes(plan.load)
    if nbytes < 4:
        narrow = ctx.b.reg(RegClass.B16)
        ctx.b.emit_to(f"ld.shared.u{8 * nbytes}", narrow, address)
        return [ctx.b.emit("cvt.u32.u16", narrow)]
    cls = RegClass.B64 if plan.unit_nbytes == 8 else RegClass.B32
    words = [ctx.b.reg(cls) for _ in range(words_per_access(plan, plan.load))]
    ctx.b.emit_to(f"ld.shared{_suffix(words)}", words[0] if len(words) == 1 else Vector(tuple(words)), address)
    return words


def _suffix(words: Sequence[Reg]) -> str:
    vector = f".v{len(words)}" if len(words) > 1 else ""
    return f"{vector}.{words[0].cls.value}"
