"""The layout algebra: where the elements of a tile live, in registers and in shared memory. See docs/layouts.md."""

from tilus.layout.arrangements import column_major, padded, row_major, strided, swizzled
from tilus.layout.banks import bank_conflicts
from tilus.layout.broadcast import broadcast_operand, slot_map
from tilus.layout.complement import complement, replicas
from tilus.layout.compose import compose
from tilus.layout.concat import concat
from tilus.layout.conversion import ConversionPlan, RegisterWay, ScratchWay, plan_conversion
from tilus.layout.default import auto
from tilus.layout.digits import Digit, Term
from tilus.layout.draw import svg, text_table
from tilus.layout.errors import LayoutError
from tilus.layout.inverse import AddressInverse, Inverse
from tilus.layout.operands import WgmmaForm, tma_tile, tma_tiles, wgmma_forms, wgmma_operand, wgmma_operands
from tilus.layout.parser import parse_layout, parse_shared_layout
from tilus.layout.register import (
    RegisterLayout,
    column_local,
    column_spatial,
    identity,
    local,
    local_replicated,
    replicated,
    spatial,
)
from tilus.layout.reorder import reorder_locals
from tilus.layout.shared import SharedLayout
from tilus.layout.swizzle import Swizzle

__all__ = [
    "AddressInverse",
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
    "WgmmaForm",
    "auto",
    "bank_conflicts",
    "broadcast_operand",
    "column_local",
    "column_major",
    "column_spatial",
    "complement",
    "compose",
    "concat",
    "identity",
    "local",
    "local_replicated",
    "padded",
    "parse_layout",
    "parse_shared_layout",
    "plan_conversion",
    "reorder_locals",
    "replicas",
    "replicated",
    "row_major",
    "slot_map",
    "spatial",
    "strided",
    "svg",
    "swizzled",
    "text_table",
    "tma_tile",
    "tma_tiles",
    "wgmma_forms",
    "wgmma_operand",
    "wgmma_operands",
]
