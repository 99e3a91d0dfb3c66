"""Weights of 16 bits that nobody quantised, for the same `linear` as the packed ones: on Hopper by `gemm`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tilus.errors import TilusError
from tilus.kernels.allocate import is_cuda
from tilus.kernels.gemm import gemm
from tilus.kernels.linear import gpu_of
from tilus.runtime.execute import place

DENSE_DTYPES = ("float16", "bfloat16")


@dataclass(frozen=True, eq=False)
class DenseWeight:
    """values: float16 or bfloat16 [N, K], a torch tensor or numpy array, rows contiguous and of a multiple of 16 bytes.

    Raises: TilusError for anything else.
    """

    values: Any

    def __post_init__(self) -> None:
        values = self.values
        name = str(values.dtype).removeprefix("torch.")
        if name not in DENSE_DTYPES or values.ndim != 2 or int(values.shape[1]) % 8:
            raise TilusError(
                f"a dense weight is {name}{list(values.shape)}, expected float16 or bfloat16 [N, K] with K a multiple of 8"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.values.shape[0]), int(self.values.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes that a product with this weight reads."""
        return int(self.values.nbytes)


def dense_linear(
    x: Any, weight: DenseWeight, bias: Any, out_dtype: Any, out: Any, device: str | None, invariant: bool
) -> Any:
    """`linear` with a dense weight; the parameters are its own.

    Raises: TilusError where there is no tensor core of Hopper, and when x has another dtype than the weight.
    """
    on_gpu = place(device, is_cuda(x)) == "cuda"
    if on_gpu and gpu_of(x).target.sm != 90:
        raise TilusError(
            f"linear with a weight of {weight.values.dtype} on sm_{gpu_of(x).target.sm}, expected sm_90",
            hint="quantise it: `quantize.pack(quantize(weight, dtype, group), device)`",
        )
    return gemm(
        x, weight.values, bias=bias, out_dtype=x.dtype if out is None and out_dtype is None else out_dtype, out=out,
        constant=True, device=device, invariant=invariant,
    )  # fmt: skip
