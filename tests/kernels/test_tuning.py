"""Plans worth trying, trials of them, and that kernels use what tuning found; with `-m gpu` on real times."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from weights import random_matrix

import tilus
from tilus.dtypes import DTYPES, DataType
from tilus.errors import TilusError
from tilus.kernels import gemm, linear, tune_gemm, tune_linear, tuning
from tilus.kernels.gemm_kernel import gemm_kernel
from tilus.kernels.gemm_schedule import Plan, Product
from tilus.kernels.gemm_schedule import estimated_us as gemm_us
from tilus.kernels.gemm_schedule import plan as gemm_plan
from tilus.kernels.linear import kernel_call
from tilus.kernels.linear_problem import LinearProblem, candidates, estimated_us, heuristic
from tilus.kernels.quantize import WeightHeader, pack
from tilus.kernels.schedule import Schedule, schedule
from tilus.kernels.trial_arrays import random_tensor
from tilus.kernels.tune_gemm import GemmProblem, GemmTrial
from tilus.kernels.tune_linear import LinearTrial
from tilus.runtime import cache, compilations, cuda, tuned_plans
from tilus.runtime.autotune import tune
from tilus.runtime.tuned_plans import Measurement, Tuned, remember
from tilus.target import DEFAULT_TARGET

linear_module = importlib.import_module("tilus.kernels.linear")
gemm_module = importlib.import_module("tilus.kernels.gemm")
INT4 = WeightHeader(tilus.int4, (4096, 4096), 128, "f16")
GPU = cuda.Device(0, "a GPU that is not there", (8, 0), 132, 166912, 1)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("TILUS_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TILUS_AUTOTUNE", raising=False)
    gemm_module._plan.cache_clear()
    yield
    tuned_plans.forget()
    gemm_module._plan.cache_clear()


def problem_of(header: WeightHeader, m: int, act: DataType = tilus.f16) -> LinearProblem:
    return LinearProblem.of(header, m, act, act)


def dimensions(most: int) -> st.SearchStrategy[int]:
    return st.integers(1, most) | st.sampled_from([64, 4096, 14336, 28672])


@given(dimensions(30000), dimensions(30000), st.integers(1, 5000), st.integers(1, 8), st.sampled_from([1, 84, 132]))
def test_candidates_of_linear(n: int, k: int, m: int, nbits: int, num_sms: int) -> None:
    """The rule's choice first; all different, with work for every warp; the others in the order of the model."""
    problem = problem_of(WeightHeader(DTYPES[f"uint{nbits}"], (n, k), k, "f16"), m)
    found = candidates(problem, num_sms)
    tiles_n, tiles_k = -(-n // 64), -(-k // 64)
    assert found[0] == heuristic(problem, num_sms)
    assert found[0] == schedule(m, tiles_n, tiles_k, nbits, num_sms, problem.header.factor_words)
    assert len(set(found)) == len(found) <= 10
    for plan in found:
        assert plan.warps & (plan.warps - 1) == 0 and plan.tokens % 8 == 0
        assert plan.rows <= tiles_n and plan.warps * plan.splits <= max(tiles_k, plan.warps) and plan.warps <= tiles_k
        assert plan.rows * plan.warps * plan.blocks_per_sm <= 16
    times = [estimated_us(plan, problem, num_sms) for plan in found[1:]]
    assert times == sorted(times) and all(us > 0 for us in times)


@given(st.integers(1, 5000), dimensions(30000), dimensions(30000), st.sampled_from([1, 2, 84, 132]))
def test_candidates_of_gemm(m: int, n: int, k: int, num_sms: int) -> None:
    """The rule's choice first, then in the order of the model; `tests/kernels/test_gemm.py` says what each of them must be."""
    problem = GemmProblem(m, n, k, tilus.bf16, tilus.bf16, tilus.bf16)
    found = tune_gemm.candidates(problem, num_sms)
    product = Product(m, n, 2 * k, 2, num_sms)
    assert found[0] == gemm_plan(product) and len(set(found)) == len(found) <= 10
    times = [gemm_us(plan, product) for plan in found]
    assert times == sorted(times) and all(us > 0 for us in times)


def test_there_are_about_ten_for_the_shapes_of_a_model() -> None:
    for shape in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)):
        for m in (1, 16, 64, 256):
            assert len(candidates(problem_of(replace(INT4, shape=shape), m), 132)) == 10


def test_the_model_knows_what_was_measured() -> None:
    """On an H100 at 8192 x 8192 (docs/performance.md): one token takes longer with more bits; a few waves of blocks longer."""
    header = replace(INT4, shape=(8192, 8192))
    by_bits = [problem_of(replace(header, dtype=DTYPES[f"uint{nbits}"]), 1) for nbits in (2, 4, 6, 8)]
    times = [estimated_us(Schedule(8, 1, 8, 2), problem, 132) for problem in by_bits]
    assert times == sorted(times) and 0.5 < times[1] / 16.2 < 2
    assert estimated_us(Schedule(8, 1, 8, 1), problem_of(header, 64), 132) > 3 * times[1]


SCHEMES = [
    WeightHeader(tilus.int4, (130, 256), 128, "f16"),
    WeightHeader(tilus.uint4, (64, 128), 64, "f16", "f16"),
    WeightHeader(tilus.uint4, (200, 128), 64, "bf16", "f32", has_table=True),
    WeightHeader(tilus.float8_e5m2, (40, 96), 32, "float8_e8m0"),
    WeightHeader(tilus.float4_e2m1, (40, 96), 32, "float8_e8m0", exact_in_f16=True),
    WeightHeader(tilus.uint3, (64, 128), 32, "f32", has_zeros=True),
    WeightHeader(tilus.float4_e2m1, (64, 64), 16, "float8_e4m3"),
]


@pytest.mark.parametrize("header", SCHEMES, ids=str)
def test_trials_know_right_results_of_every_scheme(header: WeightHeader) -> None:
    """Also from wrong ones: a trial of a kernel that leaves out a tile along K, or does not write a row."""
    problem = problem_of(header, 4, tilus.bf16)
    trial = LinearTrial(problem, "cpu", "reference", copies=2)
    weight = trial._weights[0]
    assert weight.header == header
    plan = candidates(problem, 132)[0]
    assert trial.check(plan) is None
    assert len(trial.actions(plan)) == 2
    weight.codes[-1] ^= 0xFF  # the last 64 rows are others now
    assert "results are wrong" in str(trial.check(plan))


@pytest.mark.parametrize("defect", ["row", "tile", "nothing"])
def test_trials_notice(monkeypatch: pytest.MonkeyPatch, defect: str) -> None:
    """A kernel that leaves a row out, or a tile along K, or writes nothing over right results."""
    problem = problem_of(replace(INT4, shape=(128, 4096)), 4)
    trial, plan = LinearTrial(problem, "cpu", "reference"), candidates(problem, 132)[0]
    assert trial.check(plan) is None
    real = tune_linear.launch

    def wrong(x: Any, weight: Any, y: Any, *rest: Any) -> None:
        before, x = y.clone(), x.clone()
        if defect == "tile":
            x[:, 64:128] = 0
        if defect != "nothing":
            real(x, weight, y, *rest)
        if defect == "row":
            y[-1, 64:] = before[-1, 64:]

    monkeypatch.setattr(tune_linear, "launch", wrong)
    assert "results are wrong" in str(trial.check(plan))


def test_tuning_linear_compiles_checks_and_picks(monkeypatch: pytest.MonkeyPatch) -> None:
    """All real but the times: compiled for a GPU, run on the reference."""
    problem = problem_of(replace(INT4, shape=(128, 1024)), 16)
    plans = candidates(problem, 132)[:3]
    trial = LinearTrial(problem, "cpu", "reference", copies=2)
    times = iter([5.0, 3.0, 4.0])
    before = compilations.num_compilations()
    found = tune(plans, trial, lambda actions: (actions[0](), next(times))[1])
    assert found == Tuned(tuple(map(Measurement, plans, [5.0, 3.0, 4.0])), 1)
    assert compilations.num_compilations() - before == len(plans)


def test_tuning_gemm_compiles_checks_and_picks(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = GemmProblem(16, 128, 64, tilus.f16, tilus.f16, tilus.f16)
    trial = GemmTrial(problem, "cpu", "emulator")
    plans = [Plan(16, 1, 1, 2, launched=1), Plan(32, 1, 1, 2, launched=1)]
    times = iter([5.0, 3.0])
    assert tune(plans, trial, lambda actions: next(times)).best == 1
    monkeypatch.setattr(tune_gemm, "launch", lambda *args: None)
    assert trial.check(plans[0]) == f"{16 * 128} of {16 * 128} results are wrong"


@pytest.mark.parametrize(
    "dtype", [tilus.f16, tilus.bf16, tilus.f32, tilus.float8_e4m3, tilus.float8_e5m2, tilus.int8], ids=str
)
def test_random_operands_are_of_their_type_and_finite(dtype: DataType) -> None:
    found = random_tensor((64, 64), dtype, "cpu")
    values = found.float()
    assert found.element_size() == dtype.nbytes and dtype.is_float == found.dtype.is_floating_point
    assert values.isfinite().all() and 0.5 < values.std() < 4 and values.unique().numel() > 8
    with pytest.raises(TilusError, match="a tensor of int4, expected one of f16, "):
        random_tensor((8, 8), tilus.int4, "cpu")


class Recorded:
    """Launches of a module, with their plans; the GPU is made up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
        self.plans: list[Any] = []
        monkeypatch.setattr(module, "launch", lambda *args: self.plans.append(args[4]))
        monkeypatch.setattr(cuda, "current_device", lambda: GPU)


def test_problems_with_other_plans_have_other_keys() -> None:
    """Everything that a kernel depends on is in the key; the bucket stands for tokens, global scale and columns do not count."""
    base = problem_of(INT4, 5)
    headers = [
        replace(INT4, shape=(4096, 8192)), replace(INT4, shape=(8192, 4096)), replace(INT4, dtype=tilus.uint4),
        replace(INT4, group=64), replace(INT4, scale_dtype="bf16"), replace(INT4, mins_dtype="f16"),
        replace(INT4, has_zeros=True), replace(INT4, has_table=True), replace(INT4, exact_in_f16=True),
    ]  # fmt: skip
    others = [problem_of(header, 5) for header in headers]
    others += [replace(base, m=9), replace(base, m=4), replace(base, act=tilus.bf16), replace(base, out=tilus.f32)]
    dense = GemmProblem(5, 4096, 4096, tilus.f16, tilus.f16, tilus.f16)
    changes = {"m": 9, "n": 4097, "k": 64, "act": tilus.bf16, "weight": tilus.bf16, "out": tilus.f32}
    all_of_them = [base, *others, dense, *(replace(dense, **{name: value}) for name, value in changes.items())]
    keys = [problem.key("GPU") for problem in all_of_them]
    assert len({key.path for key in keys}) == len(keys)
    same = [replace(INT4, has_columns=True), replace(INT4, global_scale=0.5)]
    assert {problem_of(header, m).key("GPU") for header in same for m in (5, 8)} == {base.key("GPU")}
    assert replace(dense, m=8).key("GPU") == dense.key("GPU") != dense.key("another GPU")


def test_linear_uses_what_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """For all tokens of the bucket, of weights of that shape and scheme; found once for each weight and number of tokens."""
    recorded = Recorded(monkeypatch, linear_module)
    weight, other = (pack(random_matrix(tilus.int4, 64, 256, group, seed=1)) for group in (128, 64))
    best = Schedule(16, 1, 2, 3)
    problem = LinearProblem.of(weight.header, 12, tilus.f16, tilus.f16)
    remember(problem.key(GPU.name), Tuned((Measurement(Schedule(8, 1, 4, 1), 2.0), Measurement(best, 1.0)), 1))

    def call(m: int, weight: Any) -> Any:
        linear(np.ones((m, 256), np.float16), weight, device="cuda")
        return recorded.plans[-1]

    assert [call(m, weight) for m in (9, 16)] == [best, best]
    for m, which in ((8, weight), (17, weight), (16, other)):
        expected = heuristic(LinearProblem.of(which.header, m, tilus.f16, tilus.f16), 132)
        assert call(m, which) == expected != best
    reads: list[Any] = []
    monkeypatch.setattr(linear_module, "chosen", lambda *args: reads.append(args))
    assert call(16, weight) == best and not reads
    linear(np.ones((16, 256), np.float16), weight, out_dtype=np.float32, device="cuda")
    assert len(reads) == 1  # results of another type are another problem


def test_gemm_uses_what_is_remembered_with_as_many_blocks_as_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(monkeypatch, gemm_module)
    x, w = np.ones((300, 64), np.float16), np.ones((1024, 64), np.float16)
    problem = GemmProblem(300, 1024, 64, tilus.f16, tilus.f16, tilus.f16)
    best = Plan(64, 2, 1, 3, share_x=2, launched=64)
    remember(problem.key(GPU.name), Tuned((Measurement(best, 1.0),), 0))
    gemm(x, w, device="cuda")
    gemm(x[:257], w, device="cuda")
    gemm(x[:256], w, device="cuda")
    fits = replace(best, launched=40)
    assert recorded.plans == [fits, fits, gemm_plan(Product(256, 1024, 128, 2, 132))]


def test_tuning_at_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for a bucket, at its largest number of tokens, and only where it is asked for."""
    recorded = Recorded(monkeypatch, linear_module)
    weight, twin = (pack(random_matrix(tilus.int4, 64, 256, 128, seed=seed)) for seed in (1, 2))
    asked: list[LinearProblem] = []
    best = Schedule(16, 1, 2, 3)

    def measure(problem: LinearProblem, device: cuda.Device) -> Tuned:
        asked.append(problem)
        return Tuned((Measurement(best, 1.0),), 0)

    monkeypatch.setattr(tune_linear, "measure", measure)
    linear(np.ones((9, 256), np.float16), weight, device="cuda")
    assert not asked
    monkeypatch.setenv("TILUS_AUTOTUNE", "1")
    for m, which in ((10, weight), (11, weight), (12, twin), (12, twin)):
        linear(np.ones((m, 256), np.float16), which, device="cuda")
    assert asked == [LinearProblem.of(weight.header, 16, tilus.f16, tilus.f16)]
    assert recorded.plans[1:] == [best] * 4


def test_tuning_all_remembers_and_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [problem_of(INT4, 1), GemmProblem(3, 256, 128, tilus.f16, tilus.f16, tilus.f16)]
    measured: list[int] = []

    def measure(problem: Any, device: Any, timer: Any) -> Tuned:
        measured.append(problem.m)
        plans = (
            (Schedule(8, 1, 4, 1), Schedule(8, 1, 8, 1)) if problem.m == 1 else (Plan(16, 1, 1, 4), Plan(32, 1, 1, 4))
        )
        return Tuned(tuple(map(Measurement, plans, (3.0, 2.0))), 1)

    monkeypatch.setattr(tune_linear, "measure", measure)
    monkeypatch.setattr(tune_gemm, "measure", measure)
    assert tuning.ratios(problems, GPU) == {}
    steps: list[int] = []
    first = tuning.tune_all(problems, GPU, done=lambda: steps.append(1))
    tuned_plans.forget()
    assert tuning.tune_all(problems, GPU) == first and [result.us for result in first] == [2.0, 2.0]
    assert measured == [1, 4] and len(steps) == 2
    tuning.tune_all(problems, GPU, again=True)
    assert measured == [1, 4, 1, 4]
    assert tuning.ratios(problems, GPU) == {
        "4096 x 4096 int4, groups of 128, M = 1": 1.5, "256 x 128 f16, M = 3": 1.5,
    }  # fmt: skip


@pytest.mark.parametrize("act", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def test_compiling_ahead_of_time_makes_what_a_launch_looks_for(
    monkeypatch: pytest.MonkeyPatch, act: torch.dtype
) -> None:
    """The same machine code as for torch's tensors, whichever kernels the rule takes; nothing is compiled twice."""
    dtype = tilus.f16 if act == torch.float16 else tilus.bf16
    problems = [problem_of(WeightHeader(tilus.int4, (128, 4096), 128, "f16"), m, dtype) for m in (1, 2, 4, 17)]
    dense = GemmProblem(4, 128, 64, dtype, dtype, dtype)
    plans: list[tuple[LinearProblem, Any]] = []
    real = tune_linear.compile_plan
    monkeypatch.setattr(tune_linear, "compile_plan", lambda *args: (plans.append((args[0], args[1])), real(*args))[1])
    before = compilations.num_compilations()
    assert tuning.compile_plans([*problems, dense, dense], DEFAULT_TARGET, 132, processes=1) == len(plans) + 1
    compiled = compilations.num_compilations() - before
    assert 3 <= compiled <= 5 and len(plans) <= 4
    weight = pack(random_matrix(tilus.int4, 128, 4096, 128, seed=0), "cpu", "mma")
    for problem, plan in plans:
        x, y = torch.empty(problem.m, 4096, dtype=act), torch.empty(problem.m, 128, dtype=act)
        kernel, arguments, values = kernel_call(x, weight, y, None, plan)
        cache.assemble(kernel.ptx(*arguments, **values), DEFAULT_TARGET)
    x, w, y = (torch.empty(shape, dtype=act) for shape in ((4, 64), (128, 64), (4, 128)))
    arguments, values = gemm_module.kernel_call(x, w, y, tune_gemm.NO_FACTORS, tune_gemm.heuristic(dense, 132))
    cache.assemble(gemm_kernel.ptx(*arguments, **values), DEFAULT_TARGET)
    assert compilations.num_compilations() - before == compiled


def test_compiling_in_processes_fills_the_same_cache() -> None:
    problems = [problem_of(replace(INT4, shape=(128, 512)), m) for m in (1, 16)]
    assert tuning.compile_plans(problems, DEFAULT_TARGET, 132, processes=2) == 2
    before = compilations.num_compilations()
    tuning.compile_plans(problems, DEFAULT_TARGET, 132, processes=1)
    assert compilations.num_compilations() == before


def test_compiling_takes_the_tuned_plan_and_an_easier_one_where_that_spills(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(replace(INT4, dtype=tilus.uint8, shape=(128, 512), group=16, mins_dtype="f16"), 32)
    spilling = Schedule(32, 1, 4, 2)
    remember(problem.key(GPU.name), Tuned((Measurement(spilling, 1.0),), 0))
    plans: list[Schedule] = []
    real = tune_linear.kernel_call
    monkeypatch.setattr(tune_linear, "kernel_call", lambda *args: (plans.append(args[4]), real(*args))[1])
    tuning.compile_plans([problem], DEFAULT_TARGET, 132, GPU, processes=1)
    assert plans[:2] == [spilling, spilling] and plans[2] == spilling.easier()


@pytest.fixture
def gpu() -> cuda.Device:
    return cuda.device(torch.cuda.current_device())


@pytest.mark.gpu
def test_gpu_tunes_linear_at_first_use(gpu: cuda.Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real times; the result with the winner is right, and the next weight of that shape uses it."""
    monkeypatch.setenv("TILUS_AUTOTUNE", "1")
    matrix = random_matrix(tilus.int4, 512, 1024, 128, seed=0)
    x = torch.randn(16, 1024, device="cuda").half()
    weights = [pack(matrix, "cuda") for _ in range(2)]
    results = [linear(x, weight) for weight in weights]
    exact = x.double().cpu() @ torch.from_numpy(matrix.dequantize()).double().T
    for y in results:
        assert (y.double().cpu() - exact).abs().max() < 0.01 * exact.abs().max()
    problem = LinearProblem.of(weights[0].header, 16, tilus.f16, tilus.f16)
    found = tuning.known(problem, gpu)
    assert found is not None and found.us > 0 and sum(m.us is not None for m in found.measurements) >= 3
    assert not [m for m in found.measurements if m.note is not None and "wrong" in m.note]
    assert [list(weight.schedules.values()) for weight in weights] == [[found.plan]] * 2


@pytest.mark.gpu
def test_gpu_tunes_gemm(gpu: cuda.Device) -> None:
    if gpu.capability != (9, 0):
        with pytest.raises(TilusError):
            tuning.tune_all([GemmProblem(64, 512, 512, tilus.f16, tilus.f16, tilus.f16)], gpu)
        return
    (found,) = tuning.tune_all([GemmProblem(64, 512, 512, tilus.f16, tilus.f16, tilus.f16)], gpu)
    assert all(m.us is not None and m.us > 0 for m in found.measurements), found
    x, w = torch.randn(60, 512, device="cuda").half(), torch.randn(512, 512, device="cuda").half()
    exact = x.double() @ w.double().T
    assert (gemm(x, w).double() - exact).abs().max() < 0.01 * exact.abs().max()


@pytest.mark.gpu
def test_gpu_times_grow_with_the_work(gpu: cuda.Device) -> None:
    """A weight of 32 times the bytes takes longer."""
    times = [tune_linear.measure(problem_of(replace(INT4, shape=(n, 8192)), 1), gpu).us for n in (1024, 32768)]
    assert 3 * times[0] < times[1] < 400
