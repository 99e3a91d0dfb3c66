"""Captured launches run again in order, on the same memory, and nobody else's are among them."""

from __future__ import annotations

import gc
import re
import runpy
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tilus
from tilus.errors import TilusError
from tilus.runtime.capture import refused_in_capture

N = 200


@tilus.kernel
def add_scaled(
    x: tilus.Tensor[tilus.f32, "n"],
    y: tilus.Tensor[tilus.f32, "n"],
    a: tilus.f32,
    bias: tilus.Tensor[tilus.f32, "n"] = None,
):
    """y += a * x + bias"""
    tilus.grid(tilus.cdiv(x.shape[0], 32), warps=1)
    i = tilus.block_id(0) * 32
    value = tilus.load(y, [i], [32]) + a * tilus.load(x, [i], [32])
    if bias is not None:
        value = value + tilus.load(bias, [i], [32])
    tilus.store(y, [i], value)


@tilus.kernel
def unpack(codes: tilus.Tensor[tilus.uint4, 64], out: tilus.Tensor[tilus.f32, 64]):
    tilus.grid(1, warps=1)
    tilus.store(out, [0], tilus.load(codes, [0], [64]).to(tilus.f32))


launch = add_scaled.on("cpu")


def ones(value: float = 1) -> torch.Tensor:
    return torch.full((N,), float(value))


STEPS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(-2, 2), st.booleans()), max_size=12)


def test_the_example_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TILUS_DEVICE", raising=False)
    page = (Path(__file__).parents[2] / "docs" / "cpu.md").read_text()
    (program,) = re.findall(r"^```python\n((?:(?!^```).)*tilus\.capture.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "example.py").write_text(program)
    names = runpy.run_path(str(tmp_path / "example.py"))
    assert (names["y"] == 6).all() and (names["z"] == 7).all()


@settings(max_examples=50, deadline=None)
@given(STEPS, st.integers(0, 2**32 - 1))
def test_a_replay_is_what_the_launches_were(steps: list[tuple[int, int, int, bool]], seed: int) -> None:
    """On integers in f32, so that a wrong order shows and rounding does not."""
    generator = torch.Generator().manual_seed(seed)
    arrays = list(torch.randint(-3, 4, (4, N), generator=generator).float())
    plain = [array.clone() for array in arrays]

    def run(tensors: list[torch.Tensor]) -> None:
        for source, target, a, biased in steps:
            if source != target:
                launch(tensors[source], tensors[target], float(a), tensors[source] if biased else None)

    with tilus.capture() as graph:
        run(arrays)
    run(plain)
    assert len(graph) == sum(source != target for source, target, _, _ in steps)
    assert all(map(torch.equal, arrays, plain))
    for _ in range(2):
        changed = torch.randint(-3, 4, (4, N), generator=generator).float()
        for array, other, values in zip(arrays, plain, changed):
            array.copy_(values)
            other.copy_(values)
        graph.replay()
        run(plain)
        assert all(map(torch.equal, arrays, plain))


def test_numpy_and_packed_arrays() -> None:
    memory, out = np.zeros(32, np.uint8), np.zeros(64, np.float32)
    with tilus.capture() as graph:
        unpack.on("cpu")(tilus.packed(memory, tilus.uint4, [64]), out)
    memory[:] = 0x52
    graph.replay()
    assert out.tolist() == [2.0, 5.0] * 32


def test_arguments_live_as_long_as_the_graph() -> None:
    x, y = ones(), ones()
    alive = [weakref.ref(x), weakref.ref(y)]
    with tilus.capture() as graph:
        launch(x, y, 1.0)
    del x, y
    gc.collect()
    graph.replay()
    found = alive[1]()
    assert found is not None and (found == 3).all()
    del graph, found
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


def test_a_block_without_launches() -> None:
    with tilus.capture() as graph:
        pass
    graph.replay()
    assert len(graph) == 0


def test_launches_after_the_block_are_not_recorded() -> None:
    x, y = ones(), ones(0)
    with tilus.capture() as graph:
        launch(x, y, 1.0)
    launch(x, y, 10.0)
    graph.replay()
    assert len(graph) == 1 and (y == 12).all()


def test_launches_of_other_threads_are_not_recorded() -> None:
    """While two threads capture and one does not, each graph has its own thread's launches."""
    sums, counts = [ones(0) for _ in range(3)], [0, 0, 0]

    def work(index: int) -> None:
        x = ones(index + 1)
        if index == 2:
            for _ in range(50):
                launch(x, sums[index], 1.0)
            return
        with tilus.capture() as graph:
            for _ in range(50):
                launch(x, sums[index], 1.0)
        counts[index] = len(graph)
        graph.replay()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert counts == [50, 50, 0]
    assert [total.unique().tolist() for total in sums] == [[100], [200], [150]]


def test_any_thread_may_replay() -> None:
    x, y = ones(), ones(0)
    with tilus.capture() as graph:
        launch(x, y, 1.0)
    thread = threading.Thread(target=graph.replay)
    thread.start()
    thread.join(60)
    assert (y == 2).all()


def test_a_failed_block_has_no_record() -> None:
    x, y = ones(), ones(0)
    with pytest.raises(KeyError), tilus.capture() as graph:
        launch(x, y, 1.0)
        raise KeyError
    assert len(graph) == 0
    with pytest.raises(TilusError, match=r"nothing to replay: .* has failed"):
        graph.replay()
    with tilus.capture() as graph:  # the thread captures again
        launch(x, y, 1.0)
    assert len(graph) == 1 and (y == 2).all()


def test_a_launch_that_is_refused_is_not_recorded() -> None:
    x, y = ones(), ones(0)
    with tilus.capture() as graph:
        with pytest.raises(TilusError, match="found n = 3"):
            launch(x, torch.zeros(3), 1.0)
        launch(x, y, 1.0)
    assert len(graph) == 1


def test_captures_do_not_nest() -> None:
    x, y = ones(), ones(0)
    with tilus.capture() as graph:
        with pytest.raises(TilusError, match=r"tilus.capture\(\) inside of tilus.capture\(\)"), tilus.capture():
            pass
        launch(x, y, 1.0)
    assert len(graph) == 1


def test_a_replay_waits_for_the_end_of_its_block() -> None:
    with tilus.capture() as other:
        pass
    with tilus.capture() as graph:
        with pytest.raises(TilusError, match=r"a replay inside of tilus.capture\(\) cannot be recorded"):
            other.replay()
        failures: list[TilusError] = []

        def replay() -> None:
            try:
                graph.replay()
            except TilusError as error:
                failures.append(error)

        thread = threading.Thread(target=replay)
        thread.start()
        thread.join(60)
    assert ["has not ended" in str(error) for error in failures] == [True]


@pytest.mark.parametrize("device", ["reference", "emulator"])
def test_only_native_launches_are_captured(device: str) -> None:
    x, y = ones(), ones(0)
    with (
        pytest.raises(
            TilusError, match=f"add_scaled: a launch on the device {device} cannot be captured, expected cpu"
        ),
        tilus.capture(),
    ):
        add_scaled.on(device)(x, y, 1.0)
    assert (y == 0).all()
    add_scaled.on(device)(x, y, 1.0)
    assert (y == 1).all()


def test_a_gpus_launches_are_for_torch_to_capture() -> None:
    calls: list[int] = []

    def run(pointers: object, scalars: object, tensors: object) -> None:
        calls.append(1)

    guarded: Callable[..., None] = refused_in_capture("k", "cuda", run)
    with (
        pytest.raises(TilusError, match=r"k: a launch on the device cuda .*\n  hint: torch.cuda.graph"),
        tilus.capture(),
    ):
        guarded((), (), ())
    guarded((), (), ())
    assert calls == [1]
