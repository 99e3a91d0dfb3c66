"""The layout algebra: where the elements of a tile live, in registers and in shared memory. See docs/layouts.md."""

from tilus.layout.broadcast import broadcast_operand, slot_map
from tilus.layout.default import auto
from tilus.layout.digits import Digit, Term
from tilus.layout.errors import LayoutError
from tilus.layout.inverse import Inverse
from tilus.layout.parser import parse_layout
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

__all__ = [
    "Digit",
    "Inverse",
    "LayoutError",
    "RegisterLayout",
    "Term",
    "auto",
    "broadcast_operand",
    "column_local",
    "column_spatial",
    "identity",
    "local",
    "local_replicated",
    "parse_layout",
    "replicated",
    "slot_map",
    "spatial",
]
