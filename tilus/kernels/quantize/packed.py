"""Quantised weights in the order in which the linear kernel reads them: for every code type and batch size one order for GPUs and
one for CPUs.

`tiles` says what the orders are and why, `header` what is stored beside the arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tilus.dtypes import DTYPES, DataType, f16, float8_e8m0
from tilus.errors import TilusError
from tilus.kernels.allocate import is_cuda, is_torch
from tilus.kernels.quantize import factors
from tilus.kernels.quantize.codes import pack_codes, pack_codes_on, unpack_codes, unpack_codes_on
from tilus.kernels.quantize.gates import interleaved, separated
from tilus.kernels.quantize.header import WeightHeader
from tilus.kernels.quantize.matrix import QuantizedMatrix
from tilus.kernels.quantize.tiles import MMA, ROWS, TILE, TileOrder, order_named

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A packed weight: a header and the arrays that it describes, all torch tensors of one device or all numpy arrays.

    codes: uint8 [ceil(N / 64), ceil(K / 64), 512 * nbits]. scales, mins, zeros: sets of factors, uint8
    [ceil(N / 64), sets, 8, 8 * bytes of a factor]. table: float32 [16]. columns: int32 [K].
    Raises: TilusError, with the array's name, where an array is not what the header says.
    """

    header: WeightHeader
    codes: Any
    scales: Any
    mins: Any | None = None
    zeros: Any | None = None
    table: Any | None = None
    columns: Any | None = None
    # Schedules of the linear kernel for this weight, by what else they depend on: found once.
    schedules: dict[Any, Any] = field(default_factory=dict[Any, Any], repr=False)

    def __post_init__(self) -> None:
        expected = self.header.arrays
        for name, array in self._optional_arrays().items():
            if (array is not None) != (name in expected):
                found = "are missing" if array is None else "are there"
                raise TilusError(f"{name} of a packed weight {found}, the header says {self.header.scheme}")
            if array is None:
                continue
            shape, dtype = tuple(int(extent) for extent in array.shape), str(array.dtype).removeprefix("torch.")
            if (shape, dtype) != expected[name]:
                header = self.header
                raise TilusError(
                    f"{name} of a packed weight are {dtype}{list(shape)}, expected {expected[name][1]}"
                    f"{list(expected[name][0])} for {header.dtype} {list(header.shape)} in groups of {header.group}",
                    hint="the array was cut off, or belongs to another weight",
                )

    @property
    def dtype(self) -> DataType:
        return self.header.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.header.shape

    @property
    def is_gated(self) -> bool:
        return self.header.is_gated

    @property
    def group(self) -> int:
        return self.header.group

    @property
    def arrays(self) -> dict[str, Any]:
        """The arrays that there are, by name: with the header, all that has to be stored."""
        return {name: array for name, array in self._optional_arrays().items() if array is not None}

    @classmethod
    def from_arrays(cls, header: WeightHeader, arrays: Mapping[str, Any]) -> QuantizedWeight:
        """The weight whose header and arrays were stored.

        Raises: TilusError, with the array's name, for missing, unknown, cut-off or wrong arrays.
        """
        unknown = sorted(set(arrays) - set(header.arrays))
        missing = sorted(set(header.arrays) - set(arrays))
        if unknown or missing:
            raise TilusError(
                f"a packed weight with arrays {', '.join(sorted(arrays))}, expected {', '.join(sorted(header.arrays))}",
                hint=f"missing: {', '.join(missing) or 'none'}; not of this scheme: {', '.join(unknown) or 'none'}",
            )
        return cls(header, **arrays)

    @property
    def nbytes(self) -> int:
        """Bytes that a product with this weight reads."""
        return sum(int(array.nbytes) for array in self.arrays.values())

    def to(self, device: Any) -> QuantizedWeight:
        """The weight in tensors on a torch device, in the order for that device: "mma" for GPUs, "rows" for CPUs.

        Where that is another order, the weight is unpacked and packed again.
        """
        if self.header.order != _order_for(device) or not is_torch(self.codes):
            return pack(unpack(self), device, gated=self.is_gated)
        return _settled(QuantizedWeight(self.header, **{name: array.to(device) for name, array in self.arrays.items()}))

    def _optional_arrays(self) -> dict[str, Any | None]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("header", "schedules")}


def pack(
    matrix: QuantizedMatrix, device: Any = None, order: str | None = None, *, gated: bool = False
) -> QuantizedWeight:  # fmt: skip
    """Pack a weight for `linear`; `unpack` gives the matrix back, bit for bit.

    device: None for numpy arrays, or a torch device for tensors on it; on a GPU a kernel packs the codes. order: of the tiles,
    "mma" for GPUs or "rows" for CPUs; by default "rows" for tensors on a CPU, else "mma".
    gated: the N rows are gates, and then their factors, for `linear` with an activation; N is a multiple of 16.
    Scales are stored in `matrix.scale_dtype`; minimums in the first of that type, f16 and f32 that holds them all. A scale of 0
    makes the weights of its group 0 (plus the minimum).
    Raises: TilusError, with both values, for codes outside of the type or not finite, factors that are not finite or that their
    type does not hold, zero points further from the codes than the number of codes, columns that are no permutation,
    groups that are neither K nor a multiple of 16, and an unknown order.
    """
    header = _header(matrix, _order_for(device) if order is None else order_named(order), gated)
    _check_codes(matrix)
    header = replace(header, exact_in_f16=_exact_in_f16(matrix))
    if gated:
        matrix = _with_rows(matrix, interleaved)
    arrays = {"scales": _packed_factors(matrix.scales, header.scale_dtype, "scale", header)}
    if matrix.mins is not None and header.mins_dtype is not None:
        arrays["mins"] = _packed_factors(matrix.mins, header.mins_dtype, "minimum", header)
    if matrix.zeros is not None:
        _check_zeros(matrix.zeros, matrix.dtype)
        arrays["zeros"] = _packed_factors(matrix.zeros.astype(np.float32), "f16", "zero point", header)
    if matrix.table is not None:
        arrays["table"] = _checked_table(matrix.table)
    if matrix.columns is not None:
        arrays["columns"] = _checked_columns(matrix.columns, matrix.shape[1])
    if device is None:
        packed: Any = pack_codes(matrix.codes, header.dtype, header.has_table, header.order)
        return QuantizedWeight(header, codes=packed, **arrays)
    import torch

    tensors = {name: torch.tensor(array, device=device) for name, array in arrays.items()}
    return _settled(QuantizedWeight(header, codes=_codes_on(matrix.codes, header, torch.device(device)), **tensors))


def stack(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """The rows of packed weights of the same kind below each other, as one packed weight [sum of N, K].

    Tiles stay as they are, so all but the last have a multiple of 64 rows. Arrays are copied.
    Raises: TilusError for weights that differ in more than N, and for rows that end inside of a tile.
    """
    first = weights[0]
    for index, weight in enumerate(weights):
        ours, theirs = (replace(w.header, shape=(TILE, w.shape[1]), exact_in_f16=False) for w in (first, weight))
        shared = (
            getattr(weight, name) is None or _same(getattr(weight, name), getattr(first, name)) for name in SHARED
        )
        if ours != theirs or not all(shared):
            raise TilusError(
                f"weight {index} does not stack with the first: {weight.header}, expected one like {first.header}",
                hint="scheme, types, K, global scale, table and columns must be those of the first",
            )
        if weight.shape[0] % TILE and index < len(weights) - 1:
            raise TilusError(
                f"weight {index} has {weight.shape[0]} rows, expected a multiple of {TILE} to stack others below it"
            )
    shape = (sum(weight.shape[0] for weight in weights), first.shape[1])
    header = replace(first.header, shape=shape, exact_in_f16=all(weight.header.exact_in_f16 for weight in weights))
    arrays = {
        name: array if name in SHARED else _concatenated([weight.arrays[name] for weight in weights])
        for name, array in first.arrays.items()
    }
    return _settled(QuantizedWeight(header, **arrays))


SHARED = ("table", "columns")  # arrays that all rows have in common


def _same(a: Any, b: Any) -> bool:
    return b is not None and np.array_equal(_numpy(a), _numpy(b))


def _concatenated(arrays: list[Any]) -> Any:
    if is_torch(arrays[0]):
        import torch

        return torch.cat(arrays)
    return np.concatenate(arrays)


def _settled(weight: QuantizedWeight) -> QuantizedWeight:
    """The weight, once it is in the memory of its GPU: kernels that start early read it before they wait for what is in front."""
    if is_cuda(weight.codes):
        import torch

        torch.cuda.synchronize(weight.codes.device)
    return weight


def unpack(weight: QuantizedWeight) -> QuantizedMatrix:
    """The matrix that was packed, in numpy arrays; on a GPU a kernel unpacks the codes."""
    header = weight.header
    n, k = header.shape

    def collected(packed: Any, dtype: str) -> Array:
        codes = factors.collect(_numpy(packed), n, k, header.group, DTYPES[dtype].storage, header.order)
        return np.asarray(DTYPES[dtype].decode(codes), np.float32)

    zeros = None if weight.zeros is None else collected(weight.zeros, f16.name).astype(np.int16)
    mins = None if weight.mins is None else collected(weight.mins, header.mins_dtype or f16.name)
    matrix = QuantizedMatrix(
        codes=_unpacked_codes(weight),
        scales=collected(weight.scales, header.scale_dtype),
        mins=mins,
        dtype=header.dtype,
        zeros=zeros,
        table=None if weight.table is None else _numpy(weight.table),
        columns=None if weight.columns is None else _numpy(weight.columns),
        global_scale=header.global_scale,
        scale_dtype=DTYPES[header.scale_dtype],
    )
    return _with_rows(matrix, separated) if header.is_gated else matrix


def _order_for(device: Any) -> TileOrder:
    """The order that kernels on a torch device like best; of numpy arrays that of GPUs, as they are at home on no device."""
    if device is None:
        return MMA
    import torch

    return MMA if torch.device(device).type == "cuda" else ROWS


def _with_rows(matrix: QuantizedMatrix, order: Callable[[Any], Any]) -> QuantizedMatrix:
    return matrix.take_rows(order(np.arange(matrix.shape[0])))


def _header(matrix: QuantizedMatrix, order: TileOrder, gated: bool) -> WeightHeader:
    scale_dtype = matrix.scale_dtype.name
    mins_dtype: str | None = None
    if matrix.mins is not None:
        mins = matrix.mins
        usual = (scale_dtype, "f16") if scale_dtype in ("f16", "bf16") else ("f16",)
        holding = (name for name in usual if np.array_equal(DTYPES[name].round(mins), mins))
        mins_dtype = next(holding, "f32")
    return WeightHeader(
        dtype=matrix.dtype,
        shape=matrix.shape,
        group=matrix.group,
        scale_dtype=scale_dtype,
        mins_dtype=mins_dtype,
        has_zeros=matrix.zeros is not None,
        has_table=matrix.table is not None,
        has_columns=matrix.columns is not None,
        is_gated=gated,
        global_scale=float(np.float32(matrix.global_scale)),
        order=order,
    )


def _exact_in_f16(matrix: QuantizedMatrix) -> bool:
    dtype, others = matrix.dtype, (matrix.mins, matrix.zeros, matrix.table)
    if matrix.scale_dtype != float8_e8m0 or any(part is not None for part in others):
        return False
    numbers = np.asarray(dtype.decode(np.arange(dtype.num_codes, dtype=np.uint8)), np.float32)
    return factors.exact_in_f16(numbers, matrix.codes, matrix.scales)


def _packed_factors(values: Array, dtype: str, name: str, header: WeightHeader) -> Array:
    return factors.arrange(factors.exact_codes(values, dtype, name), header.shape[1], header.group, header.order)


def _check_codes(matrix: QuantizedMatrix) -> None:
    codes, dtype = matrix.codes, matrix.dtype
    if codes.dtype != np.uint8:
        raise TilusError(
            f"codes of dtype {codes.dtype}, expected uint8 [N, K]", hint="codes are raw: view them as uint8"
        )
    if int(codes.max()) >= dtype.num_codes:
        raise TilusError(f"code {int(codes.max())}, expected less than {dtype.num_codes} for {dtype.name}")
    if matrix.table is None and dtype.is_float:
        values = np.asarray(dtype.decode(np.arange(dtype.num_codes, dtype=np.uint8)))
        wrong = ~np.isfinite(values)[codes]
        if wrong.any():
            row, column = (int(i) for i in np.argwhere(wrong)[0])
            code = int(codes[row, column])
            raise TilusError(
                f"code {code} of {dtype.name} in row {row}, column {column} is {values[code]}, expected finite weights"
            )


def _check_zeros(zeros: Array, dtype: DataType) -> None:
    low, high = int(dtype.min_value), int(dtype.max_value) + 1
    wrong = (zeros < low) | (zeros > high)
    if wrong.any():
        row, group = (int(i) for i in np.argwhere(wrong)[0])
        raise TilusError(
            f"zero point {int(zeros[row, group])} of row {row}, group {group}, expected {low} to {high} for {dtype.name}",
            hint="differences of codes and zero points must be exact in bfloat16",
        )


def _checked_table(table: Array) -> Array:
    if not np.isfinite(table).all():
        raise TilusError(f"table entry {int(np.argmin(np.isfinite(table)))} is not finite, expected 16 finite numbers")
    return np.ascontiguousarray(table, np.float32)


def _checked_columns(columns: Array, k: int) -> Array:
    counts = np.bincount(np.clip(columns, 0, k - 1), minlength=k)
    if not np.array_equal(np.sort(columns), np.arange(k)):
        raise TilusError(
            f"columns are no permutation of 0 to {k - 1}: they go from {int(columns.min())} to {int(columns.max())}, "
            f"and column {int(np.argmax(counts != 1))} is there {int(counts[np.argmax(counts != 1)])} times"
        )
    return np.ascontiguousarray(columns, np.int32)


def _codes_on(codes: Array, header: WeightHeader, device: Any) -> Any:
    import torch

    if device.type != "cuda":
        packed = pack_codes(codes, header.dtype, header.has_table, header.order)
        return torch.from_numpy(packed).to(device)
    packed = torch.empty(header.arrays["codes"][0], dtype=torch.uint8, device=device)
    plain = torch.from_numpy(np.require(codes, requirements="W")).to(device)
    pack_codes_on(plain, packed, header.dtype, header.has_table, header.order)
    return packed


def _unpacked_codes(weight: QuantizedWeight) -> Array:
    header = weight.header
    n, k = header.shape
    if not is_cuda(weight.codes):
        codes = unpack_codes(_numpy(weight.codes), header.dtype, header.has_table, header.order)
        return np.ascontiguousarray(codes[:n, :k])
    import torch

    codes = torch.empty((n, k), dtype=torch.uint8, device=weight.codes.device)
    unpack_codes_on(weight.codes, codes, header.dtype, header.has_table, header.order)
    return codes.cpu().numpy()


def _numpy(value: Any) -> Array:
    return value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)
