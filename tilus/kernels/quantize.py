"""Quantised weights in the order in which the linear kernel reads them: one packed layout for every code type and batch size.

A weight [N, K] is cut into tiles of 64 rows by 64 columns. Each tile belongs to one warp, as the left operand of tensor-core
products; a thread holds 128 codes, whose bits are in the order that the cast to 16 bits likes best (`packed_order`). They come
in 16-byte chunks that lie side by side for the 32 threads, so every load of the kernel is 16 bytes a thread and coalesced.

The columns of a tile are permuted so that a thread's columns are 16 consecutive ones of the activations: column
k = 16 t + 4 j + 2 h + e stands at position 16 j + 8 h + 2 t + e, where t is the thread's place among the four of a row.
Scales stand beside the tiles, [row % 8][row / 8], so that a thread loads those of its eight rows at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from tilus.codegen.cast_plan import scale_exponent
from tilus.codegen.code_order import CodeOrder
from tilus.codegen.packed_order import packed_order
from tilus.dtypes import DataType, bf16, f16
from tilus.errors import TilusError
from tilus.layout import RegisterLayout, column_spatial, local, replicated, spatial
from tilus.layout.atoms import mma_a

TILE = 64
GROUPS = (16, 32, 64, 128)

Array = npt.NDArray[Any]


def fragment_layout(warps: int) -> RegisterLayout:
    """Tile [warps, 64, 64] as the left operand of mma.m16n8k16: one 64x64 tile a warp."""
    return spatial(warps, 1, 1).local(1, 4, 4) * mma_a().unsqueeze(0)


def byte_layout(dtype: DataType, warps: int) -> RegisterLayout:
    """Tile [warps, 512 * nbits] of bytes: chunk, thread, byte."""
    return spatial(warps, 1).local(1, dtype.nbits).spatial(1, 32).local(1, 16)


def scale_layout(groups_per_tile: int, warps: int) -> RegisterLayout:
    """Tile [warps, groups, 8, 8] of scales: a thread holds those of its eight rows in the group that its columns lie in."""
    spread = column_spatial(1, groups_per_tile, 8, 1) * replicated(4 // groups_per_tile, 4)
    return spatial(warps, 1, 1, 1) * spread * local(1, 1, 1, 8)


def activation_layout(tokens: int, warps: int) -> RegisterLayout:
    """Tile [tokens, warps * 64] of activations: a thread holds 16 consecutive columns of its tokens."""
    return spatial(1, warps) * local(tokens // 8, 1).spatial(8, 4).local(1, 16)


def groups_per_tile(group: int) -> int:
    """Scales along the columns of a tile: of the groups shorter than a tile, others than 16 and 32 are all of a narrow K."""
    return TILE // group if group in (16, 32) else 1


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A packed weight: `value[n, k] = scale[n, k // group] * decode(code[n, k]) (+ minimum[n, k // group])`.

    codes: uint8 [N/64, K/64, 512 * nbits]. scales, minimums: f16 [N/64, K/64, groups per tile, 8, 8]; a group longer than a tile
    repeats its scale in each. Arrays are torch tensors or numpy arrays. shape: (N, K) as the model has it, without padding.
    folded: the codes are small floats, and all scales times 2 to the difference of exponent biases are finite f16 (and bf16).
    packed_for: the dtype of activations, f16 or bf16, for which the order of the codes' bits is the best.
    """

    codes: Any
    scales: Any
    minimums: Any | None
    dtype: DataType
    shape: tuple[int, int]
    group: int
    folded: bool = False
    packed_for: DataType = f16

    @property
    def groups_per_tile(self) -> int:
        return groups_per_tile(self.group)

    @property
    def nbytes(self) -> int:
        """Bytes that a product with this weight reads."""
        parts = (self.codes, self.scales) if self.minimums is None else (self.codes, self.scales, self.minimums)
        return sum(int(part.nbytes) for part in parts)

    def to(self, device: Any) -> QuantizedWeight:
        """The weight on another torch device."""
        minimums = None if self.minimums is None else self.minimums.to(device)
        return replace(self, codes=self.codes.to(device), scales=self.scales.to(device), minimums=minimums)


def pack(
    codes: Any,
    scales: Any,
    dtype: DataType,
    mins: Any | None = None,
    *,
    group: int | None = None,
    packed_for: DataType = f16,
) -> QuantizedWeight:
    """Pack a weight for `linear`.

    codes: uint8 [N, K], the raw codes in the low bits. scales, mins: f16 [N, K / group]. group: 16, 32, 64, 128 or K; by default
    what the shape of the scales implies. packed_for: the dtype of the activations; others work, but take more instructions for
    small floats. Torch tensors give torch tensors on the same device, numpy arrays numpy arrays.
    Raises: TilusError for shapes, groups or types that do not fit.
    """
    code_array, scale_array = _numpy(codes), _numpy(scales)
    _check(code_array, scale_array, None if mins is None else _numpy(mins), dtype, group)
    n, k = code_array.shape
    width = k // scale_array.shape[1]
    packed = _pack_codes(code_array, packed_order(dtype, packed_for))
    parts = [packed, _pack_scales(scale_array, k, width)]
    minimums = None if mins is None else _like(mins, _pack_scales(_numpy(mins), k, width))
    return QuantizedWeight(
        _like(codes, parts[0]),
        _like(scales, parts[1]),
        minimums,
        dtype,
        (n, k),
        width,
        _is_foldable(scale_array, dtype),
        packed_for,
    )


def _is_foldable(scales: Array, dtype: DataType) -> bool:
    """Whether the codes leave a power of two to the scales, and that multiplies them to finite f16 and bf16."""
    largest = np.abs(scales.astype(np.float32)).max(initial=0)
    return scale_exponent(dtype, f16) != 0 and all(
        float(act.round(largest)) * 2.0 ** scale_exponent(dtype, act) <= act.max_value for act in (f16, bf16)
    )


def unpack(weight: QuantizedWeight) -> tuple[Array, Array, Array | None]:
    """codes uint8 [N, K], scales f16 [N, K / group] and minimums as they were given to `pack`, as numpy arrays."""
    n, k = weight.shape
    codes = _unpack_codes(_numpy(weight.codes), packed_order(weight.dtype, weight.packed_for))[:n, :k]
    groups = k // weight.group
    minimums = None if weight.minimums is None else _unpack_scales(_numpy(weight.minimums), n, groups, weight.group)
    return codes, _unpack_scales(_numpy(weight.scales), n, groups, weight.group), minimums


def quantize(weight: Any, dtype: DataType, group: int | None = None) -> QuantizedWeight:
    """Round a weight [N, K] to nearest codes of `dtype`, with one f16 scale per group such that the largest magnitude fits.

    Unsigned integer types also get a minimum per group, so that they cover the range of its values.
    """
    values = np.asarray(_numpy(weight), np.float32)
    n, k = values.shape
    width = k if group is None else group
    if k % width:
        raise TilusError(f"groups of {width} do not divide K = {k}", hint="choose a group that divides K, or K itself")
    grouped = values.reshape(n, k // width, width)
    if dtype.is_integer and not dtype.is_signed:
        low, high = grouped.min(-1), grouped.max(-1)
        scale = ((high - low) / dtype.max_value).astype(np.float16)
        minimum: Array | None = low.astype(np.float16)
        centred = grouped - low.astype(np.float16).astype(np.float32)[..., None]
    else:
        limit = max(dtype.max_value, 1) if dtype.is_float or dtype.nbits > 1 else 1
        scale, minimum = (np.abs(grouped).max(-1) / limit).astype(np.float16), None
        centred = grouped
    divisor = scale.astype(np.float32)[..., None]
    ratio = np.divide(centred, divisor, out=np.zeros_like(centred), where=divisor != 0)
    codes = dtype.encode(ratio).reshape(n, k).astype(np.uint8)
    mins = None if minimum is None else _like(weight, minimum)
    return pack(_like(weight, codes), _like(weight, scale), dtype=dtype, mins=mins, group=width)


def _check(codes: Array, scales: Array, mins: Array | None, dtype: DataType, group: int | None) -> None:
    if not dtype.is_small:
        raise TilusError(f"weights of {dtype.name}, expected a type of 1 to 8 bits")
    if codes.ndim != 2 or codes.dtype != np.uint8:
        raise TilusError(f"codes of shape {list(codes.shape)} and dtype {codes.dtype}, expected uint8 [N, K]")
    n, k = codes.shape
    if scales.ndim != 2 or scales.shape[0] != n or scales.dtype != np.float16 or k % scales.shape[1]:
        raise TilusError(
            f"scales of shape {list(scales.shape)} and dtype {scales.dtype} for codes of shape {[n, k]}, "
            "expected float16 [N, K / group]"
        )
    width = k // scales.shape[1]
    if group is not None and group != width:
        raise TilusError(f"group is {group}, the scales of shape {list(scales.shape)} imply {width} for K = {k}")
    if width not in (*GROUPS, k):
        raise TilusError(f"groups of {width} columns, expected one of {', '.join(map(str, GROUPS))} or K = {k}")
    if mins is not None and (mins.shape != scales.shape or mins.dtype != np.float16):
        raise TilusError(
            f"mins of shape {list(mins.shape)} and dtype {mins.dtype}, "
            f"expected those of scales: {list(scales.shape)} float16"
        )
    if codes.size and int(codes.max()) >= dtype.num_codes:
        raise TilusError(f"code {int(codes.max())}, expected less than {dtype.num_codes} for {dtype.name}")


@lru_cache
def _column_order() -> tuple[int, ...]:
    """For each position in a packed tile the column of the weight that stands there."""
    return tuple(int(x) for x in np.arange(TILE).reshape(4, 4, 2, 2).transpose(1, 2, 0, 3).ravel())


@lru_cache
def _slots() -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Row and column of the weight tile for every (thread, slot), [32, 128] each."""
    table = fragment_layout(1).table()
    return table[..., 1].astype(np.intp), np.asarray(_column_order(), np.intp)[table[..., 2]]


def _pack_codes(codes: Array, order: CodeOrder) -> npt.NDArray[np.uint8]:
    n, k = codes.shape
    tiles_n, tiles_k = -(-n // TILE), -(-k // TILE)
    padded = np.zeros((tiles_n * TILE, tiles_k * TILE), np.uint8)
    padded[:n, :k] = codes
    tiles = padded.reshape(tiles_n, TILE, tiles_k, TILE).transpose(0, 2, 1, 3)
    rows, columns = _slots()
    strings = order.pack(tiles[:, :, rows, columns])
    chunks = strings.reshape(tiles_n, tiles_k, 32, order.dtype.nbits, 16).transpose(0, 1, 3, 2, 4)
    return np.ascontiguousarray(chunks).reshape(tiles_n, tiles_k, 512 * order.dtype.nbits)


def _unpack_codes(packed: Array, order: CodeOrder) -> npt.NDArray[np.uint8]:
    tiles_n, tiles_k, _ = packed.shape
    chunks = packed.reshape(tiles_n, tiles_k, order.dtype.nbits, 32, 16).transpose(0, 1, 3, 2, 4)
    strings = np.ascontiguousarray(chunks).reshape(tiles_n, tiles_k, 32, 16 * order.dtype.nbits)
    rows, columns = _slots()
    tiles = np.empty((tiles_n, tiles_k, TILE, TILE), np.uint8)
    tiles[:, :, rows, columns] = order.unpack(strings)
    return tiles.transpose(0, 2, 1, 3).reshape(tiles_n * TILE, tiles_k * TILE)


def _pack_scales(scales: Array, k: int, group: int) -> npt.NDArray[np.float16]:
    n = scales.shape[0]
    tiles_n, tiles_k, per_tile = -(-n // TILE), -(-k // TILE), groups_per_tile(group)
    first = np.arange(tiles_k * per_tile) * (TILE // per_tile)  # the column where each scale of a tile begins to hold
    inside = first < k
    padded = np.zeros((tiles_n * TILE, first.size), np.float16)
    padded[:n, inside] = scales[:, first[inside] // group]
    return np.ascontiguousarray(padded.reshape(tiles_n, 8, 8, tiles_k, per_tile).transpose(0, 3, 4, 2, 1))


def _unpack_scales(packed: Array, n: int, groups: int, group: int) -> Array:
    tiles_n, tiles_k, per_tile = packed.shape[:3]
    rows = packed.transpose(0, 4, 3, 1, 2).reshape(tiles_n * TILE, tiles_k * per_tile)
    return rows[:n, np.arange(groups) * group * per_tile // TILE]


def _numpy(value: Any) -> Array:
    return value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)


def _like(original: Any, array: Array) -> Any:
    """A numpy array as what `original` is: a torch tensor on its device, or the array itself."""
    if not hasattr(original, "detach"):
        return array
    import torch

    return torch.from_numpy(array).to(original.device)
