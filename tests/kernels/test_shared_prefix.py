"""shared_prefix_decode against attention in float64, whatever the tables share; the groups that it finds, and who has which."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from attention_batches import Batch, Inputs, exact_attention, exact_lse, limit_of, make_inputs, on_gpu
from hypothesis import given, settings
from hypothesis import strategies as st

from tilus import TilusError
from tilus.kernels import paged_decode
from tilus.kernels.attention_variant import AS_IT_IS, NO_VARIANT, Variant
from tilus.kernels.kv_cache import KV_FORMATS, quantized_cache
from tilus.kernels.paged_decode import units_of_codes
from tilus.kernels.paged_decode_split import share
from tilus.kernels.paged_prefill import as_f16
from tilus.kernels.shared_prefix import (
    find_shared_prefixes,
    launch,
    shared_plans,
    shared_prefix_decode,
    split_of,
    unit_of,
)
from tilus.kernels.shared_prefix_groups import (
    ENDS,
    FIELDS,
    LENGTH,
    MEMBER,
    MEMBERS,
    ORDER,
    TILE,
    TOKENS,
    members_of,
    places,
    prefix_results,
    row_heads,
    shared_prefix_groups_kernel,
)
from tilus.kernels.shared_prefix_kernel import SharedPlan, SharedProblem, shared_prefix_kernel
from tilus.kernels.shared_prefix_merge import shared_prefix_merge_kernel
from tilus.ptx.assembler import SpillError
from tilus.runtime.binaries import build
from tilus.target import get_target

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
PAGE = 16
LEAST = 256  # tokens


def shared_inputs(batch: Batch, common: list[int], seed: int = 0, order: list[int] | None = None) -> Inputs:
    """Each sequence begins with the first common[s] pages of the one in front of it, as far as that has them. order: in which
    sequences are counted so, by default as they come."""
    inputs = make_inputs(batch, seed)
    share_pages(batch, inputs.block_tables, common, order)
    return inputs


def share_pages(batch: Batch, tables: torch.Tensor, common: list[int], order: list[int] | None = None) -> None:
    """The same of the tables of a batch."""
    for before, row in itertools.pairwise(range(len(common)) if order is None else order):
        count = min(common[row], *(batch.lengths[s][1] // batch.page_size for s in (before, row)))
        tables[row, :count] = tables[before, :count]


def expected_order(tables: Any, lens: Any, q_len: int, page: int) -> list[int]:
    """Those that are long enough to share, by the page in which 256 tokens end, behind the others, who go backwards."""
    least = -(-LEAST // page)
    short = [row for row, n in enumerate(lens) if (int(n) - q_len + 1) // page < least]
    rest = [row for row in range(len(lens)) if row not in short]
    return short[::-1] + sorted(rest, key=lambda row: int(tables[row][least - 1]))


def expected_groups(tables: Any, lens: Any, q_len: int, page: int) -> list[tuple[int, int, int]]:
    """(first rank, sequences, tokens of the prefix) of all groups, one rank after another."""
    order = expected_order(tables, lens, q_len, page)
    tables, lens = [tables[row] for row in order], [lens[row] for row in order]
    common = [0]
    for row in range(1, len(lens)):
        most = max(0, min(int(lens[row]), int(lens[row - 1])) - q_len + 1) // page
        same = [bool(tables[row][i] == tables[row - 1][i]) for i in range(most)]
        common.append(same.index(False) if False in same else most)
    groups, first = list[tuple[int, int, int]](), 0
    for row in range(1, len(lens) + 1):
        if row < len(lens):
            beside = [common[i] for i in (row - 1, row + 1) if i < len(lens)]
            if common[row] * page >= LEAST and all(2 * common[row] >= other for other in beside):
                continue
        if row - first > 1:
            groups.append((first, row - first, min(common[first + 1 : row]) * page // 64 * 64))
        first = row
    return groups


def check_found(found: Any, tables: Any, lens: Any, q_len: int, members: int, page: int, unit: int) -> None:
    """What `find_shared_prefixes` gives, by rank, is what its groups say."""
    order = expected_order(tables, lens, q_len, page)
    assert found[ORDER].tolist() == order
    tokens, ends, tile = [0] * len(lens), 0, -1
    wanted = np.zeros((FIELDS, len(lens)), np.int64)
    for first, count, prefix in expected_groups(tables, lens, q_len, page):
        for member in range(count):
            tokens[first + member] = prefix
            wanted[MEMBER, first + member] = member % members
            wanted[MEMBERS, first + member] = min(members, count - member // members * members)
            tile += member % members == 0
            ends += (member % members == 0) * -(-prefix // unit)
            wanted[TILE, first + member], wanted[ENDS, first + member] = tile, ends
    wanted[TOKENS], wanted[LENGTH] = tokens, np.array([lens[row] for row in order]) - tokens
    shared = np.array(tokens) > 0
    for field in (TOKENS, LENGTH):
        assert np.array_equal(found[field], wanted[field])
    for field in (MEMBER, MEMBERS, TILE, ENDS):
        assert np.array_equal(found[field][shared], wanted[field][shared]), field
    assert np.array_equal(found[ENDS], np.maximum.accumulate(wanted[ENDS]))


def random_tables(rng: np.random.Generator, count: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Neighbours share nothing, a little, much or all, and larger batches are shuffled; lengths end before, at and
    behind what is shared."""
    tables = np.arange(count * 96, dtype=np.int32).reshape(count, 96)
    for row in range(1, count):
        same = int(rng.choice([0, 1, 15, 16, 17, 20, 24, 40, 41, 80, 81, 96]))
        tables[row, :same] = tables[row - 1, :same]
        if rng.integers(4) == 0:  # equal again behind a difference
            tables[row, same + 1 :] = tables[row - 1, same + 1 :]
    if count > 20:
        tables = tables[rng.permutation(count)]
    return tables, rng.choice([0, 1, 255, 256, 263, 300, 650, 1300, *[1536] * 12], count).astype(np.int32)


@pytest.mark.parametrize("device", ["reference", CUDA])
def test_groups_of_random_tables(device: str) -> None:
    rng = np.random.default_rng(0)
    for count, q_len, group in [(1, 1, 4), (2, 1, 1), (31, 3, 4), (64, 1, 16), (200, 8, 16), (33, 1, 8)] * 3:
        tables, lens = random_tables(rng, count)
        arguments = [torch.from_numpy(a) for a in (tables, lens)]
        if device == "cuda":
            arguments = [a.cuda() for a in arguments]
        found = find_shared_prefixes(*arguments, q_len, group, PAGE, device=device).cpu().numpy()
        check_found(found, tables, lens, q_len, members_of(q_len, group), PAGE, 128)


def test_groups_on_the_emulator() -> None:
    rng = np.random.default_rng(1)
    tables, lens = random_tables(rng, 21)
    found = find_shared_prefixes(torch.from_numpy(tables), torch.from_numpy(lens), 1, 16, PAGE, device="emulator")
    check_found(found.numpy(), tables, lens, 1, 8, PAGE, 128)


def without_spills(candidates: list[Any], assemble: Callable[[Any], Any]) -> Any:
    """By the first plan that the registers suffice for."""
    for plan in candidates:
        try:
            return assemble(plan)
        except SpillError as error:
            spilled = error
    raise spilled


def test_every_partial_result_has_a_place_of_its_own() -> None:
    """Of random groups: what the blocks of prefixes write is what the sequences add up, and nothing is written twice."""
    rng = np.random.default_rng(2)
    for count, blocks in [(2, 1), (17, 5), (40, 132), (64, 264), (9, 1000)]:
        tables, lens = random_tables(rng, count)
        q_len, group, kv_heads = 1, int(rng.choice([1, 4, 16])), int(rng.choice([1, 3, 8]))
        members = members_of(q_len, group)
        found = find_shared_prefixes(
            torch.from_numpy(tables), torch.from_numpy(lens), q_len, group, PAGE, device="reference"
        ).numpy()
        total, written = int(found[ENDS, -1]) * kv_heads, dict[int, tuple[int, int]]()
        first = {int(found[TILE, s]): s for s in reversed(range(count)) if found[TOKENS, s]}
        numbers = [
            (tile, head)
            for tile, s in sorted(first.items())
            for head in range(kv_heads)
            for _ in range(-(-int(found[TOKENS, s]) // 128))
        ]
        assert len(numbers) == total
        for block in range(blocks):
            for tile, head in dict.fromkeys(numbers[share(total, blocks, block) : share(total, blocks, block + 1)]):
                assert written.setdefault(block + tile * kv_heads + head, (tile, head)) == (tile, head)
        assert all(0 <= place < places(count, members, kv_heads, blocks) for place in written)
        for s in range(count):
            for head in range(kv_heads):
                many, place = prefix_results(found, s, head, kv_heads, 128, blocks)
                if not found[TOKENS, s]:
                    assert many == 0
                    continue
                pair = int(found[TILE, s]), head
                assert [place + i for i in range(many)] == sorted(p for p, of in written.items() if of == pair)


def check(batch: Batch, common: list[int], device: str, order: list[int] | None = None) -> None:
    """Within the bound of `limit_of`, with weights of 11 bits or more, as paged_decode; logarithms within f32 arithmetic."""
    inputs, q_len = shared_inputs(batch, common, order=order), batch.lengths[0][0]
    tensors = [inputs.q.unflatten(0, (-1, q_len)), inputs.kv_cache, inputs.block_tables, inputs.kv_lens]
    if device == "cuda":
        tensors = [on_gpu(t) for t in tensors]
    out, lse = shared_prefix_decode(*tensors, inputs.scale, return_lse=True, device=device)
    expected, size = exact_attention(inputs, batch)
    error = np.abs(out.flatten(0, 1).cpu().double().numpy() - expected)
    limit = limit_of(batch, expected, size, 2.0**-11)
    assert out.dtype == batch.dtype and out.shape == tensors[0].shape
    assert (error <= limit).all(), f"{batch}: off by {error.max()}, {(error / (limit + 1e-30)).max()} of the limit"
    wanted, found = exact_lse(inputs, batch), lse.flatten(0, 1).cpu().double().numpy()
    assert np.array_equal(np.isneginf(found), np.isneginf(wanted))
    finite = np.isfinite(wanted)
    assert np.abs(found[finite] - wanted[finite]).max(initial=0) < 2.0**-14


def decoding(kv_lens: tuple[int, ...], q_len: int = 1, **shape: Any) -> Batch:
    return Batch(tuple((q_len, n) for n in kv_lens), **shape)


TWO_GROUPS = (400, 500, 256, 20, 500, 660), [0, 20, 24, 0, 0, 30]


@pytest.mark.parametrize("device", [pytest.param("emulator", marks=pytest.mark.exhaustive), CUDA])
def test_two_groups(device: str) -> None:
    """Prefixes of different lengths, one whose sequence has nothing else, and a sequence that shares nothing; in a batch where
    they are no neighbours."""
    order, common = [4, 2, 0, 3, 1, 5], [0] * 6
    for row, pages in zip(order, TWO_GROUPS[1]):
        common[row] = pages
    lengths = [0] * 6
    for row, length in zip(order, TWO_GROUPS[0]):
        lengths[row] = length
    check(decoding(tuple(lengths), kv_heads=1, group=2, head_dim=64), common, device, order)


@pytest.mark.parametrize("device", [pytest.param("emulator", marks=pytest.mark.exhaustive), CUDA])
@pytest.mark.parametrize(
    ("batch", "common"),
    [
        (decoding((300,) * 9, 8, kv_heads=1, group=4), [18] * 9),  # more sequences than a row tile has
        (decoding((300, 280, 290), 2, kv_heads=2, group=1, head_dim=96), [17] * 3),
        (decoding((600, 700), 3, kv_heads=1, group=3, head_dim=96, dtype=torch.bfloat16), [33] * 2),
        (decoding((1100, 1100, 1050), kv_heads=1, group=16, head_dim=256), [66] * 3),
        (decoding((300, 290), 3, kv_heads=1, group=16), [17] * 2),  # more columns than a launch takes
        (decoding((900, 800, 810), kv_heads=2, group=4, page_size=256), [3] * 3),
        (decoding((500, 480, 530), kv_heads=2, group=4, page_size=64), [7] * 3),
        (decoding((0, 300, 3, 300), kv_heads=2, group=4), [0] * 4),  # nothing to share
    ],
    ids=str,
)
def test_shapes(batch: Batch, common: list[int], device: str) -> None:
    check(batch, common, device)


@pytest.mark.exhaustive
@given(
    st.lists(st.tuples(st.integers(0, 700), st.sampled_from([0, 16, 20, 40])), min_size=2, max_size=5),
    st.integers(1, 4),
    st.integers(1, 3),
)
@settings(max_examples=4)
def test_any_batch(sequences: list[tuple[int, int]], group: int, q_len: int) -> None:
    batch = decoding(tuple(length for length, _ in sequences), q_len, kv_heads=1, group=group)
    check(batch, [common for _, common in sequences], "reference")


def test_pages_of_a_prefix_are_read_for_the_first_sequence_alone() -> None:
    """With those of the others gone, the result is what it was."""
    batch = decoding(TWO_GROUPS[0], kv_heads=1, group=2)
    inputs = shared_inputs(batch, TWO_GROUPS[1])
    q = inputs.q[:, None]
    shared = find_shared_prefixes(inputs.block_tables, inputs.kv_lens, 1, 2, PAGE, device="reference")
    tokens = dict(zip(shared[ORDER].tolist(), shared[TOKENS].tolist()))
    assert [tokens[row] for row in range(6)] == [256, 256, 256, 0, 448, 448]
    plan = next(shared_plans(1, 2, 64))

    def attend(tables: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q)
        launch(q, inputs.kv_cache, tables, shared, inputs.scale, plan, False, "reference", AS_IT_IS, out)
        return out

    whole = attend(inputs.block_tables)
    first = inputs.block_tables.clone()
    for row in (1, 2, 5):  # those of all but the first sequence of a group
        first[row, : tokens[row] // PAGE] = 2**20  # no page
    out = attend(first)
    assert torch.equal(out, whole)
    expected, size = exact_attention(inputs, batch)
    assert (np.abs(out[:, 0].double().numpy() - expected) <= limit_of(batch, expected, size)).all()


def test_groups_found_once_serve_all_layers() -> None:
    """The same bits with groups that are given; those of another batch are refused; one sequence shares nothing."""
    batch = decoding((300, 290), kv_heads=1, group=2)
    inputs = shared_inputs(batch, [0, 17])
    args = (inputs.q[:, None], inputs.kv_cache, inputs.block_tables, inputs.kv_lens, inputs.scale)
    shared = find_shared_prefixes(inputs.block_tables, inputs.kv_lens, 1, 2, PAGE, device="reference")
    out = shared_prefix_decode(*args, device="reference")
    assert torch.equal(shared_prefix_decode(*args, shared=shared, device="reference"), out)
    with pytest.raises(TilusError, match=r"\[7, 1\] for 2 sequences, expected \[7, 2\]"):
        shared_prefix_decode(*args, shared=shared[:, :1], device="reference")
    one = (args[0][:1], args[1], args[2][:1], args[3][:1], args[4])
    assert torch.equal(shared_prefix_decode(*one, device="reference"), paged_decode(*one, device="reference"))


@pytest.mark.gpu
def test_a_captured_launch_follows_the_tables() -> None:
    """What is shared may change from replay to replay."""
    batch = decoding((700, 690, 680, 300), kv_heads=2, group=4, head_dim=128)
    inputs = shared_inputs(batch, [0, 30, 20, 0])
    tensors = [on_gpu(t) for t in (inputs.q[:, None], inputs.kv_cache, inputs.block_tables, inputs.kv_lens)]
    shared_prefix_decode(*tensors, inputs.scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = shared_prefix_decode(*tensors, inputs.scale)
    for common in ([0, 30, 20, 0], [0, 0, 0, 18], [0, 0, 0, 0]):
        now = shared_inputs(batch, common)
        tensors[2].copy_(now.block_tables)
        graph.replay()
        expected, size = exact_attention(dataclasses.replace(inputs, block_tables=now.block_tables), batch)
        error = np.abs(out[:, 0].cpu().double().numpy() - expected)
        assert (error <= limit_of(batch, expected, size)).all()


KINDS = [
    (128, 4, 16, 1),
    *((d, g, p, n) for d in (64, 96, 128) for g, p, n in ((1, 16, 8), (8, 64, 1), (8, 64, 4), (16, 256, 2))),
]


def assert_assembles(
    head_dim: int, group: int, page_size: int, q_len: int, name: str | None = None, variant: Variant = NO_VARIANT,
    most: int | None = None,
) -> None:  # fmt: skip
    """`build` raises for spills: the groups, by one of the first `most` plans prefixes and the rest, and the sums. name: of the
    format of a quantised cache."""
    half, tables = torch.bfloat16, torch.zeros(64, 32, dtype=torch.int32)
    lens, heads, found = tables[:, 0].contiguous(), row_heads(group), torch.zeros(7, 64, dtype=torch.int32)
    q = torch.zeros(64, q_len, 8, group, head_dim, dtype=half)
    cache, factors, kind = torch.zeros(8, 2, page_size, 8, head_dim, dtype=half), None, None
    q_rows, q_type = q.flatten(0, 1), None
    if name is not None:
        codes = quantized_cache(name, 8, page_size, 8, head_dim)
        cache, factors, kind, (q_rows, q_type) = units_of_codes(codes), codes.factors, codes.format, as_f16(q_rows)
    rows, own = torch.zeros(4, 128, head_dim), torch.zeros(9, q_len, group, head_dim)
    prefix, rest = ([part, part[..., 0].contiguous()] for part in (rows, own))
    notes = torch.zeros(4, 512, dtype=torch.int32)
    shape = {"q_len": q_len, "kv_heads": 8, "group": group, "head_dim": head_dim}

    def assembled(plan: SharedPlan) -> Any:
        split = split_of(plan, page_size, q_len, variant.window)
        special = shared_prefix_kernel.specialize(
            q, q_rows, cache, tables, found, notes, *prefix, *rest, 1.0, factors, torch.zeros(64), None, **shape,
            page_size=page_size, blocks=128, problem=SharedProblem(plan, unit_of(page_size), split, kind, q_type, variant),
        )  # fmt: skip
        return build(special.function, get_target("sm_90a"))[0]

    nbits = 16 if kind is None else kind.code.nbits
    compiled = without_spills(list(shared_plans(q_len, group, head_dim, nbits))[:most], assembled)
    assert all(text in compiled.ptx for text in ("cp.async.bulk.tensor.5d", "wgmma.mma_async", "mma.sync"))
    by_token = [part.unflatten(1, (128 // heads, heads)) for part in prefix]
    special = shared_prefix_merge_kernel.specialize(
        found, notes, *by_token, *rest, q, None, **shape, heads=heads, row_tokens=128 // heads
    )
    assert build(special.function, get_target("sm_90a"))[1]
    special = shared_prefix_groups_kernel.specialize(
        tables, lens, torch.zeros(2, 65, dtype=torch.int32), found, tables[0], q_len=q_len, page_size=page_size,
        members=members_of(q_len, group), unit=128, lanes=64,
    )  # fmt: skip
    assert build(special.function, get_target("sm_90a"))[1]


def test_the_usual_shape_assembles_by_the_first_plan() -> None:
    assert_assembles(*KINDS[0], most=1)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [None, *sorted(KV_FORMATS)])
@pytest.mark.parametrize(("head_dim", "group", "page_size", "q_len"), KINDS)
def test_assembles_without_spills(head_dim: int, group: int, page_size: int, q_len: int, name: str | None) -> None:
    assert_assembles(head_dim, group, page_size, q_len, name)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "int4" else pytest.mark.exhaustive) for name in sorted(KV_FORMATS)]
)
def test_codes_of_the_usual_shape_assemble_by_the_first_plan(name: str) -> None:
    assert_assembles(*KINDS[0], name, most=1)


@pytest.mark.parametrize("sequences", [2, 3, 17, pytest.param(500, marks=pytest.mark.exhaustive)])
def test_groups_of_any_number_of_sequences_assemble_without_spills(sequences: int) -> None:
    tables, found = torch.zeros(sequences, 32, dtype=torch.int32), torch.zeros(7, sequences, dtype=torch.int32)
    lens, common = tables[:, 0].contiguous(), torch.zeros(2, sequences + 1, dtype=torch.int32)
    special = shared_prefix_groups_kernel.specialize(
        tables, lens, common, found, lens[:1], q_len=1, page_size=16, members=32, unit=128,
        lanes=1 << (sequences - 1).bit_length(),
    )  # fmt: skip
    assert build(special.function, get_target("sm_90a"))[1]
