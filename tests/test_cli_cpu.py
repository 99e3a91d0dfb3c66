"""`tilus compile --target cpu`: forms, passes, definitions, dumps, the report, and options that do not go with it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from cli_programs import KERNELS, ONE_KERNEL, output_of, refusal_of

from tilus.cli import CPU_FORMS
from tilus.instructions import INSTRUCTIONS
from tilus.ir.parser import parse_function
from tilus.lang.kernel_file import load_kernel
from tilus.runtime.cpu import build, pool
from tilus.runtime.cpu.features import host_target
from tilus.transforms import PIPELINE, WITHOUT_LAYOUTS


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


def test_every_form_for_the_cpu(square: Path, tmp_path: Path) -> None:
    forms = {form: tmp_path / f"out.{form}" for form in CPU_FORMS}
    for form, path in forms.items():
        assert output_of("compile", square, "--target", "cpu", "--emit", form, "-o", path) == ""
    assert forms["ir"].read_text() == output_of("compile", square, "--emit", "ir")
    assert forms["c"].read_text() == output_of("compile", square, "--target", "cpu")
    assert "\nvoid tilus_blocks(" in forms["c"].read_text()
    assert re.search(r"^tilus_blocks:$", forms["asm"].read_text(), re.MULTILINE)


@pytest.mark.parametrize("stage", [step.name for step in PIPELINE])
def test_the_text_form_compiles_for_the_cpu(square: Path, tmp_path: Path, stage: str) -> None:
    """Also that of a later stage, with layouts and the instructions of a GPU."""
    text = tmp_path / "square.tilus"
    output_of("compile", square, "--emit", "ir", "--after", stage, "-o", text)
    assert ("mma_sync" in text.read_text()) == (stage in ("select_instructions", "clean_up", "finish_loads"))
    library = build.load(output_of("compile", text, "--target", "cpu"))
    parameters = parse_function(text.read_text(), INSTRUCTIONS).kernel_params()
    a = np.random.default_rng(0).integers(-4, 5, (64, 64)).astype(np.float16)
    c = np.empty((64, 64), np.float32)
    pool.Launcher("square", library, parameters, 1).launch(1, 1, 1, a.ctypes.data, c.ctypes.data, 64)
    assert (c == np.matmul(a, a, dtype=np.float32)).all()


def test_passes_for_the_cpu(square: Path) -> None:
    for step in WITHOUT_LAYOUTS:
        after = ("--emit", "ir", "--after", step.name)
        assert output_of("compile", square, "--target", "cpu", *after) == output_of("compile", square, *after)
    names = ", ".join(step.name for step in WITHOUT_LAYOUTS)
    assert refusal_of("compile", square, "--target", "cpu", "--emit", "ir", "--after", "infer_layouts") == (
        f"error: no pass is called 'infer_layouts'\n  hint: passes: {names}\n"
    )


def test_definitions_for_the_cpu(kernels: Path) -> None:
    axpy = f"{kernels}:axpy"
    assert "[512] __attribute__" in output_of("compile", axpy, "--target", "cpu", "-D", "block=512")
    typed = output_of("compile", f"{kernels}:widen", "--target", "cpu", "-D", "t=int3")
    assert (
        "tl_field(" in typed and "tl_field(" not in output_of("compile", axpy, "--target", "cpu").split("run_block")[1]
    )


def test_dump_for_the_cpu(square: Path, tmp_path: Path) -> None:
    directory = tmp_path / "made"
    source = output_of("compile", square, "--target", "cpu", "--dump", directory)
    stages = [f"{i:02}_{name}.tilus" for i, name in enumerate(["translated", *(step.name for step in WITHOUT_LAYOUTS)])]
    assert sorted(path.name for path in directory.iterdir()) == [*stages, "kernel.c", "kernel.s", "report.txt"]
    assert (directory / "kernel.c").read_text() == source
    assert (directory / "kernel.s").read_text() == output_of("compile", square, "--target", "cpu", "--emit", "asm")
    assert (directory / "report.txt").read_text() == output_of("compile", square, "--target", "cpu", "--report")


def test_report_for_the_cpu(square: Path) -> None:
    report = output_of("compile", square, "--target", "cpu", "--report")
    target = host_target()
    for row in (
        rf"square for cpu: {target.arch}, vectors of {target.lanes} float32",
        r"  compiler  .*\S",
        r"  features  \S.*",
        r"  lines   \d+ of the kernel, \d+ around it",
        r"  arrays  \d+ bytes on a thread's stack if none share their place, 0 beside it",
        r"  s_\d+ +float\[4096\] +16384 bytes",
        r"  all  \d+ instructions: .*, \d+ others",
    ):
        assert re.search(f"^{row}$", report, re.MULTILINE), (row, report)


def test_an_array_that_is_too_large_for_a_stack_is_reported(kernels: Path) -> None:
    report = output_of("compile", f"{kernels}:axpy", "--target", "cpu", "--report", "-D", "block=131072")
    (static,) = re.findall(r"if none share their place, (\d+) beside it", report)
    assert int(static) >= 131072 * 4 and re.search(r"^  \w+ +float\[131072\] +524288 bytes$", report, re.MULTILINE)


def test_dump_directory_of_kernels_that_run_on_the_cpu(
    square: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TILUS_DUMP_DIR", str(tmp_path / "dumps"))
    a, c = np.eye(64, dtype=np.float16), np.zeros((64, 64), np.float32)
    load_kernel(square, None).on("cpu")(a, c)
    (directory,) = (tmp_path / "dumps").iterdir()
    stages = [f"{i:02}_{name}.tilus" for i, name in enumerate(["translated", *(step.name for step in WITHOUT_LAYOUTS)])]
    assert sorted(path.name for path in directory.iterdir()) == [*stages, "kernel.c"]
    assert (directory / "kernel.c").read_text().count("tilus_blocks") == 1


def test_wrong_command_lines(square: Path) -> None:
    on_cpu = ("--target", "cpu")
    for form in ("ptx", "cubin", "sass"):
        refusal = refusal_of("compile", square, *on_cpu, "--emit", form, exit_code=2)
        assert f"--emit {form} with --target cpu, which has ir, c, asm; {form} goes with a GPU" in refusal
    for form in ("c", "asm"):
        refusal = refusal_of("compile", square, "--emit", form, exit_code=2)
        expected = f"--emit {form} with --target sm_90a, which has ir, ptx, cubin, sass; {form} goes with --target cpu"
        assert expected in refusal
    assert "--allow-spills goes with a GPU" in refusal_of("compile", square, *on_cpu, "--allow-spills", exit_code=2)


def test_the_page_shows_what_is_written(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "cpu.md").read_text()
    program, shown = (
        re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[0] for language in ("python", "c")
    )
    path = tmp_path / "scaled.py"
    path.write_text(program)
    assert without_numbers(shown) in without_numbers(output_of("compile", path, "--target", "cpu"))
    commands = re.findall(r"^    tilus (compile .*?)(?: +#.*)?$", page, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        assert output_of(*command.replace("examples/", f"{Path(__file__).parents[1]}/examples/").split())


def without_numbers(code: str) -> str:
    """Without what makes names unique."""
    return re.sub(r"_\d+\b", "", code)
