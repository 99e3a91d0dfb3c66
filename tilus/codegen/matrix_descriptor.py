"""Descriptors of matrices in shared memory, through which wgmma reads its operands.

Source: PTX ISA, "Matrix descriptor format": start address, leading and stride distance in units of 16 bytes (bits 0 to 13, 16 to
29, 32 to 45), and the swizzle (bits 62 and 63). The base offset (bits 49 to 51) is 0, as tensors start at a multiple of the
swizzle's pattern. The start is an address before the swizzle: the hardware applies the XOR to the addresses that it reads.
"""

from __future__ import annotations

from collections.abc import Sequence

from tilus.codegen.context import EmitContext
from tilus.codegen.linear import Linear, of_const, of_reg, register
from tilus.ir.tensor import SharedTensor
from tilus.layout import WgmmaForm
from tilus.ptx.module import Imm, Reg, RegClass, Vector

UNIT_NBYTES = 16
UNIT_NBITS = UNIT_NBYTES.bit_length() - 1  # of an address within a unit
START_NBITS = 14
LEADING_BIT = 16
SWIZZLE_BIT = 30  # of the high half
SWIZZLE_CODES = {0: 0, 128: 1, 64: 2, 32: 3}


def descriptor(ctx: EmitContext, tensor: SharedTensor, form: WgmmaForm, index: Sequence[Linear]) -> Reg:
    """The descriptor of the matrix that starts at `index` of a tensor, in the order of dims that the form has.

    The high half is a constant. The start is a sum of terms that are materialised where their operands live, so that the
    steps of a loop along k cost one addition each.
    """
    b = ctx.b
    elements = ctx.linear_offset(form.linear, index)
    nbytes = elements.scaled(tensor.dtype.nbits // 8) + of_const(ctx.plan.offsets[tensor])
    units, rest = nbytes.multiples_of(UNIT_NBYTES)
    if not rest.is_const:
        units = units + of_reg(b.pure("shr.u32", register(b, rest), Imm(UNIT_NBITS)))
    base = b.pure("bfe.u32", ctx.shared_base(), Imm(UNIT_NBITS), Imm(START_NBITS))
    low = register(b, of_reg(base) + units + of_const(form.leading_nbytes // UNIT_NBYTES << LEADING_BIT))
    high = form.stride_nbytes // UNIT_NBYTES | SWIZZLE_CODES[form.swizzle_nbytes] << SWIZZLE_BIT
    return b.pure("mov.b64", Vector((low, b.const(high))), out=RegClass.B64)
