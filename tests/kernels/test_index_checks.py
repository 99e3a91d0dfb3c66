"""The debug mode: wrong indices of requests and tokens raise with their numbers, on every device; right ones change nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from attention_batches import Batch, make_inputs, on_gpu

import tilus
from tilus import TilusError, config
from tilus.kernels import (
    index_checks,
    paged_decode,
    paged_prefill,
    quantized_cache,
    rope_append,
    shared_prefix_decode,
)

DEVICES = ["reference", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)]
BATCH = Batch(((1, 20), (1, 0), (1, 70)), kv_heads=1, group=1)


class Ran(Exception):
    """The checks are through."""


@pytest.fixture(autouse=True)
def debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILUS_DEBUG", "1")


def found_by(call: Callable[..., Any], *args: Any, device: str, **options: Any) -> str:
    args = tuple(on_gpu(a) if device == "cuda" and isinstance(a, torch.Tensor) else a for a in args)
    with pytest.raises(TilusError) as caught:
        call(*args, **options, device=device)
    return str(caught.value)


def change(tensor: torch.Tensor, index: Any, value: int) -> torch.Tensor:
    changed = tensor.clone()
    changed[index] = value
    return changed


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", [paged_decode, shared_prefix_decode, paged_prefill])
def test_tables_and_lengths(function: Callable[..., Any], device: str) -> None:
    """The first wrong request is named, with its entry and what there is. Entries that no length needs may be anything."""
    inputs = make_inputs(BATCH, 0)
    assert int(inputs.block_tables[2, -1]) > inputs.kv_cache.shape[0] == 10
    many = (inputs.q_start,) if function is paged_prefill else ()
    q = inputs.q if many else inputs.q[:, None]

    def found(tables: torch.Tensor, lens: torch.Tensor) -> str:
        return found_by(function, q, inputs.kv_cache, tables, *many, lens, inputs.scale, device=device)

    for page in (10, -1, 2**31 - 1):
        text = found(change(change(inputs.block_tables, (2, 4), page), (2, 3), page), inputs.kv_lens)
        assert f"{function.__name__}: entry 3 of the block table of request 2 is page {page}, expected 0 to 9" in text
    for length in (113, -1):
        text = found(inputs.block_tables, change(inputs.kv_lens, 1, length))
        assert f"{function.__name__}: request 1 has kv_len {length}, expected 0 to 112" in text and "7 entries" in text


@pytest.mark.parametrize("device", DEVICES)
def test_the_last_entry_of_a_long_table(device: str) -> None:
    """Behind what a block looks at together; the entry behind the length does not count."""
    tables = torch.zeros(2, 3000, dtype=torch.int32)
    tables[1, 2500:] = 9
    cache, q = torch.zeros(2, 2, 16, 1, 64).half(), torch.zeros(2, 1, 1, 64).half()
    lens = torch.tensor([3000 * 16, 2500 * 16 + 1], dtype=torch.int32)
    assert "entry 2500 of the block table of request 1 is page 9" in found_by(
        paged_decode, q, cache, tables, lens, 1.0, device=device
    )
    arguments = [on_gpu(t) if device == "cuda" else t for t in (tables, lens - 1, cache)]
    index_checks.check_tables("here", *arguments, device=device)


def test_starts_of_queries() -> None:
    """In order, from zero on, no more than there are."""
    inputs = make_inputs(Batch(((2, 20), (1, 5), (3, 70)), kv_heads=1, group=1), 0)
    for at, value, text in [
        (0, 1, "queries 1 to 2 of request 0"), (1, 4, "queries 4 to 3 of request 1"), (3, 7, "queries 3 to 7 of request 2"),
    ]:  # fmt: skip
        starts = change(inputs.q_start, at, value)
        args = (inputs.q, inputs.kv_cache, inputs.block_tables, starts, inputs.kv_lens, inputs.scale)
        assert text in found_by(paged_prefill, *args, device="reference")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("quantised", [False, True])
def test_tokens(quantised: bool, device: str) -> None:
    """Of an append: positions and slots, of which negative ones are right."""
    at = "cuda" if device == "cuda" else "cpu"
    cache = quantized_cache("int8", 4, 16, 1, 64, at) if quantised else torch.zeros(4, 2, 16, 1, 64, device=at).half()
    qkv, angles = torch.zeros(3, 192).half(), torch.zeros(100, 64)
    positions, slots = torch.tensor([0, 99, 5], dtype=torch.int32), torch.tensor([-1, 63, 5], dtype=torch.int32)

    def found(positions: torch.Tensor, slots: torch.Tensor) -> str:
        return found_by(rope_append, qkv, positions, angles, slots, cache, device=device)

    assert "rope_append: token 1 has slot 64, expected less than 64" in found(positions, change(slots, 1, 64))
    for position in (100, -1):
        text = found(change(positions, 2, position), slots)
        assert f"rope_append: token 2 has position {position}, expected 0 to 99" in text
    arguments = [on_gpu(t) if device == "cuda" else t for t in (qkv, positions, angles, slots)]
    rope_append(*arguments, cache, device=device)


def test_without_the_mode_nothing_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """With it a right batch passes the checks."""
    inputs = make_inputs(BATCH, 0)
    args = (inputs.q[:, None], inputs.kv_cache, inputs.block_tables, inputs.kv_lens, inputs.scale)
    right = paged_decode(*args, device="reference")

    def launched(device: str | None) -> Any:
        raise Ran

    monkeypatch.setattr(index_checks.first_outside_kernel, "on", launched, raising=False)
    with pytest.raises(Ran):
        paged_decode(*args, device="reference")
    monkeypatch.setenv("TILUS_DEBUG", "0")
    assert torch.equal(paged_decode(*args, device="reference"), right)


def test_a_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It could not wait for the device."""
    monkeypatch.setattr(index_checks, "is_capturing", lambda: True)
    inputs = make_inputs(BATCH, 0)
    args = (inputs.q[:, None], inputs.kv_cache, inputs.block_tables, inputs.kv_lens, inputs.scale)
    assert "capture of a CUDA graph" in found_by(paged_decode, *args, device="reference")


def test_a_dry_run_is_not_checked() -> None:
    """Its indices are whatever their memory held."""
    positions, slots, angles = (
        torch.tensor([99], dtype=torch.int32),
        torch.zeros(1, dtype=torch.int32),
        torch.zeros(8, 16),
    )
    launch = partial(
        rope_append, torch.zeros(1, 48, dtype=torch.float16), positions, angles, slots, torch.zeros(1, 2, 16, 1, 16).half(),
        device="cpu",
    )  # fmt: skip
    tilus.compile_ahead(launch)
    with pytest.raises(TilusError, match="token 0 has position 99, expected 0 to 7"):
        launch()


def test_other_values_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILUS_DEBUG", "yes")
    with pytest.raises(TilusError, match="TILUS_DEBUG is 'yes', expected 0 or 1"):
        config.debug()
