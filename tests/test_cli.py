"""The command line: every form and target, definitions, the text form, users' mistakes with their whole text, exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cli_programs import KERNELS, ONE_KERNEL, output_of, refusal_of, tilus_

from tilus.cli import GPU_FORMS
from tilus.errors import TilusError
from tilus.transforms import PIPELINE

PINNED = """\
import tilus
from tilus import Tensor, f32
from tilus.layout import spatial

BY_COLUMN = spatial(1, 32).local(32, 1)


@tilus.kernel
def pinned(x: Tensor[f32, "m", "n"], y: Tensor[f32, "n", "m"]):
    tilus.grid(1, warps=1)
    rows = tilus.load(x, [0, 0], shape=[32, 32])
    columns = tilus.with_layout(rows, BY_COLUMN)
    tilus.store(y, [0, 0], columns)
"""
TARGETS = ("sm_80", "sm_89", "sm_90a", "sm_100a")


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    path = tmp_path / "kernels.py"
    path.write_text(KERNELS)
    return path


@pytest.fixture
def square(tmp_path: Path) -> Path:
    path = tmp_path / "square.py"
    path.write_text(ONE_KERNEL)
    return path


@pytest.mark.parametrize("target", TARGETS)
def test_every_form_for_every_target(square: Path, tmp_path: Path, target: str) -> None:
    forms = {form: tmp_path / f"out.{form}" for form in GPU_FORMS}
    for form, path in forms.items():
        assert output_of("compile", square, "--emit", form, "--target", target, "-o", path) == ""
    assert f".target {target}\n" in forms["ptx"].read_text()
    assert "ldmatrix.sync" in forms["ptx"].read_text()
    assert forms["cubin"].read_bytes().startswith(b"\x7fELF")
    assert re.search(r"^[0-9a-f]+: +HMMA", forms["sass"].read_text(), re.MULTILINE)
    assert forms["ir"].read_text().startswith("kernel square(")


def test_ptx_is_what_is_written_by_default(square: Path) -> None:
    assert output_of("compile", square) == output_of("compile", f"{square}:square", "--emit", "ptx")


def without_places(ptx: str) -> list[str]:
    return [line for line in ptx.splitlines() if not line.lstrip().startswith((".file", ".loc"))]


@pytest.mark.parametrize("stage", [None, *(step.name for step in PIPELINE)])
def test_the_text_form_compiles_to_the_same_ptx(square: Path, tmp_path: Path, stage: str | None) -> None:
    text = tmp_path / "square.tilus"
    after = [] if stage is None else ["--after", stage]
    output_of("compile", square, "--emit", "ir", *after, "-o", text)
    assert without_places(output_of("compile", text)) == without_places(output_of("compile", square))


def test_definitions_of_consts_dtypes_dims_and_layouts(kernels: Path) -> None:
    assert "f32[512]" in output_of("compile", f"{kernels}:axpy", "--emit", "ir", "-D", "block=512")
    sized = output_of("compile", f"{kernels}:axpy", "--emit", "ir", "-D", "n=4096")
    assert "global f32[4096]" in sized and "%n" not in sized
    layout = "spatial(32).local(8)"
    typed = output_of("compile", f"{kernels}:widen", "--emit", "ir", "-D", "t=int3", "-D", f"layout={layout}")
    assert f"int3[256] in {layout} = load(" in typed


def test_dump_has_every_stage(square: Path, tmp_path: Path) -> None:
    directory = tmp_path / "made" / "here"
    output_of("compile", square, "--dump", directory, "--report")
    stages = [f"{i:02}_{name}.tilus" for i, name in enumerate(["translated", *(step.name for step in PIPELINE)])]
    products = ["kernel.cubin", "kernel.ptx", "kernel.sass", "ptxas.log", "report.txt"]
    assert sorted(path.name for path in directory.iterdir()) == [*stages, *products]
    assert (directory / "kernel.ptx").read_text() == output_of("compile", square)
    assert (directory / stages[0]).read_text() == output_of("compile", square, "--emit", "ir")


def test_dump_directory_from_the_environment(square: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILUS_DUMP_DIR", str(tmp_path / "dumps"))
    ptx = output_of("compile", square)
    (directory,) = (tmp_path / "dumps").iterdir()
    assert re.fullmatch(r"square-[0-9a-f]{8}", directory.name)
    assert (directory / "kernel.ptx").read_text() == ptx


def test_report_sections(square: Path) -> None:
    report = output_of("compile", square, "--report")
    for row in (
        r"square for sm_90a: 128 threads a block",
        r"  registers +\d+ a thread",
        r"  spills +none",
        r"  shared memory +8192 bytes static, 0 bytes dynamic",
        r"  square.py:9 +load a: 4 x 128 bits per thread",
        r"  square.py:11 +ldmatrix s: \d+ matrices per warp, \d+ of x4(, transposed)?",
        r"  s +f16\[64, 64\] +8192 bytes +row_major\(\(64, 64\)\)\.swizzled\(3, 3, 3\) +swizzled: costs \d+; .*row-major \d+.*",
        r"  square.py:9 +store_shared s +16 bytes a lane +0 in 64 wavefronts of 16 instructions",
        r"  square.py:11 +ldmatrix s +16 bytes a lane +0 in \d+ wavefronts of \d+ instructions(, 2 times)?",
        r"  tile +f16\[64, 64\] +\S.*",
        r"  all +\d+ instructions: .*HMMA.*",
    ):
        assert re.search(f"^{row}$", report, re.MULTILINE), (row, report)


def test_report_says_what_a_pinned_layout_costs(square: Path) -> None:
    """Rows of 128 bytes without a swizzle: the eight rows of a matrix meet in the same banks."""
    square.write_text(
        square.read_text().replace("shared(f16, [64, 64])", "shared(f16, [64, 64], layout=row_major((64, 64)))")
    )
    square.write_text("from tilus.layout import row_major\n" + square.read_text())
    report = output_of("compile", square, "--report")
    better = r"row_major\(\(64, 64\)\)\.swizzled\(3, 3, 3\) would cost \d+"
    assert re.search(rf"^  s +.* row-major: costs \d+; {better}; swizzled \d+; ", report, re.MULTILINE), report
    conflicts = re.search(r"ldmatrix s +16 bytes a lane +(\d+) in (\d+) wavefronts", report)
    assert conflicts is not None and 8 * (int(conflicts[2]) - int(conflicts[1])) == int(conflicts[2]), report


def test_report_shows_a_conversion_and_its_cost(tmp_path: Path) -> None:
    path = tmp_path / "pinned.py"
    path.write_text(PINNED)
    report = output_of("compile", path, "--report")
    *conflicts, line = (line for line in report.splitlines() if "rows -> columns" in line)
    assert [re.sub(" +", " ", text) for text in conflicts] == [
        f" pinned.py:12 {what} rows -> columns 16 bytes a lane 0 in 32 wavefronts" for what in ("store", "load")
    ]
    assert re.fullmatch(
        r"  pinned.py:12 +rows -> columns  4096 bytes of shared memory a warp, 16-byte stores, 16-byte loads, "
        r"no bank conflicts, 272 cycles; shuffles would cost \d+",
        line,
    )


def test_report_goes_beside_the_product(square: Path, tmp_path: Path) -> None:
    """On the terminal they are told apart by the stream."""
    both = tilus_("compile", square, "--emit", "ptx", "--report")
    assert both.stdout.startswith(".version") and both.stderr.startswith("square for sm_90a")
    assert output_of("compile", square, "--emit", "ptx", "--report", "-o", tmp_path / "k.ptx").startswith("square for")


def test_which_kernel(kernels: Path, tmp_path: Path) -> None:
    assert refusal_of("compile", kernels) == (
        f"error: {kernels} has 2 kernels: axpy, widen\n  hint: name one: {kernels}:axpy\n"
    )
    assert refusal_of("compile", f"{kernels}:axpi") == (
        f"error: no kernel 'axpi' in {kernels}: its kernels are axpy, widen\n  hint: did you mean {kernels}:axpy?\n"
    )
    empty = tmp_path / "empty.py"
    empty.write_text("x = 1\n")
    assert refusal_of("compile", empty) == (
        f"error: no kernel in {empty}, expected a function with @tilus.kernel directly above its `def`\n"
    )
    assert refusal_of("compile", tmp_path / "absent.py") == f"error: no file {tmp_path / 'absent.py'}\n"


def test_a_file_that_fails(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import tilus\n\nsize = 1 // 0\n")
    assert refusal_of("compile", path) == (
        f"error: {path} failed with ZeroDivisionError: integer division or modulo by zero\n"
        f"  at {path}:3:8\n    3 | size = 1 // 0\n               ^^^^^^\n"
    )
    other = tmp_path / "syntax.py"
    other.write_text("x = (1,\n")
    assert refusal_of("compile", other) == (
        f"error: {other} is not valid Python: '(' was never closed\n  at {other}:1:5\n    1 | x = (1,\n            ^\n"
    )


def test_definitions_that_are_none(kernels: Path) -> None:
    axpy = f"{kernels}:axpy"
    assert refusal_of("compile", axpy, "-D", "block=wide") == (
        "error: -D block=wide: 'wide' is no value, expected a dtype, a Python literal or a layout\n"
        "  hint: text needs quotes of its own: -D \"block='wide'\"\n"
    )
    assert refusal_of("compile", axpy, "-D", "n=-1") == (
        "error: the size of dim 'n' is -1, expected an int from 1 to 2147483647\n"
    )
    assert "Error: -D block: expected NAME=VALUE" in refusal_of("compile", axpy, "-D", "block", exit_code=2)
    assert refusal_of("compile", axpy, "-D", "blok=512") == (
        f"error: axpy: unknown argument blok\n  at {kernels}:10:1\n"
        '   10 | def axpy(x: Tensor[f32, "n"], y: Tensor[f32, "n"], a: f32, *, block: Const = 1024):\n'
        "        ^^^^^^^^\n  hint: its parameters are x, y, a, block\n"
    )
    assert refusal_of("compile", f"{kernels}:widen") == (
        "error: the dtype 't' of parameter x is not known without arguments\n"
        f'  at {kernels}:18:1\n   18 | def widen(x: Tensor["t", "n"], y: Tensor[f32, "n"], *, layout: Const = None):\n'
        "        ^^^^^^^^^\n  hint: give it by name: t=tilus.uint4\n"
    )


def test_unknown_target_and_pass(square: Path) -> None:
    assert refusal_of("compile", square, "--target", "sm_70") == (
        "error: unknown target 'sm_70'\n  hint: known targets: sm_80, sm_86, sm_89, sm_90a, sm_100a; "
        "`tilus compile` also knows cpu\n"
    )
    names = ", ".join(step.name for step in PIPELINE)
    assert refusal_of("compile", square, "--emit", "ir", "--after", "vectorise") == (
        f"error: no pass is called 'vectorise'\n  hint: passes: {names}\n"
    )


def test_wrong_command_lines(square: Path, tmp_path: Path) -> None:
    text = tmp_path / "k.tilus"
    text.write_text("kernel")
    assert "--after goes with --emit ir" in refusal_of("compile", square, "--after", "unroll", exit_code=2)
    assert "give a file with -o" in refusal_of("compile", square, "--emit", "cubin", exit_code=2)
    assert "'ptxx' is not one of" in refusal_of("compile", square, "--emit", "ptxx", exit_code=2)
    assert "no parameters left to define" in refusal_of("compile", text, "-D", "n=1", exit_code=2)


def test_a_mistake_in_the_text_form_has_its_place(square: Path, tmp_path: Path) -> None:
    good = output_of("compile", square, "--emit", "ir")
    path = tmp_path / "bad.tilus"
    path.write_text(good.replace("sync()", "snyc()"))
    line = good[: good.index("sync()")].count("\n") + 1
    refusal = refusal_of("compile", path)
    assert f"  at {path}:{line}:3\n" in refusal and "snyc()" in refusal and "sync" in refusal.split("hint:")[-1]


def test_traceback_on_request(square: Path) -> None:
    result = tilus_("compile", square, "--target", "sm_70", "--traceback")
    assert isinstance(result.exception, TilusError)


def test_outputs_that_cannot_be_written(square: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing" / "k.ptx"
    assert refusal_of("compile", square, "-o", missing) == f"error: cannot write {missing}: No such file or directory\n"


RUN = """\
import json
import os
import sys

import numpy as np
from square import square

a, c = np.eye(64, dtype=np.float16), np.zeros((64, 64), np.float32)
square(a, c)
print(json.dumps([sys.argv[1:], os.environ["TILUS_DEVICE"], float(c.trace())]))
if len(sys.argv) > 2:
    square.on("emulator")(a[:, :32], c)
"""


def run_tilus(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "tilus.cli", *map(str, args)], capture_output=True, text=True
    )


@pytest.mark.parametrize("device", ["reference", "cpu", "emulator"])
def test_run_a_program_on_a_device(square: Path, device: str) -> None:
    program = square.with_name("program.py")
    program.write_text(RUN)
    done = run_tilus("run", "--device", device, "--time", program, "--own-option")
    assert (done.returncode, json.loads(done.stdout)) == (0, [["--own-option"], device, 64.0]), done.stderr
    assert re.fullmatch(rf"square +{device} +1 launches +first +[\d.]+ ms +median +[\d.]+ ms\n", done.stderr)


def test_a_mistake_in_a_program_that_runs(square: Path) -> None:
    program = square.with_name("program.py")
    program.write_text(RUN)
    done = run_tilus("run", "--device", "reference", program, "a", "b")
    assert done.returncode == 1
    assert done.stderr == (
        f"error: square: parameter a: found n = 32, expected 64 ('n' bound by parameter a)\n  at {square}:6:1\n"
        '    6 | def square(a: Tensor[f16, "n", "n"], c: Tensor[f32, "n", "n"]):\n        ^^^^^^^^^^\n'
    )


def test_layouts_are_shown_and_drawn(tmp_path: Path) -> None:
    assert output_of("layout", "spatial(2, 2).local(1, 2)") == (
        "spatial(2, 2).local(1, 2): thread:slot, 4 threads x 2 slots\n"
        "  |   0   1   2   3\n--+----------------\n0 | 0:0 0:1 1:0 1:1\n1 | 2:0 2:1 3:0 3:1\n"
    )
    assert output_of("layout", "row_major((2, 2))", "--dtype", "f32").splitlines()[-2:] == [
        "0 | 0/0 1/1",
        "1 | 2/2 3/3",
    ]
    assert "16 threads" not in output_of("layout", "mma_a") and "32 threads x 8 slots" in output_of("layout", "mma_a")
    picture = tmp_path / "layout.svg"
    assert output_of("layout", "mma_c", "--svg", picture) == ""
    assert picture.read_text().startswith("<svg ")


@pytest.mark.parametrize(
    ("arguments", "last_line"),
    [
        (["swizzled((2, 64), 2)", "--banks"], "128 |  1,8 1,10 1,12 1,14  1,0  1,2  1,4  1,6 1,24 1,26 1,28"),
        (
            ["row_major((8, 64))", "--access", "spatial(8, 4).local(1, 16)"],
            "8 phases, 16 wavefronts, 8 of them conflicts",
        ),
        (["mma_c", "--to", "mma_c"], "15 | 28:2>28:2 28:3>28:3"),
    ],
)
def test_views_of_layouts(arguments: list[str], last_line: str, tmp_path: Path) -> None:
    assert output_of("layout", *arguments).splitlines()[-1].startswith(last_line)
    picture = tmp_path / "layout.svg"
    assert output_of("layout", *arguments, "--svg", picture) == ""
    assert picture.read_text().startswith("<svg ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["mma_c", "--banks"],
            "--banks: local(2, 1).spatial(8, 4).local(1, 2) is a register layout, expected a shared layout",
        ),
        (["mma_c", "--access", "mma_c"], "--access: local(2, 1).spatial(8, 4).local(1, 2) is a register layout"),
        (
            ["row_major((2, 2))", "--to", "mma_c"],
            "--to: row_major((2, 2)) is a shared layout, expected a register layout",
        ),
        (["mma_c", "--dtype", "f17"], "f17"),
    ],
)
def test_views_that_do_not_fit(arguments: list[str], message: str) -> None:
    assert message in refusal_of("layout", *arguments)


def test_layouts_that_are_none() -> None:
    assert refusal_of("layout", "row_major(4)").startswith("error: 'row_major(4)'")
    refusal = refusal_of("layout", "spatail(2)")
    assert refusal.startswith("error: 'spatail(2)' is not part of a layout expression; expected one of ")


def test_doctor_and_version() -> None:
    assert re.search(r"^ok  python +3\.", output_of("doctor"), re.MULTILINE)
    assert re.fullmatch(r"main, version [\d.]+\n|tilus, version [\d.]+\n", output_of("--version"))
