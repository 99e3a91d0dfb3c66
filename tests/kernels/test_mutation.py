"""The tests of kernels notice wrong code: the PTX of kernels is damaged in one place at a time, and every mutant must fail.

A mutant is killed when the emulator raises or the result is outside of the bound that the right kernel keeps. Kinds of damage:
a barrier deleted, a wait that waits for one group less, a commit, fence, arrival or copy left out, two registers of a tensor-core
fragment or of a vector load swapped, a shared-memory address that is 16 bytes off.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rounding import Array, float64
from weights import exact, random_matrix

import tilus
from tilus.compiler import Compiled, compile_function
from tilus.kernels import linear, paged_attention
from tilus.kernels.attention import paged_attention_kernel
from tilus.kernels.linear import quantized_linear
from tilus.kernels.quantize import pack
from tilus.lang.kernel import Kernel
from tilus.ptx.module import Address, Imm, Instr, Item, Module, Vector
from tilus.runtime import execute
from tilus.runtime.emulator import EmulatorError

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"


@dataclass(frozen=True, eq=False)
class Subject:
    """A kernel, a launch of it on the emulator that gives its result, and what the result must be."""

    kernel: Kernel
    launch: Callable[[], Array]
    exact: Array
    bound: Array | float

    def is_right(self) -> bool:
        return bool((np.abs(self.launch() - self.exact) <= self.bound).all())


def matmul(name: str, **options: int) -> Subject:
    kernel: Kernel = runpy.run_path(str(EXAMPLES / f"{name}.py"))["matmul"]
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(np.float16) for shape in ((136, 168), (168, 136)))

    def launch() -> Array:
        c = np.full((136, 136), np.nan, np.float16)
        kernel.on("emulator")(a, b, c, bm=64, bn=64, **options)
        return float64(c)

    exact = float64(a) @ float64(b)
    return Subject(kernel, launch, exact, 2.0**-10 * np.abs(exact) + 2.0**-12)


def quantized() -> Subject:
    """Whole tiles: damage to what is cut off at an edge would not be seen."""
    matrix = random_matrix(tilus.uint4, 128, 576, 32, mins=True)
    packed, x = pack(matrix, "cpu", "mma"), torch.randn(16, 576, generator=torch.Generator().manual_seed(0)).half()
    weight = exact(matrix)
    bound = 2.0**-10 * np.abs(float64(x)) @ weight.sizes.T
    return Subject(
        quantized_linear, lambda: float64(linear(x, packed, device="emulator")), float64(x) @ weight.values.T, bound
    )


def attention() -> Subject:
    """Two sequences in pages of 16: 70 queries after 90 cached tokens, and 40 after 60; one head of 64."""
    generator = torch.Generator().manual_seed(0)
    lengths = ((70, 160), (40, 100))
    q = torch.randn(110, 1, 64, generator=generator).half()
    cache = torch.randn(18, 2, 16, 1, 64, generator=generator).half()
    tables = torch.randperm(18, generator=generator).int()[:17]
    tables = torch.stack([tables[:10], torch.nn.functional.pad(tables[10:], (0, 3))])
    q_start, kv_lens = torch.tensor([0, 70, 110], dtype=torch.int32), torch.tensor([160, 100], dtype=torch.int32)
    exact = np.zeros((110, 1, 64))
    for row, (queries, tokens) in enumerate(lengths):
        keys, values = (float64(cache[tables[row].long(), part].reshape(-1, 64)[:tokens]) for part in (0, 1))
        begin = int(q_start[row])
        scores = float64(q[begin : begin + queries, 0]) @ keys.T / 8
        scores[np.arange(tokens) > np.arange(tokens - queries, tokens)[:, None]] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        exact[begin : begin + queries, 0] = weights / weights.sum(-1, keepdims=True) @ values

    def launch() -> Array:
        return float64(paged_attention(q, cache, tables, q_start, kv_lens, 0.125, device="emulator"))

    return Subject(paged_attention_kernel, launch, exact, 2.0**-8)


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "matmul_v1": lambda: matmul("matmul_v1"),
    "matmul_v3": lambda: matmul("matmul_v3"),
    "matmul_v4": lambda: matmul("matmul_v4"),
    "matmul_v5": lambda: matmul("matmul_v5", stages=2),
    "quantized_linear": quantized,
    "paged_attention": attention,
}

# A kind of damage: an instruction to what stands in its place, () for nothing; None where the kind does not apply.
Damage = Callable[[Instr], tuple[Instr, ...] | None]


def without_barrier(instr: Instr) -> tuple[Instr, ...] | None:
    return () if instr.opcode.startswith("bar") else None


def waits_for_less(instr: Instr) -> tuple[Instr, ...] | None:
    if instr.opcode != "cp.async.wait_group":
        return None
    (pending,) = instr.operands
    assert isinstance(pending, Imm)
    return (replace(instr, operands=(Imm(pending.value + 1),)),)


def without_commit(instr: Instr) -> tuple[Instr, ...] | None:
    return () if instr.opcode == "cp.async.commit_group" else None


def without(prefix: str) -> Damage:
    return lambda instr: () if instr.opcode.startswith(prefix) else None


def waits_for_fewer_products(instr: Instr) -> tuple[Instr, ...] | None:
    if not instr.opcode.startswith("wgmma.wait_group"):
        return None
    (pending,) = instr.operands
    assert isinstance(pending, Imm)
    return (replace(instr, operands=(Imm(pending.value + 1),)),)


def with_swapped_sums(instr: Instr) -> tuple[Instr, ...] | None:
    return (swapped(instr, 0),) if instr.opcode.startswith("wgmma.mma_async") else None


def with_swapped_fragment(operand: int) -> Damage:
    """The first two registers of mma operand 0 (d), 1 (a) or 2 (b) in the other order."""

    def damage(instr: Instr) -> tuple[Instr, ...] | None:
        return (swapped(instr, operand),) if instr.opcode.startswith("mma.") else None

    return damage


def with_swapped_vector_load(instr: Instr) -> tuple[Instr, ...] | None:
    if not instr.opcode.startswith(("ld.global", "ldmatrix")) or not isinstance(instr.operands[0], Vector):
        return None
    return (swapped(instr, 0),)


def swapped(instr: Instr, operand: int) -> Instr:
    vector = instr.operands[operand]
    assert isinstance(vector, Vector)
    first, second, *rest = vector.elements
    operands = list(instr.operands)
    operands[operand] = Vector((second, first, *rest))
    return replace(instr, operands=tuple(operands))


def with_shifted_shared_address(instr: Instr) -> tuple[Instr, ...] | None:
    """The first address operand of a shared access (for cp.async that is the destination)."""
    if ".shared" not in instr.opcode:
        return None
    position = next((i for i, operand in enumerate(instr.operands) if isinstance(operand, Address)), None)
    if position is None:  # a fence
        return None
    address = instr.operands[position]
    assert isinstance(address, Address)
    operands = list(instr.operands)
    operands[position] = replace(address, offset=address.offset + 16)
    return (replace(instr, operands=tuple(operands)),)


PIPELINED = ("matmul_v3", "matmul_v4", "paged_attention")
OF_WARPS = ("matmul_v1", *PIPELINED, "quantized_linear")
HOPPER = ("matmul_v5",)
KINDS: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "no barrier": (without_barrier, tuple(SUBJECTS)),
    "short wait": (waits_for_less, PIPELINED),
    "no commit": (without_commit, PIPELINED),
    "swapped d": (with_swapped_fragment(0), OF_WARPS),
    "swapped a": (with_swapped_fragment(1), OF_WARPS),
    "swapped b": (with_swapped_fragment(2), OF_WARPS),
    "swapped load": (with_swapped_vector_load, OF_WARPS),
    "shifted address": (with_shifted_shared_address, tuple(SUBJECTS)),
    "no wgmma fence": (without("wgmma.fence"), HOPPER),
    "no wgmma commit": (without("wgmma.commit_group"), HOPPER),
    "short wgmma wait": (waits_for_fewer_products, HOPPER),
    "swapped sums": (with_swapped_sums, HOPPER),
    "no proxy fence": (without("fence.proxy.async"), HOPPER),
    "no arrival": (without("mbarrier.arrive"), HOPPER),
    "no copy": (without("cp.async.bulk.tensor"), HOPPER),
    "no wait at a barrier": (without("mbarrier.try_wait"), HOPPER),
}
# How many mutants are right all the same.
HARMLESS = {
    # The threads of a warp go the same way here, so those of one that arrives need not wait for each other.
    ("no barrier", "matmul_v5"): 2,
    # Reductions wait for earlier users of the scratch memory; this one has none before it.
    ("no barrier", "quantized_linear"): 1,
    # The last wait is for copies that nobody reads.
    ("short wait", "paged_attention"): 1,
    # A product with ones adds up activations: all ones are the same, and so are sums in any order.
    ("swapped a", "quantized_linear"): 1,
    ("swapped b", "quantized_linear"): 1,
}
MAX_SITES = 4  # mutants per kind whose sites are many and alike: spread from the first to the last


def mutants(compiled: Compiled, damage: Damage) -> Iterator[tuple[str, Compiled]]:
    """Compiled kernels that differ from `compiled` in one place."""
    module = compiled.lowered.module
    (kernel,) = module.kernels
    sites = [i for i, item in enumerate(kernel.body) if isinstance(item, Instr) and damage(item) is not None]
    if len(sites) > 2 * MAX_SITES:
        sites = [sites[round(j * (len(sites) - 1) / (MAX_SITES - 1))] for j in range(MAX_SITES)]
    for site in sites:
        old = kernel.body[site]
        assert isinstance(old, Instr)
        body: tuple[Item, ...] = (*kernel.body[:site], *(damage(old) or ()), *kernel.body[site + 1 :])
        changed: Module = replace(module, kernels=(replace(kernel, body=body),))
        yield f"item {site}: {old}", replace(compiled, lowered=replace(compiled.lowered, module=changed))


def compiled_by_a_launch(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> Compiled:
    """What the subject's launch runs; the launch must be right."""
    seen: list[Compiled] = []

    def compile_and_keep(*args: Any) -> Compiled:
        seen.append(compile_function(*args))
        return seen[-1]

    monkeypatch.setattr(execute, "compile_function", compile_and_keep)
    monkeypatch.setattr(subject.kernel, "_launchers", {})  # nothing that was prepared before
    assert subject.is_right()
    (compiled,) = seen
    return compiled


@pytest.mark.sampled(9)
@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, (_, names) in KINDS.items() for name in names]
)  # fmt: skip
def test_damage_is_noticed(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, damage = SUBJECTS[name](), KINDS[kind][0]
    original = compiled_by_a_launch(subject, monkeypatch)
    survivors: list[str] = []
    count = 0
    expected = HARMLESS.get((kind, name), 0)
    for description, mutant in mutants(original, damage):
        count += 1
        monkeypatch.setattr(execute, "compile_function", lambda *_, mutant=mutant: mutant)
        monkeypatch.setattr(subject.kernel, "_launchers", {})
        try:
            if subject.is_right():
                survivors.append(description)
        except EmulatorError:
            pass
    assert count > 0, f"{name} has no place for this kind of damage"
    assert len(survivors) == expected, "\n".join(survivors)
