"""Products under way: results that stay in their registers, and programs that touch them too early."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import tilus
from tilus import Const, Tensor, TilusError, f16, f32
from tilus.instructions.view import Assign
from tilus.instructions.wgmma import Wgmma
from tilus.ir.function import Function
from tilus.ir.visit import instructions
from tilus.target import DEFAULT_TARGET
from tilus.transforms import run_pipeline


@tilus.kernel
def program(x: Tensor[f16, 64, 64], out: Tensor[f32, 64, 64], *, body: Const):
    tilus.grid(1, warps=4)
    xs = tilus.shared(f16, [2, 64, 64])
    tilus.store_shared(xs[0], tilus.load(x, [0, 0], shape=[64, 64]))
    body(xs, x.shape[0], out)


def ir_of(body: Callable[..., None], after: str = "check_under_way") -> Function:
    return run_pipeline(program.specialize(body=body).function, DEFAULT_TARGET, after=after)


def chain(xs, n, out):
    acc = tilus.wgmma(xs[0], xs[0])
    acc = tilus.wgmma(xs[0], xs[0], acc)
    acc = tilus.wgmma(xs[0], xs[0], acc)
    tilus.wgmma_wait()
    tilus.store(out, [0, 0], acc)


def from_zeros(xs, n, out):
    acc = tilus.zeros([64, 64])
    acc = tilus.wgmma(xs[0], xs[0], acc)
    tilus.wgmma_wait()
    tilus.store(out, [0, 0], acc)


def loop_carried(xs, n, out):
    acc = tilus.zeros([64, 64])
    for i in tilus.range(n):
        acc = tilus.wgmma(xs[i % 2], xs[0], acc)
        acc = tilus.wgmma(xs[0], xs[i % 2], acc)
        tilus.wgmma_wait(1)
    tilus.wgmma_wait()
    tilus.store(out, [0, 0], acc)


def first_product_in_front_of_the_loop(xs, n, out):
    acc = tilus.wgmma(xs[0], xs[0])
    for i in tilus.range(n):
        acc = tilus.wgmma(xs[i % 2], xs[0], acc)
    tilus.wgmma_wait()
    tilus.store(out, [0, 0], acc)


def two_at_once(xs, n, out):
    a, b = tilus.zeros([64, 64]), tilus.zeros([64, 64])
    for i in tilus.range(n):
        a, b = tilus.wgmma(xs[i % 2], xs[0], a), tilus.wgmma(xs[0], xs[0], b)
    tilus.wgmma_wait()
    tilus.store(out, [0, 0], a + b)


def fresh_part_in_a_loop(xs, n, out):
    part = tilus.zeros([64, 64])
    total = tilus.zeros([64, 64])
    for i in tilus.range(n):
        part = tilus.wgmma(xs[i % 2], xs[0])
        tilus.wgmma_wait()
        total = total + part
    tilus.store(out, [0, 0], total)


def in_a_branch(xs, n, out):
    acc = tilus.zeros([64, 64])
    if n > 3:
        acc = tilus.wgmma(xs[0], xs[0], acc)
        tilus.wgmma_wait()
    tilus.store(out, [0, 0], acc)


@pytest.mark.parametrize(
    "body",
    [
        chain,
        from_zeros,
        loop_carried,
        first_product_in_front_of_the_loop,
        two_at_once,
        fresh_part_in_a_loop,
        in_a_branch,
    ],
)
def test_sums_have_one_set_of_registers(body: Callable[..., None]) -> None:
    """Every product with an accumulator adds to that tile itself, and no result of a product is copied."""
    found = [stmt.inst for stmt in instructions(ir_of(body).body)]
    products = [inst for inst in found if isinstance(inst, Wgmma)]
    assert products and all(inst.acc in (None, inst.out) for inst in products)
    results = {inst.out for inst in products}
    assert not any(isinstance(inst, Assign) and inst.src in results for inst in found)


def read_at_once(xs, n, out):
    acc = tilus.wgmma(xs[0], xs[0])
    tilus.store(out, [0, 0], acc)  # here


def wait_covers_too_little(xs, n, out):
    a = tilus.wgmma(xs[0], xs[0])
    b = tilus.wgmma(xs[0], xs[0])
    tilus.wgmma_wait(1)
    tilus.store(out, [0, 0], a)
    tilus.store(out, [0, 0], b)  # here


def read_in_the_next_trip(xs, n, out):
    acc = tilus.zeros([64, 64])
    for _ in tilus.range(n):
        tilus.store(out, [0, 0], acc)  # here
        acc = tilus.wgmma(xs[0], xs[0], acc)
    tilus.wgmma_wait()


def operand_is_loaded_again(xs, n, out):
    acc = tilus.zeros([64, 64])
    for _ in tilus.range(n):
        a = tilus.load_shared(xs[0])  # here
        acc = tilus.wgmma(a, xs[0], acc)
    tilus.wgmma_wait()
    tilus.store(out, [0, 0], acc)


def sum_is_overwritten(xs, n, out):
    acc = tilus.zeros([64, 64])
    for _ in tilus.range(n):
        acc = tilus.wgmma(xs[0], xs[0], acc)
        acc = tilus.zeros([64, 64])  # here
    tilus.wgmma_wait()
    tilus.store(out, [0, 0], acc)


def the_old_sum_is_still_needed(xs, n, out):
    old = tilus.wgmma(xs[0], xs[0])
    new = tilus.wgmma(xs[0], xs[0], old)  # here
    tilus.wgmma_wait()
    tilus.store(out, [0, 0], old + new)


def result_in_another_layout(xs, n, out):
    acc = tilus.wgmma(xs[0], xs[0])
    acc = tilus.with_layout(acc, tilus.layout.auto((64, 64), 128))  # here
    tilus.wgmma_wait()
    tilus.store(out, [0, 0], acc)


def read_in_a_role(xs, n, out):
    with tilus.warps(0, 4):
        acc = tilus.wgmma(xs[0], xs[0])
        tilus.store(out, [0, 0], acc)  # here


def line_marked(body: Callable[..., None]) -> int:
    import inspect

    lines, first = inspect.getsourcelines(body)
    return next(first + i for i, line in enumerate(lines) if line.rstrip().endswith("# here"))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (read_at_once, "store reads acc_1 while wgmma still adds to it"),
        (read_in_a_role, "store reads acc_1 while wgmma still adds to it"),
        (wait_covers_too_little, "store reads b while wgmma still adds to it"),
        (read_in_the_next_trip, "store reads acc while wgmma still adds to it"),
        (operand_is_loaded_again, "load_shared writes a, on which wgmma still works"),
        (sum_is_overwritten, "writes acc, on which wgmma still works"),
        (the_old_sum_is_still_needed, "wgmma reads old while wgmma still adds to it"),
        (result_in_another_layout, "convert reads acc_1 while wgmma still adds to it"),
    ],
)
def test_what_is_touched_too_early_is_refused(body: Callable[..., None], message: str) -> None:
    with pytest.raises(TilusError) as caught:
        ir_of(body)
    assert message in caught.value.message
    assert caught.value.loc is not None and (caught.value.loc.file, caught.value.loc.line) == (
        __file__,
        line_marked(body),
    )
    (note,) = caught.value.notes
    assert (
        note.loc is not None
        and "wgmma is begun here" in str(caught.value)
        and "tilus.wgmma_wait" in str(caught.value.hint)
    )


def waited_on_one_side(xs, n, out):
    acc = tilus.zeros([64, 64])
    acc = tilus.wgmma(xs[0], xs[0], acc)
    if n > 3:
        tilus.wgmma_wait()
    tilus.store(out, [0, 0], acc)


def test_what_is_not_certain_is_left_to_the_assembler() -> None:
    ir_of(waited_on_one_side)
