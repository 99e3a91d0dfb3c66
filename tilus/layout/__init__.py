"""The layout algebra: where the elements of a tile live, in registers and in shared memory. See docs/layouts.md."""

from tilus.layout.banks import bank_conflicts
from tilus.layout.broadcast import broadcast_operand, slot_map
from tilus.layout.conversion import ConversionPlan, RegisterWay, ScratchWay, plan_conversion
from tilus.layout.default import auto
from tilus.layout.digits import Digit, Term
from tilus.layout.draw import svg, text_table
from tilus.layout.errors import LayoutError
from tilus.layout.inverse import Inverse
from tilus.layout.parser import parse_layout, parse_shared_layout
from tilus.layout.register import (
    RegisterLayout,
    column_local,
    column_spatial,
    concat,
    identity,
    local,
    local_replicated,
    replicated,
    spatial,
)
from tilus.layout.reorder import reorder_locals
from tilus.layout.shared import (
    AddressDigit,
    SharedLayout,
    Swizzle,
    column_major,
    padded,
    row_major,
    strided,
    swizzled,
)

__all__ = [
    "AddressDigit",
    "ConversionPlan",
    "Digit",
    "Inverse",
    "LayoutError",
    "RegisterLayout",
    "RegisterWay",
    "ScratchWay",
    "SharedLayout",
    "Swizzle",
    "Term",
    "auto",
    "bank_conflicts",
    "broadcast_operand",
    "column_local",
    "column_major",
    "column_spatial",
    "concat",
    "identity",
    "local",
    "local_replicated",
    "padded",
    "parse_layout",
    "parse_shared_layout",
    "plan_conversion",
    "reorder_locals",
    "replicated",
    "row_major",
    "slot_map",
    "spatial",
    "strided",
    "svg",
    "swizzled",
    "text_table",
]
