"""What of benchmarks/attention.py needs no GPU: that it measures the right thing. No times are judged."""

from __future__ import annotations

import attention
import kv_errors
import pytest
import torch
from paged import mla
from paged.batches import check, elements_of, error_of, random_batch
from paged.cases import DECODE, LONGEST, QUANTISED, Case
from paged.plans import PLANS
from paged.prefixes import PREFIXES, PrefixCase, shared_batch

from tilus.kernels import find_shared_prefixes, paged_decode
from tilus.kernels.shared_prefix_groups import TOKENS

SMALL = {"heads": 4, "kv_heads": 2, "head_dim": 64}


def test_the_command_needs_no_gpu_to_say_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["attention.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU"):
        attention.main()
    options = attention.options_of(["decode", "plans", "--batch", "1,32", "--no-peers"])
    assert (options.suites, options.batch, options.no_peers) == (["decode", "plans"], [1, 32], True)
    with pytest.raises(SystemExit, match="2"):
        attention.options_of(["encode"])
    assert "no suite 'encode', expected decode, quantised, prefill" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        attention.options_of(["--batch", "0"])
    assert "'0' is no number of sequences" in capsys.readouterr().err


def test_bytes_and_lengths() -> None:
    """All cases are of the size that their name says; scales and minimums count."""
    for case in (*DECODE, *QUANTISED):
        assert len(case.lengths) == case.batch and case.code_nbits in PLANS
        assert case.skewed or set(case.lengths) == {case.context}
        assert max(case.lengths) <= LONGEST and abs(sum(case.lengths) / case.batch / case.context - 1) < 0.1
    assert Case(1, 4096).nbytes == 4096 * 8 * 2 * 256
    assert Case(1, 4096, kv_dtype="fp8").nbytes == 4096 * 8 * 2 * 130
    assert Case(1, 4096, kv_dtype="int4").nbytes == 4096 * 8 * 2 * 68
    assert Case(8, 4096, skewed=True).lengths[0] > 7 * Case(8, 4096, skewed=True).lengths[-1]


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int4"])
def test_sequences_of_a_group_begin_with_the_same_pages(kv_dtype: str) -> None:
    """And all others are different; bytes count every page once."""
    wanted = PrefixCase(4, 272, 32, groups=2, kv_dtype=kv_dtype)
    batch = shared_batch(wanted, 1, "cpu")
    tables, cache = batch.block_tables, batch.caches[0]
    assert batch.kv_lens.tolist() == [304] * 4 and tables.shape == (4, 19)
    assert len(set(tables.flatten().tolist())) == 2 * 17 + 4 * 2 == cache.shape[0]
    assert torch.equal(tables[0, :17], tables[1, :17]) and torch.equal(tables[2, :17], tables[3, :17])
    held = (cache,) if isinstance(cache, torch.Tensor) else (cache.codes, cache.factors)
    assert wanted.nbytes == sum(part.nbytes for part in held)
    shared = find_shared_prefixes(tables, batch.kv_lens, 1, 4, 16, device="reference")
    assert shared[TOKENS].tolist() == [256] * 4
    assert all(case.batch % case.groups == 0 for case in PREFIXES)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "fp8", "int4"])
def test_long_sequences_err_no_more_than_short_ones(kv_dtype: str) -> None:
    """Tensor cores cut off what is added to large sums: those of codes must not be larger than what they stand for."""
    errors = list[float]()
    for context in (1024, 33024):
        batch = random_batch(Case(32, context, kv_dtype=kv_dtype), 1)
        out = paged_decode(batch.q, batch.caches[0], batch.block_tables, batch.kv_lens, batch.scale)
        errors.append(error_of(batch, out))
    assert errors[1] < 1.2 * errors[0], errors


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "fp8", "int4"])
def test_a_right_result_passes_and_a_wrong_one_does_not(kv_dtype: str) -> None:
    case = Case(2, 70, skewed=True, kv_dtype=kv_dtype, q_len=2, **SMALL)
    batch = random_batch(case, 1, "cpu")
    assert 0.3 < float(elements_of(batch.caches[0], torch.arange(2)).std()) < 3
    out = paged_decode(
        batch.q, batch.caches[0], batch.block_tables, batch.kv_lens, batch.scale, device="reference"
    )  # fmt: skip
    assert check(batch, out, "paged_decode") == pytest.approx(error_of(batch, out), rel=1e-3)
    assert error_of(batch, out) < 4e-3 and batch.errors == {"paged_decode": round(error_of(batch, out), 6)}
    out[1, 0, 3] += 0.1
    with pytest.raises(SystemExit, match="paged_decode, 2 x 2 of 70 skewed, heads 4/2"):
        check(batch, out, "paged_decode")


def test_errors_of_caches_are_in_the_order_of_their_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_errors, "TOKENS", 32)
    errors = [kv_errors.error_of("normal", 64, name) for name in ("bfloat16", "int8", "fp8", "int4")]
    assert errors == sorted(errors) and errors[0] < 2e-3 and errors[-1] < 0.3


@pytest.mark.parametrize("q_len", [1, 6])
def test_rows_of_latent_attention(q_len: int) -> None:
    """A right result passes and a wrong one does not; what is counted is what a query sees."""
    case = mla.MlaCase(2, 64, 16, q_len)
    assert case.nbytes == 2 * 64 * 1152
    assert case.operations == 2 * 2 * 16 * (512 + 576) * sum(range(64 - q_len + 1, 64 + 1))
    batch = mla.random_batch(case, 1, "cpu")
    out = mla.attend(batch, batch.caches[0], "reference")
    assert mla.check(batch, out) < 4e-3
    out[1, q_len - 1, 3] += 0.1
    with pytest.raises(SystemExit, match=f"MLA of 2 x {q_len} on 64, 16 heads"):
        mla.check(batch, out)
