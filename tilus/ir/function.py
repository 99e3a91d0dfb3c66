"""A kernel: parameters, launch grid and body."""

from __future__ import annotations

from dataclasses import dataclass

from tilus.errors import Loc, TilusError
from tilus.ir.expr import Expr, Var
from tilus.ir.stmt import Stmt
from tilus.ir.tensor import GlobalTensor


@dataclass(frozen=True, eq=False)
class TensorParam:
    """A tensor argument. Its pointer and those of its dims and strides that are variables become kernel parameters."""

    name: str
    tensor: GlobalTensor


@dataclass(frozen=True, eq=False)
class ScalarParam:
    name: str
    var: Var


Param = TensorParam | ScalarParam


@dataclass(frozen=True, eq=False)
class Function:
    """params: as the user wrote them. grid: up to three extents over dims and scalars. A block has `num_warps` * 32 threads.

    blocks_per_sm: how many blocks must fit on a multiprocessor, which limits registers. cluster: so many blocks, neighbours along
    x, run at the same time and reach each other's shared memory. ends_alone: a block may end while others of its cluster run.
    """

    name: str
    params: tuple[Param, ...]
    grid: tuple[Expr, ...]
    num_warps: int
    body: Stmt
    loc: Loc | None = None
    blocks_per_sm: int = 1
    cluster: int = 1
    ends_alone: bool = False

    @property
    def num_threads(self) -> int:
        return 32 * self.num_warps

    @property
    def warps(self) -> range:
        return range(self.num_warps)

    def check_grid(self, grid: tuple[int, int, int]) -> None:
        """Raise TilusError unless the blocks of a grid make whole clusters."""
        if grid[0] % self.cluster:
            raise TilusError(
                f"the grid of kernel {self.name} is {grid[0]} in x, expected a multiple of its cluster of {self.cluster} blocks",
                loc=self.loc,
                hint=f"round it up, tilus.cdiv(n, {self.cluster}) * {self.cluster}, and let the blocks behind the end do nothing",
            )

    def kernel_params(self) -> tuple[Var, ...]:
        """The scalars passed to the kernel, in order: pointers, then each dim and stride variable once, then scalars."""
        ordered: dict[Var, None] = {}
        for param in self.params:
            if isinstance(param, TensorParam):
                ordered[param.tensor.base] = None
        for param in self.params:
            if isinstance(param, TensorParam):
                for expr in (*param.tensor.shape, *param.tensor.strides):
                    if isinstance(expr, Var):
                        ordered[expr] = None
            else:
                ordered[param.var] = None
        return tuple(ordered)
