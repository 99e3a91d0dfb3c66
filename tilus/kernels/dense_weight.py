"""Weights of 16 bits that nobody quantised, for the same `linear` as the packed ones: on Hopper by `gemm`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tilus.errors import TilusError
from tilus.kernels.activation import Activation
from tilus.kernels.allocate import is_cuda
from tilus.kernels.gemm import gemm
from tilus.kernels.linear import gpu_of
from tilus.kernels.quantize.gates import PAIR_ROWS, interleaved
from tilus.runtime.execute import place

DENSE_DTYPES = ("float16", "bfloat16")


@dataclass(frozen=True, eq=False)
class DenseWeight:
    """values: float16 or bfloat16 [N, K], a torch tensor or numpy array, rows contiguous and of a multiple of 16 bytes. is_gated:
    whether the rows are gates and their factors, in the order of `quantize.gates`.

    Raises: TilusError for anything else.
    """

    values: Any
    is_gated: bool = False

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


def pack_dense(values: Any, *, gated: bool = False) -> DenseWeight:
    """The weight of values as `DenseWeight` takes them, for `linear`. gated: the N rows are gates, and then their factors, for
    `linear` with an activation; they are copied.

    Raises: TilusError as `DenseWeight` does, and for a gated weight whose N is no multiple of 16.
    """
    if gated and int(values.shape[0]) % PAIR_ROWS:
        raise TilusError(f"a gated weight of {int(values.shape[0])} rows, expected a multiple of {PAIR_ROWS}")
    return DenseWeight(interleaved(values) if gated else values, gated)


def dense_linear(
    x: Any, weight: DenseWeight, bias: Any, activation: Activation | None, out_dtype: Any, out: Any, device: str | None,
    invariant: bool,
) -> Any:  # fmt: skip
    """`linear` with a dense weight; the parameters are its own, activation as a function.

    Raises: TilusError where there is no tensor core of Hopper, and when x has another dtype than the weight.
    """
    on_gpu = place(device, is_cuda(x)) == "cuda"
    if on_gpu and gpu_of(x).target.sm != 90:
        raise TilusError(
            f"linear with a weight of {weight.values.dtype} on sm_{gpu_of(x).target.sm}, expected sm_90",
            hint="quantise it: `quantize.pack(quantize(weight, dtype, group), device)`",
        )
    return gemm(
        x, weight.values, bias=bias, activation=activation,
        out_dtype=x.dtype if out is None and out_dtype is None else out_dtype, out=out, constant=True, device=device,
        invariant=invariant,
    )  # fmt: skip
