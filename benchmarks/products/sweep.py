"""Other schedules of the kernel for few tokens than the library's choice: which of them is the fastest."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from products.run import Run, activations, outputs_like, products_with
from products.timing import in_turn
from products.weights import Case, Expected, random_weight
from tilus.kernels.linear import launch
from tilus.kernels.quantize import QuantizedWeight
from tilus.kernels.schedule import Schedule

COLUMNS = {"N x K": 13, "M": 6, "type": 13, "us": 9, "read": 9, "ratio": 7, "schedule": 100}


def plans() -> list[Schedule]:
    """Schedules that leave 8 to 16 warps on each of 132 multiprocessors for 128 rows of tiles."""
    shapes = (
        (1, 8, 1, 1), (1, 16, 1, 1), (1, 4, 2, 2), (1, 8, 2, 2), (2, 4, 2, 1), (2, 8, 2, 1), (2, 4, 4, 2), (4, 2, 4, 1),
        (4, 4, 4, 1),
    )  # fmt: skip
    found = [
        Schedule(tokens, rows, warps, stages, splits, blocks_per_sm)
        for tokens in (8, 16)
        for rows, warps, splits, blocks_per_sm in shapes
        for stages in (1, 2, 4)
    ]
    return [plan for plan in found if plan.stages < 4 or plan.tokens == 8]


def rows(run: Run, cases: Sequence[Case], tokens: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A row for each case, M and schedule that fits the M; those that spill registers have no time."""
    for case in cases:
        weight = random_weight(case)
        packed = run.packed_copies(weight)
        for m in tokens:
            xs = activations(m, case.shape[1])
            wanted = products_with(weight, xs)
            for plan in plans():
                if run.budget.exhausted:
                    return
                if plan.tokens == (8 if m <= 8 else 16):
                    yield row(run, case, xs, packed, wanted, plan)


def row(
    run: Run, case: Case, xs: Sequence[torch.Tensor], packed: Sequence[QuantizedWeight], wanted: Sequence[Expected],
    plan: Schedule,
) -> dict[str, Any]:  # fmt: skip
    m, outputs = xs[0].shape[0], outputs_like(wanted, xs[0].dtype)
    actions = in_turn(lambda x, w, y: launch(x, w, y, None, plan, None), xs, packed, outputs)
    found = run.attempt("us", lambda: run.timer.checked_us(actions, outputs, wanted, f"{case}, M = {m}, {plan}"))
    us, read_us = found and found[0], run.reads.us(packed[0].nbytes)[0]
    return {
        "N": case.shape[0], "K": case.shape[1], "M": m, "dtype": case.dtype, "us": us, "read_us": read_us,
        "ratio": us and round(us / read_us, 3), "schedule": dataclasses.asdict(plan), "failures": run.taken_failures(),
    }  # fmt: skip


def cells(row: dict[str, Any]) -> list[Any]:
    keys = ("M", "dtype", "us", "read_us", "ratio")
    return [f"{row['N']} x {row['K']}", *(row[key] for key in keys), Schedule(**row["schedule"])]
