"""Random quantised weights and what they stand for, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tilus.dtypes import DTYPES, DataType, f16
from tilus.kernels.quantize import QuantizedWeight, pack

CODE_TYPES = [t for t in DTYPES.values() if t.is_small]
INTEGERS = [t for t in CODE_TYPES if t.is_integer]
FLOATS = [t for t in CODE_TYPES if t.is_float]


def finite_codes(dtype: DataType) -> npt.NDArray[np.uint8]:
    """All codes but those of infinities and NaN."""
    codes = np.arange(dtype.num_codes, dtype=np.uint8)
    return codes[np.isfinite(np.float64(dtype.decode(codes)))]


@dataclass(frozen=True, eq=False)
class Weight:
    """codes [N, K]; scales, mins [N, K / group]."""

    dtype: DataType
    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float16]
    mins: npt.NDArray[np.float16] | None

    @property
    def group(self) -> int:
        return self.codes.shape[1] // self.scales.shape[1]

    @property
    def products(self) -> npt.NDArray[np.float64]:
        return np.float64(self.dtype.decode(self.codes)) * np.repeat(np.float64(self.scales), self.group, axis=1)

    @property
    def offsets(self) -> npt.NDArray[np.float64]:
        if self.mins is None:
            return np.zeros(self.codes.shape)
        return np.repeat(np.float64(self.mins), self.group, axis=1)

    def packed(self, packed_for: DataType = f16) -> QuantizedWeight:
        mins = None if self.mins is None else torch.from_numpy(self.mins)
        return pack(
            torch.from_numpy(self.codes), torch.from_numpy(self.scales), self.dtype, mins, packed_for=packed_for
        )


def random_weight(dtype: DataType, n: int, k: int, group: int, *, mins: bool = False, seed: int = 0) -> Weight:
    """Uniform codes; scales of both signs, about 1 / (largest value), so that products stay well inside of f16."""
    rng = np.random.default_rng(seed)
    codes = rng.choice(finite_codes(dtype), (n, k))
    shape = (n, k // group)
    scales = (rng.standard_normal(shape) / max(1, dtype.max_value)).astype(np.float16)
    return Weight(dtype, codes, scales, rng.standard_normal(shape).astype(np.float16) if mins else None)
