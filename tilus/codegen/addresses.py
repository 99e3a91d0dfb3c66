"""Where elements are in memory: addresses and masks of global tensors, addresses of shared ones and of scratch memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tilus.codegen.access import may_leave
from tilus.codegen.linear import Linear, address32, materialize, of_const, of_reg, register, widened
from tilus.codegen.scalar import ScalarLowering, divide_nonnegative
from tilus.codegen.shared_plan import SharedPlan
from tilus.codegen.threads import ThreadContext
from tilus.errors import TilusError
from tilus.ir.expr import Binary, Const, Expr, as_expr
from tilus.ir.tensor import GlobalTensor, SharedTensor
from tilus.layout import SharedLayout
from tilus.ptx.builder import Builder
from tilus.ptx.module import Address, Imm, Reg, Symbol

SHARED_SYMBOL = "smem"


@dataclass
class AddressContext(ThreadContext):
    """plan: where everything is in the block's shared memory."""

    scalars: ScalarLowering
    plan: SharedPlan

    def integer(self, expr: Expr) -> Reg:
        """An integer scalar in a 32-bit register."""
        return register(self.b, self.scalars.linear(expr))

    def integer_operand(self, expr: Expr) -> Reg | Imm:
        """An integer scalar as an operand of 32 bits."""
        return materialize(self.b, self.scalars.linear(expr))

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

    def shared_address(
        self, tensor: SharedTensor, index: Sequence[Linear], block: Expr | None = None, *, swizzled: bool = True
    ) -> Address:
        """Where the element at `index` of a shared tensor starts; with `block`, in that block of the cluster. swizzled: False
        for those who swizzle by themselves."""
        layout = tensor.layout
        if layout is None:
            raise TilusError(f"shared tensor {tensor.name} has no layout")
        elements = self._shared_offset(layout, index) if swizzled else self.linear_offset(layout, index)
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
        _, rest = whole.multiples_of(size)
        if rest.is_const:
            return rest
        if size & (size - 1):
            reg = register(b, rest)
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
