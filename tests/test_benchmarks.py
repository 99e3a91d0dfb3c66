"""What of the benchmarks needs no GPU: that they measure the right thing, and their schema. No times are judged."""

from __future__ import annotations

import json
import os
import runpy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gemm
import numpy as np
import pytest
import serving_start
import torch
from products import chain, eight_bits, grouped, int4, kinds, limits, run, sweep
from products.reads import read
from products.report import Report
from products.timing import Action, Budget, Timer, copies, in_turn, one_after_the_other, poison
from products.weights import Case, WrongResult, expected, random_weight

import tilus
from tilus import config
from tilus.kernels import linear, quantize_tokens
from tilus.kernels.quantize import PRESETS, RECIPE_NAMES, SCHEMES, pack, stack, unpack
from tilus.ptx.assembler import SpillError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_the_command_needs_no_gpu_to_say_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gemm.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU"):
        gemm.main()
    options = gemm.options_of(["types", "int4", "--shapes", "128x256,64x512", "--tokens", "1,3", "--types", "int4"])
    assert (options.suites, options.shapes, options.tokens) == (["types", "int4"], [(128, 256), (64, 512)], [1, 3])
    assert {case.dtype for case in gemm.chosen(kinds.type_cases(options.shapes), options)} == {"int4"}
    for wrong in (["--shapes", "128"], ["--tokens", "0"], ["--types", "int9"], ["everything"]):
        with pytest.raises(SystemExit, match="2"):
            gemm.options_of(wrong)
    assert "'128' is no shape" in capsys.readouterr().err


def test_a_random_weight_is_what_it_packs() -> None:
    """Every scheme, some types: its rows in float64 are the values of the packed weight, and all finite codes occur."""
    kinds_of_weights = [replace(case, group=min(case.group, 256)) for case in kinds.scheme_cases([(128, 256)])]
    for case in [*kinds_of_weights, Case((128, 256), "uint1"), Case((128, 256), "float8_e4m3")]:
        weight = random_weight(case, "cpu")
        assert len(weight.codes.unique()) == int(weight.numbers.isfinite().sum()) >= 2
        values = unpack(weight.pack()).dequantize()
        np.testing.assert_allclose(weight.rows(0, 128).numpy(), values, rtol=2**-23, atol=0)
        np.testing.assert_array_equal(weight.rows(64, 128).numpy(), weight.rows(0, 128)[64:].numpy())
        y = torch.randn(8, 256).double() @ weight.rows(0, 128).T
        assert 0.2 < float(y.std()) < 4, "results are far from f16's limits"


def test_the_kernel_that_is_timed_is_checked() -> None:
    """Every scheme; a weight whose rows are displaced by one is refused, and so is what is a little too large everywhere."""
    for case in kinds.scheme_cases([(128, 256)]):
        weight = random_weight(case, "cpu")
        x = torch.randn(16, 256, generator=torch.Generator().manual_seed(0)).half()
        y = linear(x, weight.pack(), device="reference")
        (wanted,) = run.products_with(weight, [x])
        found = wanted.check(y, case.scheme)
        assert 0 < found["error"] <= 1 and 0 < found["rms"] <= 2**-11
        with pytest.raises(WrongResult, match="an element is off by"):
            wanted.check(y.roll(1, 1), case.scheme)
        with pytest.raises(WrongResult, match="root mean square"):
            replace(wanted, bound=torch.ones_like(wanted.bound)).check(wanted.exact * (1 + 2**-10), case.scheme)


class CpuTimer(Timer):
    """Calls all actions twice, and says that they took a microsecond each."""

    def __init__(self) -> None:
        self.l2_nbytes = 50 << 20

    def us(
        self, actions: Sequence[Action], outputs: Sequence[torch.Tensor] = (), replays: int | None = None
    ) -> float:  # fmt: skip
        for action in actions:
            action()
        poison(outputs)
        for action in actions:
            action()
        return 1.0


def test_results_are_checked_before_and_after_timing() -> None:
    """What is not written, or wrong from some call on, is refused."""
    xs, weight = [torch.randn(2, 64).half() for _ in range(2)], torch.randn(32, 64).half()
    wanted = [expected(x, lambda a, b: weight[a:b].double(), 32, torch.float16) for x in xs]
    outputs = run.outputs_like(wanted, torch.float16)
    calls = 0

    def product(good: int) -> list[Action]:
        def call(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> None:
            nonlocal calls
            calls += 1
            if calls <= good:
                y.copy_((x.double() @ w.double().T).half())

        return in_turn(call, xs, [weight] * 3, outputs)

    assert CpuTimer().checked_us(product(100), outputs, wanted, "good")[1]["error"] <= 1
    assert calls == 2 + 2 * 3
    for good, when in ((1, "one call"), (2, "after the replays"), (2 + 3, "after the replays")):
        calls = 0
        with pytest.raises(WrongResult, match=when):
            CpuTimer().checked_us(product(good), outputs, wanted, "bad")


def test_activations_take_turns() -> None:
    seen: list[tuple[int, int, int]] = []
    actions = in_turn(lambda x, w, y: seen.append((x, w, y)), [1, 2], [10, 11, 12], [5, 6])
    for action in actions:
        action()
    assert seen == [(1, 10, 5), (2, 11, 6), (1, 12, 5)]


def test_a_chain_is_checked_layer_by_layer() -> None:
    weights = [random_weight(Case((128, 128), "int4"), "cpu", seed) for seed in range(3)]
    layers = chain.Chain(weights, [weight.pack() for weight in weights], torch.randn(4, 128).half())
    for action in layers.actions("reference"):
        action()
    assert 0 < layers.check("good")["rms"] <= 3 * 2**-11
    layers.states[2].copy_(layers.states[2].roll(1, 1))
    with pytest.raises(WrongResult, match="layer 1"):
        layers.check("bad")


def test_a_failure_becomes_a_line_but_a_wrong_result_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    some = run.Run.__new__(run.Run)
    some.failures = {}

    def fails(error: BaseException) -> Any:
        raise error

    assert some.attempt("us", lambda: 2.0) == 2.0
    assert some.attempt("us", lambda: fails(SpillError("two words\nand more"))) is None
    assert some.taken_failures() == {"us": "SpillError: two words"} and some.failures == {}
    with pytest.raises(WrongResult):
        some.attempt("us", lambda: fails(WrongResult("wrong")))


def test_a_sweep_has_schedules_of_both_batches() -> None:
    plans = sweep.plans()
    assert len(set(plans)) == len(plans) == 45
    assert {plan.tokens for plan in plans} == {8, 16}


@pytest.mark.parametrize("dependent", [False, True])
def test_the_read_kernel_reads_every_byte(dependent: bool) -> None:
    x = np.random.default_rng(0).integers(-100, 100, 20_000).astype(np.int32)
    sums = np.zeros(3, np.int32)
    read.on("emulator")(x, sums, block=8192, dependent=dependent)
    assert sums.tolist() == [int(x[i : i + 8192].sum()) for i in (0, 8192, 16384)]
    assert ("griddepcontrol.wait" in read.ptx(block=8192, dependent=dependent)) == dependent


def test_weight_bytes_and_copies() -> None:
    weight = random_weight(Case((128, 256), "int4"), "cpu").pack()
    assert weight.nbytes == 128 * 256 // 2 + 128 * 2 * 2  # codes, and two f16 scales a row
    again = run.clone(weight)
    assert again.header == weight.header
    assert all(torch.equal(a, again.arrays[n]) and a is not again.arrays[n] for n, a in weight.arrays.items())
    for nbytes in (1_000, 8 << 20, 150 << 20, 300 << 20):
        assert copies(nbytes, 50 << 20) * nbytes > 200 << 20 and copies(nbytes, 50 << 20) >= 2


def test_launches_one_after_the_other_leave_the_setting_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    for before in (None, "1"):
        if before is not None:
            monkeypatch.setenv("TILUS_DEPENDENT_LAUNCH", before)
        with one_after_the_other():
            assert not config.dependent_launch()
        assert os.environ.get("TILUS_DEPENDENT_LAUNCH") == before


def test_limits() -> None:
    assert limits.geomean([1, 4]) == pytest.approx(2) and limits.geomean([3.0]) == pytest.approx(3)
    with pytest.raises(ValueError, match="geometric mean"):
        limits.geomean([])
    assert limits.product_us(8192, 8192, 8192, 758) == pytest.approx(1450.54, abs=0.01)
    assert limits.limit_us(4096, 4096, 1, 4.2, 758) == 4.2
    assert limits.limit_us(4096, 4096, 4096, 4.2, 758) == pytest.approx(2 * 4096**3 / 758e6)
    assert [limits.read_bar(nbits) for nbits in (1, 2, 3, 4, 8)] == [1.7, 1.7, 1.45, 1.25, 1.25]


def times(m: int, us: float | None, fp16: float | None, bf16: float | None) -> dict[str, Any]:
    return {
        "M": m, "us": us, "plain_us": 10.0, "triton_us": None, "cublas_fp16_us": fp16, "cublas_bf16_us": bf16, "limit_us": 4.0,
    }  # fmt: skip


def test_speedups_by_tokens() -> None:
    """Over the faster cuBLAS; an M waits for all its shapes, and a shape without a time misses the bar."""
    rows = [
        times(16, 5, 20, 30),
        times(1, 5, 20, 18),
        times(1, 10, None, 40),
        times(4, None, 9, 9),
        times(4, 5, 90, 90),
    ]
    one, four = limits.by_tokens(rows, 2)
    assert one == {
        "M": 1, "speedup": 3.795, "speedup_plain": 2.683, "speedup_triton": None, "speedup_limit": 6.708, "bar": 3.6, "met": True,
    }  # fmt: skip
    assert (four["M"], four["speedup"], four["met"]) == (4, None, False)
    assert limits.by_tokens([times(2, 5, 5, 5)], 1)[0]["met"] is None
    assert not limits.by_tokens([times(1, 5, 17.9, 20)], 1)[0]["met"]


def test_a_ratio_is_of_like_to_like() -> None:
    found = {"us": 12.0, "plain_us": 14.0, "error": 0.5, "rms": 1e-4}
    entry = kinds.entry(Case((128, 256), "int4"), 1, found, (10.0, 11.0), 40.0, {})
    assert (entry["ratio"], entry["plain_ratio"], entry["bar"], entry["met"]) == (1.2, 1.273, 1.25, True)
    missing = kinds.entry(Case((128, 256), "int3"), 1, found | {"us": None}, (10.0, 11.0), None, {"us": "why"})
    assert (missing["ratio"], missing["met"], missing["failures"]) == (None, False, {"us": "why"})
    table = kinds.entry(Case((128, 256), "uint4", "table"), 1, found, (10.0, 11.0), 40.0, {})
    assert (table["bar"], table["met"]) == (None, None)


def test_a_report_is_whole_after_each_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results" / "gemm.json"
    report = Report(path, {"device": "some"})

    def rows() -> Iterator[dict[str, Any]]:
        for m in (1, 4):
            yield times(m, 5.0, 20.0, 30.0) | {
                "N": 64,
                "K": 128,
                "read_us": 3.0,
                "plain_read_us": 4.0,
                "failures": {"triton_us": "why"},
            }
            assert [row["M"] for row in json.loads(path.read_text())["suites"]["int4"]["rows"]][-1] == m

    report.suite(
        "int4", rows(), int4.COLUMNS, int4.cells, lambda found: limits.by_tokens(found, 1), lambda: {"seconds": 3}
    )
    written = json.loads(path.read_text())
    assert written == report.data and written["device"] == "some" and written["seconds"] == 3
    assert [entry["M"] for entry in written["suites"]["int4"]["summary"]] == [1, 4]
    assert list(path.parent.iterdir()) == [path]
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if "64 x 128" in line).split() == (
        ["64", "x", "128", "1", "5.00", "10.00", "-", "20.00", "30.00", "3.00", "4.00", "4.00", "4.00", "5.00"]
    )
    assert lines.count("    no triton_us: why") == 2 and lines[-1].split()[-1] == "met"


def test_a_budget_ends() -> None:
    now = 10.0
    budget = Budget(5, lambda: now)
    assert not budget.exhausted
    now = 15.0
    assert budget.exhausted and budget.used == 5 and not Budget(None, lambda: now).exhausted


def test_codes_are_paired_as_the_library_does() -> None:
    x = torch.randn(3, 64).half()
    plain, moved = (quantize_tokens(x, paired=paired, device="reference")[0] for paired in (False, True))
    assert torch.equal(eight_bits.paired(plain), moved)


def test_tokens_go_to_experts() -> None:
    """Sorted rows for two different experts each, their float64 products, and the experts' weights in the stack."""
    given = grouped.routed(20, 128, 8, "cpu", 0)
    assert given.bounds == given.offsets.tolist() and given.bounds[0] == 0 and given.bounds[-1] == len(given.x) == 40
    assert max(b - a for a, b in zip(given.bounds, given.bounds[1:])) <= 20
    weights = [random_weight(Case((64, 128), "int4"), "cpu", seed) for seed in range(3)]
    found = grouped.products_of(given, weights)
    stacked = stack([weights[expert % 3].pack() for expert in range(8)])
    alone = grouped.experts_of(stacked, 8)
    for expert in given.active:
        own, weight = slice(*given.bounds[expert : expert + 2]), weights[expert % 3]
        assert torch.equal(found.exact[own], given.x[own].double() @ weight.rows(0, 64).T)
        assert (unpack(alone[expert]).codes == weight.matrix.codes).all()


@pytest.mark.gpu
def test_rows_are_measured_on_a_gpu() -> None:
    """Two shapes whose results are right, with every peer; reads and products take time, and nothing fails."""
    with torch.cuda.stream(torch.cuda.Stream()):
        some = run.Run(5, Budget(None))
        some.timer.l2_nbytes = 1 << 18  # few copies: times do not matter
        rows = list(int4.rows(some, [(256, 512), (192, 1024)], [1, 100]))
        (layers,) = chain.rows(some, [256], [3])
        (experts,) = grouped.rows(some, [(256, 512)], [9], experts=8)
        eight = list(eight_bits.rows(some, [(256, 512)], [32]))
    assert [(row["N"], row["M"]) for row in rows] == [(256, 1), (192, 1), (256, 100), (192, 100)]
    for row in [*rows, layers, experts, *eight]:
        assert row["failures"] == {}
        times = {key: value for key, value in row.items() if key.endswith("_us") or key == "us"}
        assert all(value > 0 for value in times.values() if value is not None)
    assert [row["torch_us"] is None for row in eight] == [False, False, True, True]


def test_compile_time_schema() -> None:
    compile_time = runpy.run_path(str(BENCHMARKS / "compile_time.py"))
    sample = compile_time["in_new_process"]("uint4", "sm_90a")
    assert list(sample) == ["import_s", "library_s", "frontend_s", "passes_s", "codegen_s", "ptxas_s"]
    assert all(seconds > 0 for seconds in sample.values())


def test_layout_benchmark_covers_the_library() -> None:
    layout = runpy.run_path(str(BENCHMARKS / "layout.py"))
    measured = layout["measure"](repeats=1)
    assert measured["register_layouts"] > 50 and measured["memory_layouts"] > 20
    operations = {(case["kind"], case["operation"]) for case in measured["cases"]}
    assert operations == {
        (kind, name)
        for kind in ("register", "memory")
        for name in ("construct", "product", "divide", "left_divide", "equal", "hash", "reshape")
    }
    assert all(case["median_us"] > 0 and case["samples"] > 0 for case in measured["cases"])


def test_inference_schema() -> None:
    measured = runpy.run_path(str(BENCHMARKS / "inference.py"))["measure"]((100,), samples=1)
    (case,) = measured["cases"]
    assert list(case) == ["instructions", "inference_s", "evaluations", "pipeline_s"]
    assert all(value > 0 for value in case.values()) and abs(case["instructions"] - 100) < 10


@pytest.fixture(scope="module")
def casts() -> dict[str, Any]:
    return runpy.run_path(str(BENCHMARKS / "casts.py"))


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads((BENCHMARKS / "results" / "cpu" / "casts.json").read_text())


def test_the_recorded_costs_of_casts_are_those_of_today(casts: dict[str, Any], recorded: dict[str, Any]) -> None:
    found = casts["measure"]([tilus.dtype(name) for name in ("int3", "uint8", "float6_e3m2", "float8_e4m3")], False)
    rows = {(row["target"], row["src"], row["dst"]): row for row in recorded["casts"]}
    for row in found["casts"]:
        before = rows[row["target"], row["src"], row["dst"]]
        assert row == before | {"machine": None}
    assert all(row in recorded["original"] for row in found["original"])


def test_the_table_of_casts_is_the_recorded_one(casts: dict[str, Any], recorded: dict[str, Any]) -> None:
    page = (BENCHMARKS.parent / "docs" / "casts.md").read_text()
    assert casts["table"](recorded) in page, "paste the table of `python benchmarks/casts.py --table`"


def test_the_machine_code_of_a_cast_takes_little_more_than_its_plan(
    casts: dict[str, Any], recorded: dict[str, Any]
) -> None:
    """In every row, and measured again for one: what ptxas adds are constants that it makes again in the loop."""
    for row in recorded["casts"]:
        if row["machine"] is not None:
            assert row["scaled"] <= row["machine"] + 1 / 32 <= row["scaled"] + 0.25
    again = casts["machine_cost"](tilus.float4_e2m1, tilus.f16, casts["TARGETS"]["sm_90a"])
    assert 1.125 <= again <= 1.125 + 0.25


@pytest.fixture(scope="module")
def accuracy() -> dict[str, Any]:
    return runpy.run_path(str(BENCHMARKS / "accuracy.py"))


def test_accuracy_rows_have_every_type_and_scheme_once(accuracy: dict[str, Any]) -> None:
    rows = accuracy["all_rows"]()
    assert len({row.name for row in rows}) == len(rows)
    assert {row.recipe.dtype for row in rows} == {tilus.dtype(name) for name in RECIPE_NAMES if name not in PRESETS}
    assert {row.recipe.scheme for row in rows} == set(SCHEMES)


def test_the_accuracy_table_is_what_was_measured(accuracy: dict[str, Any]) -> None:
    """And 4 bits with a scale and a minimum for 32 weights lose no more than 1 % of perplexity against the model as shipped."""
    result = json.loads((BENCHMARKS / "results" / "h100" / "quantization.json").read_text())
    assert [row["row"] for row in result["rows"]] == [row.name for row in accuracy["all_rows"]()]
    assert accuracy["table"](result) in (BENCHMARKS.parent / "docs" / "quantization.md").read_text()
    ratios = {row["row"]: row["ratio"] for row in result["rows"]}
    assert ratios["uint4-g32"] <= 1.01


def test_launches_on_the_cpu_are_measured() -> None:
    measure = runpy.run_path(str(BENCHMARKS / "cpu_launch.py"), {"__name__": "benchmark"})["measure"]
    measure.__globals__["LAUNCHES"] = 5
    result = measure(2, 64, 1)
    recorded = json.loads((BENCHMARKS / "results" / "cpu" / "cpu_launch.json").read_text())
    assert all(case.keys() == result.keys() for case in recorded["cases"])
    assert 0 < result["min_us"] <= result["median_us"]


@pytest.fixture(scope="module")
def cpu_linear() -> dict[str, Any]:
    return runpy.run_path(str(BENCHMARKS / "cpu_linear.py"))


def test_what_is_timed_on_a_cpu_is_checked(cpu_linear: dict[str, Any]) -> None:
    """A result whose columns are displaced by one is refused; copies are more than the caches hold, each its own memory."""
    matrix = cpu_linear["random_matrix"]("uint4", 128, 256, 32, True)
    weight = pack(matrix, torch.device("cpu"))
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).half()
    y = linear(x, weight, device="reference")
    cpu_linear["check"](matrix, x, y)
    with pytest.raises(SystemExit, match="the result is off by"):
        cpu_linear["check"](matrix, x, y.roll(1, 1))


def test_the_read_kernel_of_a_cpu_reads_every_byte(cpu_linear: dict[str, Any]) -> None:
    x = torch.randint(-100, 100, (150_000,), dtype=torch.int32)
    sums = torch.zeros(3, dtype=torch.int32)
    cpu_linear["read"].on("cpu")(x, sums)
    assert sums.tolist() == [int(x[i : i + 65536].sum()) for i in (0, 65536, 131072)]


def test_the_servers_rates_are_medians_beside_the_peers() -> None:
    row = runpy.run_path(str(BENCHMARKS / "cpu_serving.py"))["row"]
    assert row("decode", [3.0, 9.0, 6.0], [2.0, 4.0, 3.0]) == {
        "case": "decode", "unit": "tokens/s", "ours": 6.0, "peer": 3.0, "ratio": 2.0,
    }  # fmt: skip
    assert row("decode", [3.0, 9.0, 6.0], []) | {"ours": None} == {
        "case": "decode", "unit": "tokens/s", "ours": None, "peer": None, "ratio": None,
    }  # fmt: skip


def test_phases_of_a_start_are_read_from_what_the_server_says() -> None:
    lines = [(1.0, "loading x on cpu\n"), (2.0, "packing weights: layer 2 of 2\n"), (2.1, "packing weights: 1.4 s\n")]
    rows = list(
        serving_start.rows_of("x", "first", [*lines, (7.26, "ready: x on cpu at http://[::1]:1\n"), (8.0, "a: 1.0 s")])
    )
    assert [(row["metric"], row["value"]) for row in rows] == [("first packing weights", 1.4), ("first ready", 7.3)]
    with pytest.raises(SystemExit, match="the server ended before it was ready:\nloading x on cpu"):
        list(serving_start.rows_of("x", "first", lines))
