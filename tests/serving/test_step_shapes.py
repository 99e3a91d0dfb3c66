"""Few shapes stand for all steps of a GPU, and what is made up in them is bounded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from serving.core import Batch, BatchItem, SamplingParams
from serving.cost_model import StepWork
from serving.step_shapes import GraphLimits, StepShapes

GPU = torch.device("cuda")
GREEDY = SamplingParams(temperature=0)


@st.composite
def limits(draw: st.DrawFn) -> GraphLimits:
    max_batch = draw(st.integers(1, 300))
    return GraphLimits(max_batch, 4, draw(st.integers(max_batch, 4096)), draw(st.integers(0, 8)))


@st.composite
def steps(draw: st.DrawFn) -> tuple[GraphLimits, list[BatchItem]]:
    """Within the limits: so many sequences, tokens, and guesses of each."""
    limit = draw(limits())
    decodes = draw(st.integers(0, limit.max_batch))
    room, lengths = limit.max_step_tokens - decodes, [(1, 0)] * decodes
    while len(lengths) < limit.max_batch and room > 0 and (draw(st.booleans()) or not lengths):
        drafts = draw(st.integers(0, min(limit.num_drafts, room - 1)))
        lengths.append((draw(st.integers(1 + drafts, room)), drafts))
        room -= lengths[-1][0]
    draw(st.randoms()).shuffle(lengths)
    return limit, [
        BatchItem(str(index), (0,) * count, 0, (0,), GREEDY if drafts or draw(st.booleans()) else None, 0, num_drafts=drafts)
        for index, (count, drafts) in enumerate(lengths)
    ]  # fmt: skip


@given(steps())
def test_every_step_fits_one_of_all_shapes(step: tuple[GraphLimits, list[BatchItem]]) -> None:
    limit, items = step
    shapes = StepShapes(limit, GPU)
    shape = shapes.of(Batch(tuple(items)))
    assert shape is not None and shape in set(shapes.all)
    assert shapes.rows(StepWork.of(Batch(tuple(items)))) == shape.rows
    single = [item for item in items if len(item.token_ids) == 1 and item.params is not None]
    others = [item for item in items if item not in single]
    assert shape.decodes >= len(single) and shape.rows - shape.decodes >= sum(len(item.token_ids) for item in others)
    assert (shape.others > len(others)) if others else shape.others == 0  # one more owns what is made up
    assert shape.samples >= sum(1 + item.num_drafts for item in items if item.params is not None)
    assert shape.samples <= shape.rows and shape.samples <= limit.max_batch * (1 + limit.num_drafts)


@given(steps())
def test_what_is_made_up_is_bounded(step: tuple[GraphLimits, list[BatchItem]]) -> None:
    """Where all decode fewer than eight sequences, else of those that do seven, or three times as many as there are; of rows no
    more than that, and as many as the step has, or 256, which is the largest tile of a product."""
    limit, items = step
    shape, tokens = StepShapes(limit, GPU).of(Batch(tuple(items))), sum(len(item.token_ids) for item in items)
    assert shape is not None
    if not shape.others:
        assert shape.rows < tokens + 8
        return
    decodes = sum(len(item.token_ids) == 1 and item.params is not None for item in items)
    assert shape.decodes <= max(8, 4 * decodes)
    assert shape.rows < shape.decodes - decodes + tokens + max(16, min(tokens + shape.decodes, 256))


@pytest.mark.parametrize(
    ("limit", "common", "rare"),
    [
        (GraphLimits(32, 512, 512), 51, 22),
        (GraphLimits(256, 512, 2048), 123, 60),
        (GraphLimits(1, 512, 512), 9, 0),
        (GraphLimits(64, 512, 512, num_drafts=4), 88, 28),
    ],
)
def test_they_are_few(limit: GraphLimits, common: int, rare: int) -> None:
    shapes = StepShapes(limit, GPU)
    assert len(shapes.common()) == common and len(set(shapes.all)) == len(shapes.all) == common + rare


@given(limits())
def test_what_lies_behind_sequences_that_decode_is_aligned(limit: GraphLimits) -> None:
    assert all(shape.decodes % 8 == 0 for shape in StepShapes(limit, GPU).all if shape.others)


@given(limits())
def test_a_full_step_has_a_shape_of_its_own(limit: GraphLimits) -> None:
    item = BatchItem("a", (0,) * limit.max_step_tokens, 0, (0,), None, 0)
    shape = StepShapes(limit, GPU).of(Batch((item,)))
    assert shape is not None and (shape.decodes, shape.rows) == (0, limit.max_step_tokens)
