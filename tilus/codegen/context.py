"""What an instruction needs to emit PTX: registers of tiles, thread digits, addresses, masks, scratch memory.

A tile's local slots form one little-endian bit string per thread in 32-bit words: slot i of an n-bit type has bits
[i*n, (i+1)*n). Types of 64 bits use one 64-bit register a slot; boolean tiles one predicate a slot.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from tilus.codegen.access import may_leave
from tilus.codegen.cast_plan import plan_slots
from tilus.codegen.linear import Linear, address32, materialize, of_const, of_reg, register, widened
from tilus.codegen.scalar import ScalarLowering
from tilus.codegen.shared_plan import SharedPlan
from tilus.codegen.tensor_map import TensorMap
from tilus.codegen.word_program import emit_program
from tilus.dtypes import DataType, boolean
from tilus.errors import Loc, TilusError
from tilus.ir.expr import Binary, Const, Expr, Var, as_expr
from tilus.ir.instruction import Instruction
from tilus.ir.tensor import GlobalTensor, RegisterTensor, SharedTensor
from tilus.layout import RegisterLayout, SharedLayout, slot_map
from tilus.layout.word_program import pick_fields
from tilus.ptx.builder import Builder
from tilus.ptx.module import Address, FloatImm, Guard, Imm, Reg, RegClass, Symbol
from tilus.target import Target

NUM_BARRIERS = 16  # of a block, for all of its threads or some of its warps
SHARED_SYMBOL = "smem"
LOCAL_SYMBOL = "local_memory"
_ONE = 0x3F800000  # 1.0: all lines


def word_class(dtype: DataType) -> RegClass:
    """The class of the registers that hold a tile of this dtype."""
    if dtype == boolean:
        return RegClass.PRED
    return RegClass.B64 if dtype.nbits == 64 else RegClass.B32


def num_words(dtype: DataType, num_locals: int) -> int:
    """Registers per thread of a tile with `num_locals` slots."""
    if dtype == boolean or dtype.nbits == 64:
        return num_locals
    return -(-num_locals * dtype.nbits // 32)


@dataclass(frozen=True)
class Note:
    """One line of the compile report."""

    mnemonic: str
    text: str
    loc: Loc | None


@dataclass
class EmitContext:
    """State of lowering one kernel.

    warps: that run the code: the block's, or those of a role. plan: where everything is in the block's shared memory.
    read_only: pointers to memory that nobody writes while the kernel runs. barriers: the hardware barrier of each group of
    warps. arriving_warps: of one arrival at each mbarrier. entry_registers: of a thread at launch, where roles change it.
    cluster: how many blocks make one. parameters: what the launcher knows.
    """

    b: Builder
    target: Target
    warps: range
    scalars: ScalarLowering
    plan: SharedPlan
    read_only: frozenset[Var]
    parameters: frozenset[Expr]
    barriers: dict[range, int]
    arriving_warps: Mapping[SharedTensor, int]
    entry_registers: int | None
    cluster: int
    tiles: dict[RegisterTensor, list[Reg]] = field(default_factory=dict[RegisterTensor, list[Reg]])
    notes: list[Note] = field(default_factory=list[Note])
    strings: dict[str, str] = field(default_factory=dict[str, str])
    tensor_maps: dict[TensorMap, str] = field(default_factory=dict[TensorMap, str])
    local_nbytes: int = 0

    @property
    def num_threads(self) -> int:
        """Threads that run the code: the block's, or those of a role."""
        return 32 * len(self.warps)

    @contextmanager
    def role(self, warps: range) -> Generator[None]:
        """Code that only these warps run."""
        outer, self.warps = self.warps, warps
        with self.b.role(32 * warps.start):
            yield
        self.warps = outer

    # Tiles.

    def layout(self, tensor: RegisterTensor) -> RegisterLayout:
        if tensor.layout is None:
            raise TilusError(f"tile {tensor.name} has no layout")
        return tensor.layout

    def words(self, tensor: RegisterTensor) -> list[Reg]:
        """The registers that hold a tile; do not write to them."""
        return self.tiles[tensor]

    def define(self, tensor: RegisterTensor, words: Sequence[Reg]) -> None:
        """Give a tile its registers. The storage of a mutable tile stays where it is and is copied into."""
        if tensor in self.tiles:
            for dst, src in zip(self.tiles[tensor], words, strict=True):
                if dst != src:
                    self.b.mov(dst, src)
        elif tensor.mutable:
            for dst, src in zip(self.allocate(tensor), words, strict=True):
                self.b.mov(dst, src)
        else:
            self.tiles[tensor] = list(words)

    def allocate(self, tensor: RegisterTensor) -> list[Reg]:
        """Fresh storage for a mutable tile, at the current level."""
        count = num_words(tensor.dtype, self.layout(tensor).num_locals)
        regs = [self.b.reg(word_class(tensor.dtype)) for _ in range(count)]
        self.tiles[tensor] = regs
        return regs

    def aligned_words(self, tensor: RegisterTensor, layout: RegisterLayout) -> list[Reg]:
        """The tile's registers in the slot order of another layout; every thread must own what that layout gives it.

        This serves broadcast operands (size 1 where the layout has more) and operands in another local order.
        """
        own = self.layout(tensor)
        if own == layout:
            return self.words(tensor)
        return self.pick(tensor.dtype, self.words(tensor), slot_map(layout, own))

    def pick(self, dtype: DataType, words: Sequence[Reg], slots: Sequence[int]) -> list[Reg]:
        """New words whose slot i is slot `slots[i]` of `words`."""
        if dtype == boolean or dtype.nbits >= 32:
            return [words[slot] for slot in slots]
        return emit_program(self.b, pick_fields(dtype.nbits, len(words), tuple(slots)), words)

    def extract(self, nbits: int, words: Sequence[Reg], slot: int) -> Reg:
        """Field `slot` of a string of fields of up to 32 bits, zero-extended in a 32-bit register."""
        word, shift = divmod(slot * nbits, 32)
        if nbits == 32:
            return words[word]
        if shift + nbits <= 32:
            return self.b.emit("bfe.u32", words[word], Imm(shift), Imm(nbits))
        pair = self.b.emit("shf.r.wrap.b32", words[word], words[word + 1], Imm(shift))
        return self.b.emit("and.b32", pair, Imm((1 << nbits) - 1))

    def pack(self, nbits: int, codes: Sequence[Reg]) -> list[Reg]:
        """Words from one 32-bit register per field, whose bits above `nbits` are zero."""
        result: list[Reg] = []
        for index in range(-(-len(codes) * nbits // 32)):
            word: Reg | None = None
            for slot, code in enumerate(codes):
                shift = slot * nbits - 32 * index
                if -nbits < shift < 32:
                    word = self._insert(word, code, shift)
            result.append(word if word is not None else self.b.const(0))
        return result

    def _insert(self, word: Reg | None, code: Reg, shift: int) -> Reg:
        moved = code
        if shift > 0:
            moved = self.b.emit("shl.b32", code, Imm(shift))
        elif shift < 0:
            moved = self.b.emit("shr.u32", code, Imm(-shift))
        return moved if word is None else self.b.emit("or.b32", word, moved)

    def cast(self, src: DataType, dst: DataType, words: Sequence[Reg], count: int) -> list[Reg]:
        """Words of another type, slot for slot."""
        if src == dst:
            return list(words)
        return plan_slots(src, dst, self.target, len(words), range(count)).emit(self.b, words)

    def integer(self, expr: Expr) -> Reg:
        """An integer scalar in a 32-bit register."""
        return register(self.b, self.scalars.linear(expr))

    def integer_operand(self, expr: Expr) -> Reg | Imm:
        """An integer scalar as an operand of 32 bits."""
        return materialize(self.b, self.scalars.linear(expr))

    # Threads.

    def thread_id(self) -> Reg:
        """The thread's number among those that run the code."""
        return self.b.thread_id()

    def elected(self) -> Reg:
        """True in one thread of every warp."""
        return self.b.second("elect.sync", Imm(0xFFFFFFFF))

    def elected_in_other_warps(self) -> Reg | None:
        """True in one thread of every warp but the first; None where there is no other warp."""
        if len(self.warps) == 1:
            return None
        is_other = self.b.pure("setp.ge.u32", self.thread_id(), Imm(32))
        return self.b.pure("and.pred", is_other, self.elected())

    def in_first_warp(self) -> Reg | None:
        """True in the first warp of the threads that run the code; None where there is no other."""
        return None if self.num_threads == 32 else self.b.pure("setp.lt.u32", self.thread_id(), Imm(32))

    def elected_in_group(self) -> Reg:
        """True in one of the threads that run the code: the elected one of their first warp."""
        first = self.in_first_warp()
        return self.elected() if first is None else self.b.pure("and.pred", first, self.elected())

    def digit(self, stride: int, size: int) -> Linear:
        """`(thread // stride) % size`."""
        value: Linear = of_reg(self.thread_id())
        if stride > 1:
            value = self._thread_quotient(value, stride)
        if stride * size >= self.num_threads:
            return value
        if size & (size - 1) == 0:
            return of_reg(self.b.pure("and.b32", register(self.b, value), Imm(size - 1)))
        return of_reg(register(self.b, value - self._thread_quotient(value, size).scaled(size)))

    def _thread_quotient(self, value: Linear, divisor: int) -> Linear:
        from tilus.codegen.scalar import divide_nonnegative

        reg = register(self.b, value)
        if divisor & (divisor - 1) == 0:
            return of_reg(self.b.pure("shr.u32", reg, Imm(divisor.bit_length() - 1)))
        return of_reg(divide_nonnegative(self.b, reg, divisor))

    def thread_index(self, layout: RegisterLayout) -> list[Linear]:
        """The part of a tile index that the thread decides, one linear form per dimension."""
        index = [of_const(0) for _ in layout.shape]
        for term in layout.thread_terms:
            if term.dim is not None:
                index[term.dim] = index[term.dim] + self.digit(term.stride, term.size).scaled(term.weight)
        return index

    def local_index(self, layout: RegisterLayout, slot: int) -> list[int]:
        """The part of a tile index that the local slot decides."""
        index = [0 for _ in layout.shape]
        for term in layout.local_terms:
            if term.dim is not None:
                index[term.dim] += slot // term.stride % term.size * term.weight
        return index

    def first_replica(self, layout: RegisterLayout) -> Reg | None:
        """True in one of the threads that hold the same elements; None when no element is held twice."""
        guard: Reg | None = None
        for term in layout.thread_terms:
            if term.dim is None and term.size > 1:
                digit = register(self.b, self.digit(term.stride, term.size))
                is_zero = self.b.pure("setp.eq.s32", digit, Imm(0))
                guard = is_zero if guard is None else self.b.pure("and.pred", guard, is_zero)
        return guard

    # Addresses and masks.

    def pointer(self, tensor: GlobalTensor) -> Reg:
        return self.scalars.variables[tensor.base]

    def global_address(self, tensor: GlobalTensor, index: Sequence[Linear]) -> Address:
        """Where the element at `index` (one linear form per dim) of a global tensor starts."""
        products = list(_products(tensor.offset))
        pairs = [(self.scalars.linear(a), b) for a, b in products]
        pairs += list(zip(index, tensor.strides, strict=True))
        form, runtime = of_const(0), list[tuple[Linear, Expr]]()
        for factor, stride in pairs:
            if isinstance(stride, Const):
                form = form + factor.scaled(int(stride.value))
            elif factor.is_const and factor.const == 0:
                continue
            else:
                runtime.append((factor, stride))
        return self._address(tensor, form, runtime)

    def _address(self, tensor: GlobalTensor, elements: Linear, runtime: list[tuple[Linear, Expr]]) -> Address:
        b, nbits = self.b, tensor.dtype.nbits
        sums: list[tuple[int, Callable[[Reg], Reg]]] = []
        constant = 0
        if nbits % 8 == 0:
            nbytes = nbits // 8
            constant = elements.const * nbytes
            for reg, coefficient in elements.terms:
                sums.append((b.level_of(reg), _wide_product(b, reg, coefficient * nbytes)))
        elif elements.const * nbits % 8 == 0 and all(c * nbits % 8 == 0 for _, c in elements.terms):
            constant = elements.const * nbits // 8
            for reg, coefficient in elements.terms:
                sums.append((b.level_of(reg), _wide_product(b, reg, coefficient * nbits // 8)))
        else:
            bits = b.pure("mul.wide.s32", register(b, elements), Imm(nbits))
            part = b.pure("shr.s64", bits, Imm(3))
            sums.append((b.level_of(part), lambda total: b.pure("add.s64", total, part)))
        for factor, stride in runtime:
            sums += self._stride_products(factor, stride, nbits)
        total = self.pointer(tensor)
        for _, add in sorted(sums, key=lambda entry: entry[0]):
            total = add(total)
        return Address(total, constant)

    def _stride_products(self, factor: Linear, stride: Expr, nbits: int) -> list[tuple[int, Callable[[Reg], Reg]]]:
        """`factor * stride` in bytes as 64-bit sums, one per level at which parts of the factor live."""
        b = self.b
        wide = widened(b, self.scalars.linear(stride))
        if nbits % 8 == 0:
            stride_bytes = b.pure("mul.lo.s64", wide, Imm(nbits // 8)) if nbits > 8 else wide
        else:
            stride_bytes = b.pure("shr.s64", b.pure("mul.lo.s64", wide, Imm(nbits)), Imm(3))
        by_level: dict[int, dict[Reg, int]] = {}
        for reg, coefficient in factor.terms:
            by_level.setdefault(b.level_of(reg), {})[reg] = coefficient
        parts = [widened(b, Linear(tuple(terms.items()))) for terms in by_level.values()]
        sums = [(max(b.level_of(p), b.level_of(stride_bytes)), _mad64(b, p, stride_bytes)) for p in parts]
        if factor.const:
            sums.append((b.level_of(stride_bytes), _mad64(b, stride_bytes, Imm(factor.const))))
        return sums

    def in_bounds(self, tensor: GlobalTensor, offsets: Sequence[Expr], dims: Sequence[int], extent: Sequence[int],
                  index: Sequence[Linear]) -> Reg | None:  # fmt: skip
        """A predicate that the element at `index` lies inside of the tensor; None when that is certain.

        offsets, dims, extent: start and shape of the whole tile, from which the facts are derived.
        """
        guard: Reg | None = None
        for d, bound in enumerate(tensor.shape):
            size = extent[dims.index(d)] if d in dims else 1
            below, above = may_leave(offsets[d], size, bound)
            if above or below:
                test = self._bound_test(index[d], bound, below)
                guard = test if guard is None else self.b.pure("and.pred", guard, test)
        return guard

    def _bound_test(self, index: Linear, bound: Expr, may_be_negative: bool) -> Reg:
        limit = self.scalars.linear(bound)
        if may_be_negative:  # an unsigned comparison is false for negative indices too
            return self.b.pure("setp.lt.u32", register(self.b, index), materialize(self.b, limit))
        limit = limit + of_const(-index.const)
        return self.b.pure("setp.lt.s32", register(self.b, index.without_const()), materialize(self.b, limit))

    def shared_base(self, block: Expr | None = None) -> Reg:
        """Where shared memory starts: the block's own, or that of another block of the cluster (in the window of the cluster)."""
        own = self.b.pure("mov.u32", Symbol(SHARED_SYMBOL))
        if block is None:
            return own
        # In front of a branch around it, a rank that is computed may be that of no block.
        place = self.b.pure if isinstance(block, Const) else self.b.emit
        return place("mapa.shared::cluster.u32", own, self.integer(block))

    def shared_address(self, tensor: SharedTensor, index: Sequence[Linear], block: Expr | None = None) -> Address:
        """Where the element at `index` of a shared tensor starts; with `block`, in that block of the cluster."""
        layout = tensor.layout
        if layout is None:
            raise TilusError(f"shared tensor {tensor.name} has no layout")
        elements = self._shared_offset(layout, index)
        nbits = tensor.dtype.nbits
        if nbits % 8:
            bits = register(self.b, elements.scaled(nbits))
            elements, nbits = of_reg(self.b.pure("shr.s32", bits, Imm(3))), 8
        form = elements.scaled(nbits // 8) + of_const(self.plan.offsets[tensor])
        return address32(self.b, self.shared_base(block), form)

    def linear_offset(self, layout: SharedLayout, index: Sequence[Linear]) -> Linear:
        """The address of an element before the swizzle, in elements."""
        form = of_const(0)
        for position, extent, terms in zip(index, layout.shape, layout.terms, strict=True):
            for term in terms:
                form = form + self._index_digit(position, term.weight, term.size, extent).scaled(term.stride)
        return form

    def _shared_offset(self, layout: SharedLayout, index: Sequence[Linear]) -> Linear:
        b = self.b
        form, swizzle = self.linear_offset(layout, index), layout.swizzle
        if swizzle is None:
            return form
        # Whole periods pass through the XOR unchanged, so only the part below one period is materialised.
        whole, rest = form.multiples_of(swizzle.period)
        if rest.is_const:
            return whole.scaled(swizzle.period) + of_const(swizzle.apply(rest.const))
        value = register(b, rest)
        moved = b.pure("shr.u32", b.pure("and.b32", value, Imm(swizzle.mask)), Imm(swizzle.shift))
        return whole.scaled(swizzle.period) + of_reg(b.pure("xor.b32", value, moved))

    def _index_digit(self, index: Linear, weight: int, size: int, extent: int) -> Linear:
        """`(index // weight) % size` for 0 <= index < extent."""
        b = self.b
        whole, rest = index.multiples_of(weight)
        if weight > 1 and not rest.is_const:
            reg = register(b, index)
            if weight & (weight - 1):
                raise TilusError(f"shared layouts with digits of weight {weight} need indices that {weight} divides")
            whole = of_reg(b.pure("shr.u32", reg, Imm(weight.bit_length() - 1)))
        if weight * size >= extent:
            return whole
        whole_part, rest = whole.multiples_of(size)
        if rest.is_const:
            return rest
        del whole_part
        if size & (size - 1):
            reg = register(b, rest)
            from tilus.codegen.scalar import divide_nonnegative

            return of_reg(reg) - of_reg(divide_nonnegative(b, reg, size)).scaled(size)
        return of_reg(b.pure("and.b32", register(b, rest), Imm(size - 1)))

    @property
    def scratch_offset(self) -> int:
        """Where the region starts that instructions of these warps may use between two barriers of their own."""
        return self.plan.scratch_offsets[self.warps]

    @property
    def warp_scratch_offset(self) -> int:
        """Where the regions of these warps start, `plan.warp_scratch_nbytes` each."""
        return self.plan.warp_scratch_offset + self.warps.start * self.plan.warp_scratch_nbytes

    def scratch_address(self, form: Linear) -> Address:
        """An address in the scratch region, `form` in bytes."""
        return address32(self.b, self.shared_base(), form + of_const(self.scratch_offset))

    def barrier(self) -> None:
        """Wait for all threads that run the code: of the block, or of a role."""
        number = self.barriers.setdefault(self.warps, len(self.barriers))
        if number == 0:
            self.b.emit_to("bar.sync", Imm(0))
        elif len(self.warps) == 1:
            self.warp_barrier()
        elif number < NUM_BARRIERS:
            self.b.emit_to("bar.sync", Imm(number), Imm(self.num_threads))
        else:
            raise TilusError(
                f"this is the barrier of group {number + 1} of warps, a block has {NUM_BARRIERS}",
                hint="let several roles have the same warps, or do without tilus.sync in some",
            )

    def cluster_barrier(self) -> None:
        """Wait for all threads of all blocks of the cluster, whose memory accesses before it are then visible to each other."""
        self.b.emit_to("barrier.cluster.arrive.release.aligned")
        self.b.emit_to("barrier.cluster.wait.acquire.aligned")

    def warp_barrier(self) -> None:
        """Wait for all threads of the warp."""
        self.b.emit_to("bar.warp.sync", Imm(0xFFFFFFFF))

    def require_sm_90a(self, what: str) -> None:
        """Refuse targets that do not know what the code needs."""
        if self.target.sm < 90 or not self.target.arch_specific:
            raise TilusError(
                f"{what} needs sm_90a or a later GPU, the target is {self.target}",
                hint='compile for sm_90a, or run it on device "reference" or "emulator"',
            )

    def both(self, first: Reg | None, second: Reg | None) -> Reg | None:
        """Conjunction of two predicates, where None is true."""
        if first is None or second is None:
            return second if first is None else first
        return self.b.pure("and.pred", first, second)

    def guard(self, pred: Reg | None) -> Guard | None:
        return None if pred is None else Guard(pred)

    def string(self, text: str) -> Symbol:
        """The name of a zero-terminated UTF-8 string in global memory."""
        name = self.strings.setdefault(text, f"string_{len(self.strings)}")
        return Symbol(name)

    def tensor_map(self, tensor_map: TensorMap) -> Reg:
        """The generic address of a tensor map, which becomes a parameter of the kernel.

        Raises: TilusError when the map depends on more than the parameters, which is all that the launcher knows.
        """
        unknown = sorted(str(e) for e in tensor_map.variables() if e not in self.parameters)
        if unknown:
            raise TilusError(
                f"a tensor copy of {tensor_map.name}: where the view lies depends on {', '.join(unknown)}; expected a tensor "
                "that is known when the kernel is launched",
                hint="copy from the whole tensor, and say by the offsets where: copy_tensor(dst, x, [i, j, k], ...)",
            )
        stem = "".join(c if c.isalnum() else "_" for c in tensor_map.name)
        name = self.tensor_maps.setdefault(tensor_map, f"tensor_map_{len(self.tensor_maps)}_{stem}")
        return self.b.pure("cvta.param.u64", self.b.pure("mov.u64", Symbol(name)))

    def cache_policy(self, evict: str) -> Reg:
        """What the L2 cache shall do with lines of an access: drop them `first`, or `last`."""
        return self.b.pure(f"createpolicy.fractional.L2::evict_{evict}.b64", FloatImm(_ONE))

    def local_memory(self, nbytes: int) -> Symbol:
        """The name of each thread's own memory, at least this large; instructions take turns in it."""
        self.local_nbytes = max(self.local_nbytes, nbytes)
        return Symbol(LOCAL_SYMBOL)

    def note(self, inst: Instruction, text: str) -> None:
        """A line for the report, with the user's position."""
        self.notes.append(Note(inst.mnemonic, text, self.b.loc))


def _wide_product(b: Builder, reg: Reg, coefficient: int) -> Callable[[Reg], Reg]:
    return lambda total: b.pure("mad.wide.s32", reg, Imm(coefficient), total)


def _mad64(b: Builder, x: Reg, y: Reg | Imm) -> Callable[[Reg], Reg]:
    return lambda total: b.pure("mad.lo.s64", x, y, total)


def _products(expr: Expr) -> list[tuple[Expr, Expr]]:
    """An offset as a sum of index * stride products, which are multiplied in 64 bits."""
    match expr:
        case Const(value, _) if value == 0:
            return []
        case Binary("+", lhs, rhs):
            return _products(lhs) + _products(rhs)
        case Binary("*", lhs, rhs):
            return [(lhs, rhs)]
        case _:
            return [(expr, as_expr(1))]
