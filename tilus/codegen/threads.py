"""Who runs the code that an instruction emits: thread numbers, elected threads, barriers, the thread's part of a layout."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

from tilus.codegen.linear import Linear, of_const, of_reg, register
from tilus.codegen.scalar import divide_nonnegative
from tilus.errors import TilusError
from tilus.layout import RegisterLayout
from tilus.ptx.builder import Builder
from tilus.ptx.module import Guard, Imm, Reg

NUM_BARRIERS = 16  # of a block, for all of its threads or some of its warps


@dataclass
class ThreadContext:
    """warps: that run the code: the block's, or those of a role. barriers: the hardware barrier of each group of warps.
    cluster: how many blocks make one."""

    b: Builder
    warps: range
    barriers: dict[range, int]
    cluster: int

    @property
    def num_threads(self) -> int:
        """Threads that run the code: the block's, or those of a role."""
        return 32 * len(self.warps)

    @contextmanager
    def role(self, warps: range) -> Generator[None]:
        """Code that only these warps run."""
        outer, self.warps = self.warps, warps
        with self.b.role(32 * warps.start):
            yield
        self.warps = outer

    def thread_id(self) -> Reg:
        """The thread's number among those that run the code."""
        return self.b.thread_id()

    def elected(self) -> Reg:
        """True in one thread of every warp."""
        return self.b.second("elect.sync", Imm(0xFFFFFFFF))

    def elected_in_other_warps(self) -> Reg | None:
        """True in one thread of every warp but the first; None where there is no other warp."""
        if len(self.warps) == 1:
            return None
        is_other = self.b.pure("setp.ge.u32", self.thread_id(), Imm(32))
        return self.b.pure("and.pred", is_other, self.elected())

    def elected_in_group(self) -> Reg:
        """True in one of the threads that run the code: the elected one of their first warp."""
        if len(self.warps) == 1:
            return self.elected()
        is_first = self.b.pure("setp.lt.u32", self.thread_id(), Imm(32))
        return self.b.pure("and.pred", is_first, self.elected())

    def digit(self, stride: int, size: int) -> Linear:
        """`(thread // stride) % size`."""
        value: Linear = of_reg(self.thread_id())
        if stride > 1:
            value = self._thread_quotient(value, stride)
        if stride * size >= self.num_threads:
            return value
        if size & (size - 1) == 0:
            return of_reg(self.b.pure("and.b32", register(self.b, value), Imm(size - 1)))
        return of_reg(register(self.b, value - self._thread_quotient(value, size).scaled(size)))

    def _thread_quotient(self, value: Linear, divisor: int) -> Linear:
        reg = register(self.b, value)
        if divisor & (divisor - 1) == 0:
            return of_reg(self.b.pure("shr.u32", reg, Imm(divisor.bit_length() - 1)))
        return of_reg(divide_nonnegative(self.b, reg, divisor))

    def thread_index(self, layout: RegisterLayout) -> list[Linear]:
        """The part of a tile index that the thread decides, one linear form per dimension."""
        index = [of_const(0) for _ in layout.shape]
        for term in layout.thread_terms:
            if term.dim is not None:
                index[term.dim] = index[term.dim] + self.digit(term.stride, term.size).scaled(term.weight)
        return index

    def local_index(self, layout: RegisterLayout, slot: int) -> list[int]:
        """The part of a tile index that the local slot decides."""
        index = [0 for _ in layout.shape]
        for term in layout.local_terms:
            if term.dim is not None:
                index[term.dim] += slot // term.stride % term.size * term.weight
        return index

    def first_replica(self, layout: RegisterLayout) -> Reg | None:
        """True in one of the threads that hold the same elements; None when no element is held twice."""
        guard: Reg | None = None
        for term in layout.thread_terms:
            if term.dim is None and term.size > 1:
                digit = register(self.b, self.digit(term.stride, term.size))
                is_zero = self.b.pure("setp.eq.s32", digit, Imm(0))
                guard = is_zero if guard is None else self.b.pure("and.pred", guard, is_zero)
        return guard

    def both(self, first: Reg | None, second: Reg | None) -> Reg | None:
        """Conjunction of two predicates, where None is true."""
        if first is None or second is None:
            return second if first is None else first
        return self.b.pure("and.pred", first, second)

    def guard(self, pred: Reg | None) -> Guard | None:
        return None if pred is None else Guard(pred)

    def barrier(self) -> None:
        """Wait for all threads that run the code: of the block, or of a role."""
        number = self.barriers.setdefault(self.warps, len(self.barriers))
        if number == 0:
            self.b.emit_to("bar.sync", Imm(0))
        elif len(self.warps) == 1:
            self.warp_barrier()
        elif number < NUM_BARRIERS:
            self.b.emit_to("bar.sync", Imm(number), Imm(self.num_threads))
        else:
            raise TilusError(
                f"this is the barrier of group {number + 1} of warps, a block has {NUM_BARRIERS}",
                hint="let several roles have the same warps, or do without tilus.sync in some",
            )

    def cluster_barrier(self, *, bare: bool = False) -> None:
        """Wait for all threads of all blocks of the cluster, whose memory accesses before it are then visible to each other.

        bare: nothing is to be seen but mbarriers, which are fenced as they are made; a release would wait for all accesses.
        """
        self.b.emit_to(f"barrier.cluster.arrive.{'relaxed' if bare else 'release'}.aligned")
        self.b.emit_to("barrier.cluster.wait.acquire.aligned")

    def warp_barrier(self) -> None:
        """Wait for all threads of the warp."""
        self.b.emit_to("bar.warp.sync", Imm(0xFFFFFFFF))
