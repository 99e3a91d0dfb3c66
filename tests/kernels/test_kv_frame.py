"""Frames of quantised caches: what the kernels do against float64 matrices, and what fitted ones gain."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_kv_cache import Array, append_inputs, check_elements, hadamard, moved, numbers_of
from test_rope import rotated

from tilus import TilusError
from tilus.kernels import KvFrame, fit_kv_frame, paged_attention, quantized_cache, restore_values, rope_append
from tilus.kernels.kv_frame import column, reflection

DEVICES = ["reference", "cpu", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)]
Q_HEADS, KV_HEADS, PAGE = 4, 2, 16
GROUP = Q_HEADS // KV_HEADS


def random_frame(head_dim: int) -> KvFrame:
    generator = torch.Generator().manual_seed(head_dim)
    centres, *mirrors = torch.randn(4, KV_HEADS, head_dim, generator=generator)
    mirrors = [2**0.5 * torch.nn.functional.normalize(mirror, dim=-1) for mirror in mirrors]
    by_query = torch.stack(mirrors).repeat_interleave(GROUP, dim=1)
    return KvFrame(by_query, torch.stack([*mirrors, centres]))


def there_is(frame: KvFrame, device: str) -> KvFrame:
    return KvFrame(frame.queries.cuda(), frame.keys.cuda()) if device == "cuda" else frame


def matrices(frame: KvFrame) -> dict[str, Array]:
    """[heads, D, D] in float64, what queries, keys less their centres, and values are multiplied with."""
    queries, keys = frame.queries.double().numpy(), frame.keys.double().numpy()
    head_dim = keys.shape[-1]
    mix = np.array([hadamard(row) for row in np.eye(head_dim)]).T

    def of(*mirrors: Array) -> Array:
        product = mix
        for mirror in reversed(mirrors):  # the first one acts first
            product = product @ (np.eye(head_dim) - mirror[:, :, None] * mirror[:, None])
        return product

    return {"q": of(*queries[:2]), "k": of(*keys[:2]), "v": of(keys[2])}


@pytest.mark.sampled(9)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "head_dim"), [("int4", 64), ("int8", 48)])
def test_append(name: str, head_dim: int, device: str) -> None:
    inputs, cache = append_inputs(name, (Q_HEADS, KV_HEADS), head_dim, PAGE)
    frame, there = random_frame(head_dim), moved(cache, device)
    given = {key: t.cuda() if device == "cuda" else t for key, t in inputs.items()}
    q = rope_append(**given, kv_cache=there, frame=there_is(frame, device), device=device).cpu().double().numpy()
    found, factors = numbers_of(there)[1], there.factors.cpu().double().numpy()
    by, centres = matrices(frame), frame.keys[3].double().numpy()
    rows, cos_sin = inputs["qkv"].double().numpy().reshape(5, -1, head_dim), inputs["cos_sin"].double().numpy()
    for token, (position, slot) in enumerate(zip(inputs["positions"].tolist(), inputs["slots"].tolist(), strict=True)):
        turned = [rotated(row, cos_sin[position]) for row in rows[token, : Q_HEADS + KV_HEADS]]
        queries = np.array([by["q"][head] @ turned[head] for head in range(Q_HEADS)])
        assert (abs(q[token] - queries) <= 2.0**-11 * abs(queries) + 2.0**-18 * abs(queries).max()).all()
        page, offset = divmod(slot, PAGE)
        for head in range(KV_HEADS if slot >= 0 else 0):
            keys = by["k"][head] @ (turned[Q_HEADS + head] - centres[head])
            values = by["v"][head] @ rows[token, Q_HEADS + KV_HEADS + head]
            for which, wanted in enumerate((keys, values)):
                check_elements(found[page, head, which, offset], wanted, factors[page, head, which, 0, offset], name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float16, 64), (torch.bfloat16, 48)], ids=str)
def test_values_are_restored(dtype: torch.dtype, head_dim: int, device: str) -> None:
    frame = random_frame(head_dim)
    wanted = torch.randn(3, Q_HEADS, head_dim, generator=torch.Generator().manual_seed(1)).double().numpy()
    by = matrices(frame)["v"].repeat(GROUP, axis=0)
    out = torch.from_numpy(np.einsum("hde,mhe->mhd", by, wanted)).to(dtype)
    wanted = np.einsum("hed,mhe->mhd", by, out.double().numpy())
    found = restore_values(out.cuda() if device == "cuda" else out, there_is(frame, device), device=device)
    step = 2.0**-11 if dtype == torch.float16 else 2.0**-8
    assert (abs(found.cpu().double().numpy() - wanted) <= step * abs(wanted) + 2.0**-18).all()


@pytest.mark.parametrize("head_dim", [64, 48])
def test_fitted_frames_keep_scores_and_what_queries_see(head_dim: int) -> None:
    """Scores are those of keys without their means; the longest direction of queries, and the mean of values, become vectors of
    equal elements, the first key one of two values; centred=False leaves keys where they are."""
    q, k, v = samples(50, head_dim)
    frame = fit_kv_frame(q, k, v)
    by = matrices(frame)
    assert np.allclose(np.einsum("hed,hef->hdf", by["q"], by["k"].repeat(GROUP, axis=0)), np.eye(head_dim), atol=1e-5)
    assert np.allclose(frame.keys[3], k.mean(0), atol=1e-6)
    assert not fit_kv_frame(q, k, v, centred=False).keys[3].any()
    for head in range(KV_HEADS):
        turned = q[:, head * GROUP : (head + 1) * GROUP].double().flatten(0, 1).numpy() @ by["q"][head * GROUP].T
        _, _, directions = np.linalg.svd(turned)
        mean = by["v"][head] @ v[:, head].double().mean(0).numpy()
        for vector in (directions[0], mean / np.linalg.norm(mean)):
            assert np.allclose(abs(vector), head_dim**-0.5, atol=1e-4) and len(set(np.sign(vector))) == 1
        first = by["k"][head] @ (k[0, head] - k[:, head].mean(0)).double().numpy()
        assert np.allclose(np.minimum(first - first.min(), first.max() - first), 0, atol=1e-4)


def samples(tokens: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and keys around means of opposite signs, as models have them; values around another one."""
    generator = torch.Generator().manual_seed(3)
    mean, values = 2 * torch.randn(2, KV_HEADS, head_dim, generator=generator)
    q = torch.randn(tokens, Q_HEADS, head_dim, generator=generator) - mean.repeat_interleave(GROUP, dim=0)
    k, v = torch.randn(2, tokens, KV_HEADS, head_dim, generator=generator)
    return q, k + mean, v + values


def test_nothing_to_fit_is_no_frame() -> None:
    zeros = torch.zeros(4, KV_HEADS, 64)
    frame = fit_kv_frame(zeros.repeat(1, GROUP, 1), zeros, zeros)
    assert frame.queries.isfinite().all() and not frame.keys[1:].any()
    assert not reflection(zeros[0], column(zeros[0], 0)).any()


def test_a_fitted_frame_makes_attention_more_exact() -> None:
    """Through all kernels: of keys, queries and values around means, less than half of the error is left."""
    head_dim, tokens = 64, 128
    heads = torch.cat(samples(tokens, head_dim), dim=1).half()
    q, k, v = heads.float().split([Q_HEADS, KV_HEADS, KV_HEADS], dim=1)
    positions, slots = torch.zeros(tokens, dtype=torch.int32), torch.arange(tokens, dtype=torch.int32)
    cos_sin = torch.cat([torch.ones(1, head_dim // 2), torch.zeros(1, head_dim // 2)], dim=1)
    tables, lens = torch.arange(tokens // PAGE).int()[None], torch.tensor([tokens], dtype=torch.int32)
    errors: list[float] = []
    keys, values = (x.double().repeat_interleave(GROUP, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), keys) * 0.05
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    wanted = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values)
    for frame in (None, fit_kv_frame(q, k, v)):
        cache = quantized_cache("int4", tokens // PAGE, PAGE, KV_HEADS, head_dim)
        turned = rope_append(heads.flatten(1), positions, cos_sin, slots, cache, frame=frame, device="reference")
        starts = torch.tensor([0, tokens], dtype=torch.int32)
        out = paged_attention(turned, cache, tables, starts, lens, 0.05, device="reference")
        out = out if frame is None else restore_values(out, frame, device="reference")
        errors.append(float((out.double() - wanted).norm()))
    assert errors[1] < errors[0] / 2, errors


def test_frames_that_do_not_fit() -> None:
    inputs, cache = append_inputs("int4", (Q_HEADS, KV_HEADS), 64, PAGE)
    frame = random_frame(64)
    with pytest.raises(
        TilusError, match=r"a frame of shapes \[3, 4, 48\] and \[4, 2, 48\], expected \[3, 4, 64\] and \[4, 2, 64\]"
    ):
        rope_append(**inputs, kv_cache=cache, frame=random_frame(48), device="reference")
    with pytest.raises(TilusError, match=r"a frame for a cache of float8_e4m3.*\n.*int4 and int8"):
        rope_append(**inputs, kv_cache=quantized_cache("fp8", 4, PAGE, KV_HEADS, 64), frame=frame, device="reference")
    with pytest.raises(TilusError, match="a frame for a cache of 16 bits"):
        rope_append(**inputs, kv_cache=torch.zeros(4, 2, PAGE, KV_HEADS, 64).half(), frame=frame, device="reference")
    with pytest.raises(TilusError, match=r"heads of shape \[4, 48\], but the frame is of \[4, 64\]"):
        restore_values(torch.zeros(1, 4, 48).half(), frame, device="reference")
    with pytest.raises(TilusError, match=r"shapes \[4, 3, 64\], \[4, 2, 64\] and \[4, 2, 64\], expected"):
        fit_kv_frame(torch.zeros(4, 3, 64), *torch.zeros(2, 4, 2, 64))
