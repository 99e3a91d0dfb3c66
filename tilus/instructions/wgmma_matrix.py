"""Operands of `wgmma` in shared memory: which part of a tensor, in which layouts it can be read, and its descriptors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tilus.codegen.context import EmitContext
from tilus.codegen.linear import Linear, of_const
from tilus.codegen.matrix_descriptor import descriptor
from tilus.codegen.shared_access import SharedAccess, shared_access
from tilus.errors import TilusError
from tilus.instructions.shared import placed
from tilus.instructions.wgmma_atoms import WgmmaAtom
from tilus.ir.evaluation import Array, Evaluation
from tilus.ir.expr import Expr
from tilus.ir.ranges import divisor
from tilus.ir.tensor import SharedTensor
from tilus.layout import SharedLayout, WgmmaForm, wgmma_forms
from tilus.ptx.module import Reg


@dataclass(frozen=True)
class SharedMatrix:
    """The operand [rows, k] of a product; `rows` are those of A, or the columns of B.

    offsets: where it starts in the tensor, whose last two dims are [rows, k], or [k, rows] if it is transposed.
    """

    name: str
    tensor: SharedTensor
    offsets: tuple[Expr, ...]
    rows: int
    k: int
    transposed: bool

    @property
    def dims(self) -> tuple[int, int]:
        """The tensor's dims of rows and k."""
        last = self.tensor.rank - 1
        return (last, last - 1) if self.transposed else (last - 1, last)

    def verify(self, atom: WgmmaAtom) -> None:
        tensor = self.tensor
        if tensor.rank < 2 or len(self.offsets) != tensor.rank:
            raise TilusError(f"wgmma: {len(self.offsets)} offsets for {self.name}, {tensor.name} of rank {tensor.rank}")
        for what, extent, unit, d in zip(("rows", "k"), (self.rows, self.k), (8, atom.k), self.dims, strict=True):
            if extent > tensor.shape[d]:
                raise TilusError(
                    f"wgmma: {self.name} has {extent} {what}, dim {d} of {tensor.name} only {tensor.shape[d]}",
                    hint=f"{self.name} is indexed {'[k, rows]' if self.transposed else '[rows, k]'} here",
                )
            if divisor(self.offsets[d]) % unit:
                raise TilusError(
                    f"wgmma: {self.name} starts at {self.offsets[d]} of dim {d} of {tensor.name}, "
                    f"expected a multiple of {unit}",
                    hint=f"let the offset be a product with {unit}",
                )

    def value(self, env: Evaluation) -> Array:
        return env.load(self.tensor, self.offsets, (self.rows, self.k), self.dims, checked=False)

    # Layouts.

    def forms(self, atom: WgmmaAtom, starts: int, most: int) -> Mapping[SharedLayout, WgmmaForm]:
        """The layouts of the tensor from which instructions can read their rows: at multiples of `starts` from the first one
        (0: only there), `most` or fewer. Rows that are contiguous must start a block for each instruction, or lie in one."""
        order = self._order
        step = math.gcd(starts, divisor(self.offsets[self.dims[0]]))
        found = wgmma_forms(tuple(self.tensor.shape[d] for d in order), atom.a.nbits // 8)
        return {
            layout.permute(order): form
            for layout, form in found.items()
            if form.major == "k" or step % form.width == 0 or (form.width % step == 0 and most <= step)
        }

    @property
    def _order(self) -> tuple[int, ...]:
        """The dims with rows and k last. As two dims change places at most, it is its own inverse."""
        return (*range(self.tensor.rank - 2), *self.dims)

    def access(self, forms: Mapping[SharedLayout, WgmmaForm]) -> SharedAccess:
        return shared_access(self.tensor, None, self.offsets, self.dims, (self.rows, self.k), legal=tuple(forms))

    def form(self, forms: Mapping[SharedLayout, WgmmaForm]) -> WgmmaForm:
        """How it is read in the tensor's layout."""
        found = forms.get(placed(self.tensor))
        if found is None:
            raise TilusError(
                f"wgmma cannot read {self.tensor.name} in layout {self.tensor.layout}",
                hint="leave the layout of the shared tensor to the compiler",
            )
        return found

    def descriptor(self, ctx: EmitContext, form: WgmmaForm, row: Linear, k: int) -> Reg:
        """Of the part that starts at an element relative to the operand's."""
        rows, depth = self.dims
        index = [ctx.scalars.linear(offset) for offset in self.offsets]
        index = [*index[:-2], index[rows] + row, index[depth] + of_const(k)]
        return descriptor(ctx, self.tensor, form, index)
