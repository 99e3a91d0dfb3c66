"""rope_append against the rotation in float64, and against what it must leave alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tilus import TilusError
from tilus.kernels import quantized_cache, rope_append
from tilus.kernels.rope import rope_append_kernel
from tilus.runtime.binaries import build
from tilus.target import get_target

EXECUTIONS = ["reference", "cpu", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)]
MAX_POSITIONS = 40


def make_inputs(
    tokens: int, heads: tuple[int, int], head_dim: int, page_size: int, dtype: torch.dtype = torch.float16
) -> dict[str, Any]:
    """Random arguments; the cache is one layer of a pool, and every token has a slot of its own."""
    q_heads, kv_heads = heads
    generator = torch.Generator().manual_seed(tokens)
    pages = tokens // page_size + 3
    pool = torch.randn(pages, 2, 2, page_size, kv_heads, head_dim, generator=generator).to(dtype)
    angles = torch.rand(MAX_POSITIONS, head_dim // 2, generator=generator) * 2 * math.pi
    return {
        "qkv": torch.randn(tokens, (q_heads + 2 * kv_heads) * head_dim, generator=generator).to(dtype),
        "positions": torch.randint(0, MAX_POSITIONS, (tokens,), generator=generator, dtype=torch.int32),
        "cos_sin": torch.cat([angles.cos(), angles.sin()], dim=1),
        "slots": torch.randperm(pages * page_size, generator=generator)[:tokens].int(),
        "kv_cache": pool[:, 1],
    }


def rotated(vector: Any, cos_sin: Any) -> Any:
    """Hugging Face's `rotate_half`, one vector in float64: pairs (i, i + D/2) turned by the angle i of the position."""
    half = len(vector) // 2
    result = np.empty_like(vector)
    for i in range(half):
        cos, sin = cos_sin[i], cos_sin[half + i]
        result[i] = vector[i] * cos - vector[half + i] * sin
        result[half + i] = vector[half + i] * cos + vector[i] * sin
    return result


def check(inputs: dict[str, Any], q_heads: int, device: str, **options: Any) -> None:
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    pool = inputs["kv_cache"]._base
    others = pool[:, 0].clone()
    if device == "cuda":
        moved = {name: tensor.cuda() for name, tensor in inputs.items() if name != "kv_cache"}
        pool_there = pool.cuda()
        q = rope_append(**moved, kv_cache=pool_there[:, 1], device=device, **options).cpu()
        pool.copy_(pool_there)
    else:
        q = rope_append(**inputs, device=device, **options)
    expected = before["kv_cache"].double().numpy()
    page_size, kv_heads, head_dim = expected.shape[2:]
    heads = before["qkv"].double().numpy().reshape(len(q), -1, head_dim)
    cos_sin = before["cos_sin"].double().numpy()
    expected_q = np.empty((len(q), q_heads, head_dim))
    for token, (position, slot) in enumerate(zip(before["positions"].tolist(), before["slots"].tolist(), strict=True)):
        turned = [rotated(vector, cos_sin[position]) for vector in heads[token, : q_heads + kv_heads]]
        expected_q[token] = turned[:q_heads]
        if 0 <= slot < len(expected) * page_size:
            page, offset = divmod(slot, page_size)
            expected[page, 0, offset], expected[page, 1, offset] = turned[q_heads:], heads[token, q_heads + kv_heads :]
    close(q, expected_q)
    close(inputs["kv_cache"], expected)
    assert torch.equal(pool[:, 0], others), "another layer of the pool was written"
    assert all(torch.equal(inputs[name], before[name]) for name in inputs if name != "kv_cache")


def close(found: torch.Tensor, expected: Any) -> None:
    """One rounding to the dtype (half a step of it, or of its subnormals), and f32 arithmetic on values below 8."""
    step = 2.0**-11 if found.dtype == torch.float16 else 2.0**-8
    error = np.abs(found.double().numpy() - expected)
    assert (error <= step * np.abs(expected) + 2.0**-20).all(), error.max()


@pytest.mark.sampled(12)
@pytest.mark.parametrize("device", EXECUTIONS)
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("heads", [(9, 3), (4, 4), (1, 1), (8, 1)], ids=str)
@pytest.mark.parametrize(("head_dim", "page_size"), [(64, 16), (128, 32), (80, 5)])
def test_rotation_and_cache(tokens: int, heads: tuple[int, int], head_dim: int, page_size: int, device: str) -> None:
    check(make_inputs(tokens, heads, head_dim, page_size), heads[0], device, constant=tokens == 7)


@pytest.mark.parametrize("device", EXECUTIONS)
def test_bfloat16(device: str) -> None:
    check(make_inputs(5, (6, 2), 64, 16, torch.bfloat16), 6, device)


@pytest.mark.parametrize("device", EXECUTIONS)
def test_slots_outside_of_the_cache_are_not_written(device: str) -> None:
    inputs = make_inputs(4, (3, 3), 64, 16)
    slots = inputs["slots"]
    slots[0], slots[2] = -1, len(inputs["kv_cache"]) * 16
    check(inputs, 3, device)


@pytest.mark.parametrize("device", EXECUTIONS)
@pytest.mark.parametrize(
    ("name", "head_dim"), [(None, 80), pytest.param("fp8", 64, marks=pytest.mark.exhaustive), ("int4", 48)]
)
def test_heads_are_normed_before_they_are_rotated(name: str | None, head_dim: int, device: str) -> None:
    """Queries and keys have weights of their own; values are left alone. A cache of codes is off by half a step of its scale, as
    without norms: its elements are compared with those that a cache gets from heads that float64 has normed."""
    inputs = make_inputs(3, (3, 2), head_dim, 16)
    q_norm, k_norm, eps = torch.rand(head_dim) + 0.5, torch.rand(head_dim) + 0.5, 0.25
    heads = inputs["qkv"].double().unflatten(1, (7, head_dim))
    weights = torch.stack([*[q_norm] * 3, *[k_norm] * 2]).double()
    turned = heads[:, :5]
    turned = turned / (turned.square().mean(-1, keepdim=True) + eps).sqrt() * weights
    cos, sin = inputs["cos_sin"][inputs["positions"].long()].double()[:, None].chunk(2, dim=-1)
    low, high = turned.chunk(2, dim=-1)
    expected = torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).numpy()
    cache = (
        inputs["kv_cache"].clone() if name is None else quantized_cache(name, len(inputs["kv_cache"]), 16, 2, head_dim)
    )
    tensors = {key: value for key, value in inputs.items() if key != "kv_cache"} | {"q_norm": q_norm, "k_norm": k_norm}
    if device == "cuda":
        tensors = {key: value.cuda() for key, value in tensors.items()}
        there = cache.cuda() if name is None else replace(cache, codes=cache.codes.cuda(), factors=cache.factors.cuda())
    else:
        there = cache
    q = rope_append(**tensors, kv_cache=there, eps=eps, device=device).cpu()
    pages, offsets = (inputs["slots"].long() // 16).tolist(), (inputs["slots"].long() % 16).tolist()
    if name is None:
        close(q, expected[:, :3])
        close(there[pages, 0, offsets].cpu(), expected[:, 3:])
        assert torch.equal(there[pages, 1, offsets].cpu(), inputs["qkv"].unflatten(1, (7, head_dim))[:, 5:])
        return
    mixed = expected if name == "fp8" else hadamard(expected)
    codes, factors = (part.cpu()[pages, :, 0, ..., offsets] for part in (there.codes.movedim(3, -1), there.factors))
    assert np.abs(q.double().numpy() - mixed[:, :3]).max() <= 2.0**-8
    if name == "int4":
        numbers = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).char()
        numbers = torch.where(numbers > 7, numbers - 16, numbers)
    else:
        numbers = codes.view(torch.float8_e4m3fn)
    found = numbers.double() * factors[..., :1].double() + (factors[..., 1:].double() if name == "int4" else 0.0)
    step = factors[..., :1].double().numpy() * (32 if name == "fp8" else 1)  # fp8: codes up to 448 are 32 apart
    errors = found.numpy() - mixed[:, 3:]
    if name == "int4":  # a head's errors add up to zero, and so lie around half a step
        assert np.abs(errors.mean(-1)).max() <= 2.0**-9
        errors -= (errors.max(-1, keepdims=True) + errors.min(-1, keepdims=True)) / 2
    assert (np.abs(errors) <= step * 0.505 + 2.0**-8).all()


def hadamard(vectors: Any) -> Any:
    """Sums and differences of all pairs of halves, orthonormal, over runs of the largest power of two in half a head."""
    half = vectors.shape[-1] // 2
    run = half & -half
    if run == half:
        run = 2 * half
    runs = vectors.reshape(*vectors.shape[:-1], -1, run)
    matrix = np.ones((1, 1))
    while len(matrix) < run:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (runs @ matrix.T / np.sqrt(run)).reshape(vectors.shape)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("device", EXECUTIONS)
@pytest.mark.parametrize("normed", [False, True])
def test_a_head_has_the_same_bits_whatever_others_there_are(normed: bool, device: str) -> None:
    """A device that holds some heads of a model computes what one alone would."""
    tokens = 37 if device == "emulator" else 300  # one in some thousands is where another rounding shows
    inputs = make_inputs(tokens, (12, 3), 64, 16)
    norms = {"q_norm": torch.rand(64) + 0.5, "k_norm": torch.rand(64) + 0.5} if normed else {}
    there = {name: tensor.to("cuda") if device == "cuda" else tensor for name, tensor in (inputs | norms).items()}
    heads, cache = there.pop("qkv").reshape(tokens, 18, 64), there.pop("kv_cache")
    whole = rope_append(heads.reshape(tokens, -1), kv_cache=cache, device=device, **there)
    for first, count in ((0, 1), (1, 2), (2, 1)):
        parts = (
            heads[:, 4 * first : 4 * (first + count)],
            *(heads[:, at + first : at + first + count] for at in (12, 15)),
        )
        own = torch.zeros_like(cache[..., :count, :])
        q = rope_append(torch.cat(parts, 1).reshape(tokens, -1), kv_cache=own, device=device, **there)
        written = own != 0
        assert torch.equal(q, whole[:, 4 * first : 4 * (first + count)])
        assert written.any() and torch.equal(own[written], cache[..., first : first + count, :][written])


def test_no_tokens() -> None:
    inputs = make_inputs(0, (3, 3), 64, 16)
    assert rope_append(**inputs, device="reference").shape == (0, 3, 64)


@pytest.mark.parametrize("sm", ["sm_80", "sm_89", "sm_90a", "sm_100a"])
@pytest.mark.parametrize(("q_heads", "kv_heads", "head_dim", "normed"), [(9, 3, 64, False), (32, 8, 128, True)])
def test_assembles_without_spills(q_heads: int, kv_heads: int, head_dim: int, sm: str, normed: bool) -> None:
    """`build` raises for spills."""
    norm = torch.ones(head_dim) if normed else None
    inputs = make_inputs(3, (q_heads, kv_heads), head_dim, 16)
    heads = q_heads + 2 * kv_heads
    inputs["qkv"] = inputs["qkv"].unflatten(1, (heads, head_dim))
    special = rope_append_kernel.specialize(
        **inputs, q=torch.empty(3, q_heads, head_dim).half(), eps=1e-6, q_norm=norm, k_norm=norm,
        head_dim=head_dim, q_heads=q_heads, kv_heads=kv_heads, page_size=16, constant=normed,
    )  # fmt: skip
    assert build(special.function, get_target(sm))[1]


def test_arguments_that_do_not_fit_are_refused_with_both_values() -> None:
    def message(**change: torch.Tensor) -> str:
        with pytest.raises(TilusError) as caught:
            rope_append(**{**make_inputs(4, (3, 3), 64, 16), **change}, device="reference")
        return str(caught.value)

    assert "rows of 500 elements with 3 kv heads of 64" in message(qkv=torch.zeros(4, 500).half())
    assert "rows of 384 elements" in message(qkv=torch.zeros(4, 384).half())
    assert "kv_cache of torch.float32, expected float16 or bfloat16" in message(kv_cache=torch.zeros(4, 2, 16, 3, 64))
    assert "found tokens = 5, expected 4" in message(slots=torch.zeros(5, dtype=torch.int32))
    assert "found dtype int64, expected int32" in message(positions=torch.zeros(4, dtype=torch.int64))
    assert "[4, 9, 64]" in message(qkv=torch.zeros(4, 9, 64).half())
