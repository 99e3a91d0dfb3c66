"""Every way of a conversion, executed by a small interpreter, brings every element where the destination has it.

The interpreter works on the plan's data with Python integers: it knows layouts only by their tables, and counts bank
conflicts by sets of words.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_pairs import pair_of_powers_of_two, pair_within_warps, random_layout_of, random_pair

from tilus.layout import (
    LayoutError,
    RegisterLayout,
    atoms,
    auto,
    column_local,
    column_spatial,
    local,
    replicated,
    spatial,
)
from tilus.layout.conversion import (
    ALU_CYCLES,
    BLOCK_BARRIER_CYCLES,
    WARP_BARRIER_CYCLES,
    WAVEFRONT_CYCLES,
    RegisterWay,
    ScratchWay,
    plan_conversion,
    through_scratch,
    words_per_access,
)
from tilus.layout.links import group_units, link_layouts, within_warp
from tilus.layout.scratch_plan import (
    ScratchPlan,
    Side,
    measured,
    orders,
    plan_in_scratch,
    rank,
    runs,
    unit_size,
)
from tilus.layout.shuffle_plan import (
    Traffic,
    coloured,
    plan_in_registers,
    program_of,
    schedules,
    warp_traffic,
)
from tilus.layout.word_program import Merge, Permute, Program, Rotate, Select, Shuffle

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64)
Words = list[list[int]]  # [thread][word]


def execute(program: Program, words: Words) -> Words:
    """The meaning of a program, from the docstrings of its operations; thread t is lane t % 32 of warp t // 32."""
    values = [list(thread[: program.num_inputs]) for thread in words]
    for operation in program.operations:
        made = []
        for t, mine in enumerate(values):
            match operation:
                case Permute(low, high, selector):
                    pool = (mine[high] << 32 | mine[low]).to_bytes(8, "little")
                    made.append(int.from_bytes(bytes(pool[selector >> 4 * k & 7] for k in range(4)), "little"))
                case Rotate(value, nbits):
                    made.append((mine[value] >> nbits | mine[value] << 32 - nbits) & 0xFFFFFFFF)
                case Merge(mask, first, second):
                    made.append(mine[first] & mask | mine[second] & ~mask)
                case Select(bit, one, zero):
                    made.append(mine[one] if t >> bit & 1 else mine[zero])
                case Shuffle(value, lanes):
                    made.append(values[t // 32 * 32 + lanes[t % len(lanes)]][value])
        for mine, value in zip(values, made, strict=True):
            mine.append(value)
    return [[mine[k] for k in program.outputs] for mine in values]


def addresses(plan: ScratchPlan, side: Side, thread: int) -> list[int]:
    """Of each access of a thread, in bytes from the start of its region."""
    part = sum(thread // stride % size * weight for stride, size, weight in side.pieces)
    found = [part + start for start in side.starts]
    return [(x if plan.swizzle is None else plan.swizzle.apply(x)) * plan.unit_nbytes for x in found]


def through_memory(way: ScratchWay, words: Words) -> Words:
    plan = way.scratch
    memory: dict[tuple[int, int], int] = {}  # (region, byte)
    nbytes, value_nbytes = plan.access_nbytes(plan.store), max(4, plan.unit_nbytes)
    for t, stored in enumerate(execute(way.pack, words)):
        if any(t // stride % size for stride, size in plan.replicas):
            continue
        count = words_per_access(plan, plan.store)
        for number, address in enumerate(addresses(plan, plan.store, t)):
            data = b"".join(w.to_bytes(value_nbytes, "little") for w in stored[number * count : (number + 1) * count])
            assert address % nbytes == 0 and address + nbytes <= plan.nbytes
            for at, byte in enumerate(data[:nbytes]):
                assert memory.setdefault((t // plan.num_threads, address + at), byte) is byte, "two threads store here"
    nbytes, loaded = plan.access_nbytes(plan.load), list[list[int]]()
    for t in range(len(words)):
        mine: list[int] = []
        for address in addresses(plan, plan.load, t):
            assert address % nbytes == 0
            data = bytes(memory[t // plan.num_threads, address + at] for at in range(nbytes))
            mine += [int.from_bytes(data[k : k + value_nbytes], "little") for k in range(0, nbytes, value_nbytes)]
        loaded.append(mine)
    return execute(way.unpack, loaded)


def check_wavefronts(plan: ScratchPlan) -> None:
    """Per warp and access: groups of lanes that fill 128 bytes; a bank serves one word at a time."""
    for side, replicas in ((plan.store, plan.replicas), (plan.load, ())):
        nbytes = max(4, plan.access_nbytes(side))
        total = extra = 0
        for group in range(0, plan.num_threads, 128 // nbytes):
            active = [t for t in range(group, group + 128 // nbytes) if not any(t // a % n for a, n in replicas)]
            for number in range(len(side.vectors)):
                starts = [addresses(plan, side, t)[number] for t in active]
                touched = {start // 4 + k for start in starts for k in range(nbytes // 4)}
                worst = max(Counter(word % 32 for word in touched).values(), default=0)
                total, extra = total + worst, extra + max(0, worst - 1)
        assert (side.wavefronts, side.extra) == (total, extra)


def tile_words(layout: RegisterLayout, codes: Sequence[int], nbits: int, rng: random.Random) -> Words:
    """The registers of every thread; bits behind the last slot are arbitrary."""
    value_nbits, result = max(32, nbits), list[list[int]]()
    for row in flat_table(layout):
        count = -(-len(row) * nbits // value_nbits)
        string = rng.getrandbits(count * value_nbits) >> len(row) * nbits << len(row) * nbits
        string |= sum(codes[element] << slot * nbits for slot, element in enumerate(row))
        result.append([string >> k * value_nbits & (1 << value_nbits) - 1 for k in range(count)])
    return result


def elements(words: Words, layout: RegisterLayout, nbits: int) -> list[list[int]]:
    """What each thread holds in each slot."""
    value_nbits = max(32, nbits)
    strings = [sum(word << k * value_nbits for k, word in enumerate(mine)) for mine in words]
    return [[s >> slot * nbits & (1 << nbits) - 1 for slot in range(layout.num_locals)] for s in strings]


def flat_table(layout: RegisterLayout) -> list[list[int]]:
    return np.ravel_multi_index(tuple(np.moveaxis(layout.table(), -1, 0)), layout.shape).tolist()


def check(src: RegisterLayout, dst: RegisterLayout, nbits: int, rng: random.Random) -> set[str]:
    """All ways, and that the first is the cheapest; the names of the ways."""
    plan = plan_conversion(src, dst, nbits)
    codes = [rng.getrandbits(nbits) for _ in range(src.size)]
    words = tile_words(src, codes, nbits, rng)
    expected = [[codes[element] for element in row] for row in flat_table(dst)]
    for way in plan.ways:
        if isinstance(way, ScratchWay):
            check_wavefronts(way.scratch)
        found = execute(way.program, words) if isinstance(way, RegisterWay) else through_memory(way, words)
        assert elements(found, dst, nbits) == expected, str(way)
        assert plan.chosen.cycles <= way.cycles
    return {way.name for way in plan.ways}


@settings(max_examples=50)
@given(st.randoms(use_true_random=False), st.sampled_from(WIDTHS), st.sampled_from([1, 1, 2, 3, 4]))
def test_all_ways_move_every_element(rng: random.Random, nbits: int, num_warps: int) -> None:
    """Any digits, replication on both sides, sizes of 3, 5 and 7, fields that straddle words."""
    check(*random_pair(rng, num_warps), nbits, rng)


@settings(max_examples=50)
@given(st.randoms(use_true_random=False), st.sampled_from(WIDTHS), st.sampled_from([1, 2, 4, 8]))
def test_all_ways_within_warps(rng: random.Random, nbits: int, num_slots: int) -> None:
    check(*pair_within_warps(rng, num_slots, rng.choice([1, 2])), nbits, rng)


def check_orders(src: RegisterLayout, dst: RegisterLayout, nbits: int, rng: random.Random) -> None:
    """Not only the chosen order: its data arrive, its wavefronts are counted right, and none is cheaper than the chosen one."""
    links = link_layouts(src, dst)
    units = group_units(within_warp(links) or links, max(1, 32 // nbits))
    codes = [rng.getrandbits(nbits) for _ in range(src.size)]
    words = tile_words(src, codes, nbits, rng)
    expected = [[codes[element] for element in row] for row in flat_table(dst)]
    best, nbytes = plan_in_scratch(units, nbits), unit_size(units, nbits)
    for run, rest in runs(units, nbytes):
        for order in orders(run, rest, nbytes):
            plan = measured(units, order, nbytes)
            check_wavefronts(plan)
            way = through_scratch(units, plan, nbits, src.num_locals)
            assert elements(through_memory(way, words), dst, nbits) == expected
            assert rank(best)[0] <= rank(plan)[0]


@settings(max_examples=12)
@given(st.randoms(use_true_random=False), st.sampled_from(WIDTHS))
def test_every_order_that_is_tried_is_right(rng: random.Random, nbits: int) -> None:
    check_orders(*rng.choice([random_pair(rng, 2), pair_of_powers_of_two(rng, 4, 2)]), nbits, rng)


@pytest.mark.parametrize("nbits", [8, 32])
def test_orders_of_a_transposition(nbits: int) -> None:
    """All lanes become slots and all slots lanes, so that a swizzle moves single units."""
    check_orders(spatial(32, 1).local(1, 32), local(32, 1).spatial(1, 32), nbits, random.Random(nbits))


def test_a_side_with_replicas_has_fewer_lanes_to_keep_apart() -> None:
    src = spatial(2, 1, 1, 1, 2, 1, 2).spatial(1, 1, 2, 1, 1, 2, 1).local(1, 2, 1, 2, 1, 1, 1).reshape((128,))
    lanes = column_spatial(1, 1, 1, 2, 2, 1, 2).replicated(2).spatial(1, 1, 2, 1, 1, 1, 1)
    dst = lanes.column_local(1, 2, 1, 1, 1, 2, 1).local(2, 1, 1, 1, 1, 1, 1).reshape((128,))
    (scratch,) = [way.scratch for way in plan_conversion(src, dst, 32).ways if isinstance(way, ScratchWay)]
    assert (scratch.access_nbytes(scratch.store), scratch.access_nbytes(scratch.load)) == (16, 8)
    assert scratch.extra_wavefronts == 0


@settings(max_examples=50)
@given(st.randoms(use_true_random=False), st.sampled_from(WIDTHS), st.sampled_from([1, 2, 4, 8, 16]))
def test_powers_of_two_have_no_bank_conflicts(rng: random.Random, nbits: int, num_slots: int) -> None:
    pair = pair_of_powers_of_two if rng.random() < 0.7 else pair_within_warps
    for way in plan_conversion(*pair(rng, num_slots, rng.choice([1, 2, 4, 8])), nbits).ways:
        if isinstance(way, ScratchWay):
            assert way.scratch.extra_wavefronts == 0


def test_every_kind_of_way_occurs() -> None:
    rng = random.Random(3)
    names = [check(*random_pair(rng, rng.choice([1, 2])), rng.choice(WIDTHS), rng) for _ in range(30)]
    rows, columns = local(4, 8) * spatial(32, 1), column_local(4, 8) * spatial(32, 1)
    names += [check(rows, columns, nbits, rng) for nbits in (8, 32)]
    names += [check(replicated(32, 1).local(32), spatial(32), 16, rng)]
    seen = Counter(name for found in names for name in found)
    assert min(seen[name] for name in ("shared memory", "shuffles", "selects", "permutes", "renaming")) > 0


def bits_that_move(src: RegisterLayout, dst: RegisterLayout) -> int:
    """How many lane bits of the destination number slots of the source, by enumeration of thread 0's neighbours."""
    held = [set(row) for row in flat_table(src)]
    return max(len({t for t in range(32) if held[t] & set(row)}) for row in flat_table(dst)[:32]).bit_length() - 1


@settings(max_examples=50)
@given(st.randoms(use_true_random=False), st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([1, 2]))
def test_shuffles_reach_the_least_rounds(rng: random.Random, num_slots: int, num_warps: int) -> None:
    """No lane can receive more than one word a round, or offer more than one: counted by sets of elements, not by digits.

    Of the schedules one has so few rounds, and the chosen one costs no more than that.
    """
    src, dst = pair_within_warps(rng, num_slots, num_warps)
    held, needed = (list(map(set, flat_table(layout)[:32])) for layout in (src, dst))
    bound = max(max(len(needed[t] - held[t]), len(held[t] - needed[t])) for t in range(32))
    links = within_warp(link_layouts(src, dst))
    assert links is not None
    units = group_units(links, 1)
    traffic = warp_traffic(units)
    assert traffic is not None
    programs = [
        program_of(units, traffic, rounds, 32, num_slots, network)
        for rounds in schedules(traffic)
        for network in (False, True)
    ]
    chosen = plan_in_registers(units, traffic, 32, num_slots)
    assert min(program.rounds for program in programs) == bound
    assert chosen.cycles() == min(program.cycles() for program in programs)


@settings(max_examples=50)
@given(st.randoms(use_true_random=False), st.sampled_from([2, 4, 8]))
def test_selects_are_butterflies(rng: random.Random, num_slots: int) -> None:
    """Two networks of log2(lanes) selects a word bring words to the right round and back."""
    src, dst = pair_within_warps(rng, num_slots, 1)
    (way,) = [way for way in plan_conversion(src, dst, 32).ways if isinstance(way, RegisterWay)]
    assert way.program.count(Select) <= 2 * num_slots * bits_that_move(src, dst)


@settings(max_examples=50)
@given(st.randoms(use_true_random=False))
def test_any_traffic_has_a_schedule(rng: random.Random) -> None:
    """What has no digits to follow is coloured greedily: at most one word received and offered each round."""
    threads, num_units = 32, rng.choice([1, 2, 5])
    unit = np.array([[rng.randrange(num_units) for _ in range(num_units)] for _ in range(threads)])
    thread = np.array([[rng.randrange(threads) for _ in range(num_units)] for _ in range(threads)])
    rounds = coloured(Traffic(thread, unit))
    moving = [(t, i) for t in range(threads) for i in range(num_units) if thread[t, i] != t]
    assert len({(t, rounds[t, i]) for t, i in moving}) == len(moving)
    offers = {(thread[t, i], rounds[t, i]): unit[t, i] for t, i in moving}
    assert all(offers[thread[t, i], rounds[t, i]] == unit[t, i] for t, i in moving)


def test_coloured_schedules_convert() -> None:
    """The general schedule, in place of the one that follows digits."""
    rng = random.Random(5)
    for _ in range(8):
        src, dst = pair_within_warps(rng, 4, 1)
        units = group_units(link_layouts(src, dst), 1)
        traffic = warp_traffic(units)
        assert traffic is not None
        program = program_of(units, traffic, coloured(traffic), 32, src.num_locals)
        codes = [rng.getrandbits(32) for _ in range(src.size)]
        found = execute(program, tile_words(src, codes, 32, rng))
        assert elements(found, dst, 32) == [[codes[e] for e in row] for row in flat_table(dst)]
        assert program.rounds >= plan_in_registers(units, traffic, 32, 4).rounds


def test_a_near_replica_is_read() -> None:
    """Where a thread holds the element itself it is not moved, and where its warp does it does not cross warps."""
    assert plan_conversion(replicated(2, 1) * spatial(32), spatial(32).replicated(2), 32).ways[0].name == "shuffles"
    everywhere = replicated(64, 1).local(8)
    plan = plan_conversion(everywhere, spatial(8).replicated(8), 32)
    assert isinstance(plan.chosen, RegisterWay) and plan.chosen.name == "selects"


@pytest.mark.parametrize("warps", [(1, 1), (2, 2), (4, 1)])
@pytest.mark.parametrize("nbits", [4, 8, 16, 32])
def test_fragments_and_rows_have_no_bank_conflicts(nbits: int, warps: tuple[int, int]) -> None:
    """The conversions that kernels need most: accumulators and operands from and to rows as memory has them."""
    for fragment in atoms.mma_layouts(64, 64, 64, warps):
        rows = auto(fragment.shape, fragment.num_threads, 128 // nbits)
        for src, dst in ((fragment, rows), (rows, fragment)):
            for way in plan_conversion(src, dst, nbits).ways:
                if isinstance(way, ScratchWay):
                    assert way.scratch.extra_wavefronts == 0


@settings(max_examples=50)
@given(st.randoms(use_true_random=False), st.sampled_from([8, 16, 32, 64]), st.sampled_from([1, 2, 4]))
def test_slot_runs_become_16_byte_accesses(rng: random.Random, nbits: int, num_warps: int) -> None:
    """Where both sides hold 16 bytes in a row of slots, both accesses are that wide and free of conflicts."""
    bits = 7 + num_warps.bit_length() - 1
    layouts = []
    for _ in range(2):
        layout = local(*(1,) * bits, 1)
        for position, dim in enumerate(rng.sample(range(bits), bits)):
            kind = local if position >= bits - 2 else spatial
            layout = layout * kind(*(2 if d == dim else 1 for d in range(bits + 1)))
        layouts.append(layout * local(*(1,) * bits, 128 // nbits))
    plan = plan_conversion(layouts[0], layouts[1], nbits)
    for way in plan.ways:
        if isinstance(way, ScratchWay):
            scratch = way.scratch
            widths = [scratch.access_nbytes(side) for side in (scratch.store, scratch.load)]
            assert (widths, scratch.extra_wavefronts) == ([16, 16], 0)


def test_costs_are_the_sums_of_their_parts() -> None:
    plan = plan_conversion(spatial(8, 4).local(1, 8), local(1, 8).spatial(8, 4), 32)
    by_name = {way.name: way for way in plan.ways}
    program = by_name["shuffles"].program
    others = len(program.operations) - program.rounds
    assert by_name["shuffles"].cycles == 4 * program.rounds + 2 * others
    # 8 words a lane: two 16-byte stores and four 8-byte loads make 8 wavefronts each, between two waits of the warp.
    assert by_name["shared memory"].cycles == WAVEFRONT_CYCLES * 16 + 2 * WARP_BARRIER_CYCLES
    wide = plan_conversion(spatial(128), column_spatial(8, 16).reshape((128,)), 8).chosen
    assert wide.cycles == WAVEFRONT_CYCLES * 2 + 2 * BLOCK_BARRIER_CYCLES + ALU_CYCLES * 2


def test_within_warp_needs_equal_warp_digits() -> None:
    same = link_layouts(spatial(4, 32), spatial(4, 1) * column_spatial(1, 32))
    assert within_warp(same) is not None
    assert within_warp(link_layouts(spatial(4, 32), column_spatial(4, 32))) is None
    assert within_warp(link_layouts(spatial(2, 2, 32), spatial(2, 2, 32).permute([1, 0, 2]))) is None
    assert within_warp(link_layouts(spatial(2, 32), replicated(2, 2).spatial(1, 32).local(2, 1))) is None


def test_plans_say_what_they_do() -> None:
    rows = spatial(4, 8).local(1, 4)
    assert str(plan_conversion(rows, rows, 16)) == "free: registers are renamed"
    assert str(plan_conversion(spatial(64), column_spatial(8, 8).reshape((64,)), 32)).startswith(
        "256 bytes of shared memory, "
    )


def test_mistakes_are_named() -> None:
    with pytest.raises(LayoutError, match=r"from shape \(64,\) over 64 threads to shape \(32,\) over 32 threads"):
        plan_conversion(spatial(64), spatial(32), 8)
    with pytest.raises(LayoutError, match="48-bit elements over 32 threads; expected 1 to 32 or 64 bits"):
        plan_conversion(spatial(32), spatial(32), 48)
    with pytest.raises(LayoutError, match=r"8-bit elements over 48 threads; .* a multiple of 32 threads"):
        plan_conversion(spatial(48), spatial(48), 8)


def test_large_layouts_of_any_warps() -> None:
    """Warps that do not divide the tile: digits that straddle the ends of warps."""
    rng = random.Random(11)
    for num_warps in (3, 5, 6, 7):
        shape = (32 * num_warps, 2)
        check(random_layout_of(rng, shape, 32 * num_warps), spatial(*shape[:1]).unsqueeze(1).local(1, 2), 16, rng)
