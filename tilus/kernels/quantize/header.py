"""What the bytes of a packed weight mean: the header that is stored beside them and that kernels check."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from tilus.dtypes import DTYPES, DataType, f32
from tilus.errors import TilusError
from tilus.kernels.quantize.gates import PAIR_ROWS
from tilus.kernels.quantize.tiles import MMA, SMALLEST_GROUP, TILE, WHOLE, TileOrder, order_named, parts, span_of

LAYOUT_VERSION = 3
# Types of scales and minimums, by name.
FACTOR_NBYTES = {"f16": 2, "bf16": 2, "f32": 4, "float8_e4m3": 1, "float8_e8m0": 1}
ZERO_NBYTES = 2  # f16, which holds every zero point


@dataclass(frozen=True)
class WeightHeader:
    """Type, shape and scheme of a packed weight; compared by value, and written as JSON.

    dtype: of the codes. shape: (N, K) as the model has it, without padding. group: columns that share a scale. scale_dtype,
    mins_dtype: names of the types that scales and minimums are stored in; None where there are no minimums. has_zeros, has_table,
    has_columns: whether there are zero points, a table that gives codes their meaning, a permutation of the columns. is_gated:
    whether the N rows are gates and their factors, in the order of `gates`.
    exact_in_f16: whether float16 holds all weights that powers of two (float8_e8m0) scale; False of other scales.
    global_scale: multiplies every weight, in f32. order: of the codes and factors of a tile. version: of the layout of the bytes.
    Raises: TilusError for what no packed weight can be.
    """

    dtype: DataType
    shape: tuple[int, int]
    group: int
    scale_dtype: str
    mins_dtype: str | None = None
    has_zeros: bool = False
    has_table: bool = False
    has_columns: bool = False
    is_gated: bool = False
    exact_in_f16: bool = False
    global_scale: float = 1.0
    order: TileOrder = MMA
    version: int = LAYOUT_VERSION

    def __post_init__(self) -> None:
        n, k = self.shape
        if not self.dtype.is_small:
            raise TilusError(f"weights of {self.dtype.name}, expected a type of 1 to 8 bits")
        if n < 1 or k < 1:
            raise TilusError(f"a weight of shape {[n, k]}, expected at least [1, 1]")
        if self.group != k and (self.group < 1 or self.group % SMALLEST_GROUP or k % self.group):
            raise TilusError(
                f"groups of {self.group} columns for K = {k}, "
                f"expected a multiple of {SMALLEST_GROUP} that divides K, or K itself",
                hint="quantise in groups of 16, 32, 64, 128 or K",
            )
        for what, name in (("scales", self.scale_dtype), ("minimums", self.mins_dtype)):
            if name is not None and name not in FACTOR_NBYTES:
                raise TilusError(f"{what} of {name}, expected one of {', '.join(FACTOR_NBYTES)}")
        self._check_scheme()

    def _check_scheme(self) -> None:
        if self.is_gated and self.shape[0] % PAIR_ROWS:
            raise TilusError(
                f"a gated weight of {self.shape[0]} rows, expected a multiple of {PAIR_ROWS}",
                hint="pack gates and factors as two weights, and use silu_mul",
            )
        if self.has_zeros and (self.has_table or not self.dtype.is_integer):
            codes = "codes of a table" if self.has_table else f"codes of {self.dtype.name}"
            raise TilusError(f"zero points beside {codes}, expected integer codes", hint="use minimums instead")
        if self.has_table and self.dtype.nbits != 4:
            raise TilusError(f"a table for codes of {self.dtype.name}, expected a type of 4 bits with 16 entries")
        if not math.isfinite(self.global_scale) or self.global_scale == 0:
            raise TilusError(f"a global scale of {self.global_scale}, expected a finite number other than 0")
        if self.mins_dtype is not None and self.global_scale != 1:
            raise TilusError(
                f"a global scale of {self.global_scale} beside minimums, expected 1",
                hint="multiply the scales by it, and store them as f32",
            )

    @property
    def span(self) -> int:
        """Columns that a stored set of factors serves (see tiles)."""
        return span_of(self.group, self.shape[1])

    @property
    def factor_words(self) -> int:
        """32-bit words of factors and table that a thread of the linear kernel has for the 8 rows of its tile of 64 columns.

        Factors count twice, as they are stored and as the numbers that they become: scales and minimums in f32, zero points in
        16 bits. Powers of two count one byte more, for their cast. Each set of factors counts another word, and two for bounds
        where the last tile is not whole.
        """
        names = [name for name in (self.scale_dtype, self.mins_dtype) if name is not None]
        nbytes = sum(FACTOR_NBYTES[name] + f32.nbytes + (name == "float8_e8m0") for name in names)
        nbytes += 2 * ZERO_NBYTES if self.has_zeros else 0
        other = 3 if self.shape[1] % TILE else 1
        table = self.dtype.num_codes // 2 if self.has_table else 0
        return parts(self.span) * (8 * nbytes // 4 + other) + table

    @property
    def scheme(self) -> str:
        """The scheme in words."""
        kinds = [("zero points", self.has_zeros), ("minimums", self.mins_dtype is not None), ("table", self.has_table)]
        names = [name for name, present in kinds if present] or ["symmetric"]
        return " and ".join(names) + (" in activation order" if self.has_columns else "")

    @property
    def arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of each array of the packed weight, by its name."""
        n, k = self.shape
        tiles_n, tiles_k = -(-n // TILE), -(-k // TILE)
        sets = 1 if self.span == WHOLE else k // self.span

        def factors(nbytes: int) -> tuple[tuple[int, ...], str]:
            return (tiles_n, sets, 8, 8 * nbytes), "uint8"

        found: dict[str, tuple[tuple[int, ...], str]] = {
            "codes": ((tiles_n, tiles_k, TILE * TILE // 8 * self.dtype.nbits), "uint8"),
            "scales": factors(FACTOR_NBYTES[self.scale_dtype]),
        }
        if self.mins_dtype is not None:
            found["mins"] = factors(FACTOR_NBYTES[self.mins_dtype])
        if self.has_zeros:
            found["zeros"] = factors(ZERO_NBYTES)
        if self.has_table:
            found["table"] = ((self.dtype.num_codes,), "float32")
        if self.has_columns:
            found["columns"] = ((k,), "int32")
        return found

    def to_json(self) -> dict[str, Any]:
        """The header as values that `json.dumps` takes."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {"dtype": self.dtype.name, "shape": list(self.shape), "order": self.order.name}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> WeightHeader:
        """The header that `to_json` wrote; those without an order, `is_gated` or `exact_in_f16` are older: of
        the order mma, not gated, of unknown range.

        Raises: TilusError for another layout version, and for missing, unknown or wrong fields.
        """
        if data.get("version") != LAYOUT_VERSION:
            raise TilusError(
                f"a packed weight of layout version {data.get('version')}, these kernels read version {LAYOUT_VERSION}",
                hint="pack the weight again with this version of tilus",
            )
        data = {"order": MMA.name, "is_gated": False, "exact_in_f16": False, **data}
        expected = {f.name: f.type for f in dataclasses.fields(cls)}
        if set(data) != set(expected):
            raise TilusError(f"the header of a packed weight has fields {sorted(data)}, expected {sorted(expected)}")
        if data["dtype"] not in DTYPES:
            raise TilusError(
                f"the header of a packed weight names the type {data['dtype']!r}, expected one of tilus.dtypes"
            )
        for name, kinds in _JSON_TYPES.items():
            if not isinstance(data[name], kinds) or (bool not in kinds and isinstance(data[name], bool)):
                raise TilusError(
                    f"field {name} of the header of a packed weight is {data[name]!r}, "
                    f"expected {' or '.join(kind.__name__ for kind in kinds)}"
                )
        n, k = _two_integers(data["shape"])
        return cls(**{**data, "dtype": DTYPES[data["dtype"]], "shape": (n, k), "order": order_named(data["order"])})


_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "shape": (list, tuple), "group": (int,), "scale_dtype": (str,), "mins_dtype": (str, type(None)), "has_zeros": (bool,),
    "has_table": (bool,), "has_columns": (bool,), "is_gated": (bool,), "exact_in_f16": (bool,),
    "global_scale": (float, int), "order": (str,),
}  # fmt: skip


def _two_integers(value: object) -> tuple[int, int]:
    items = cast("list[object]", value)
    if len(items) != 2 or not all(isinstance(item, int) for item in items):
        raise TilusError(f"field shape of the header of a packed weight is {value!r}, expected [N, K]")
    n, k = (int(cast("int", item)) for item in items)
    return n, k
