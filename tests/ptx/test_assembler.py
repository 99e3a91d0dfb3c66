"""The assembler: real ptxas for what it reports, stand-in scripts for what a good ptxas never does (hang, crash)."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tilus.errors import Loc, TilusError, TilusErrors
from tilus.ptx import assembler, toolchain
from tilus.ptx.assembler import assemble, find_assembler, parse_usage, source_loc
from tilus.target import TARGETS, Target

SM90 = TARGETS["sm_90a"]


def kernel(body: list[str], *, name: str = "k", version: str = "8.0", target: str = "sm_90a", head: str = "") -> str:
    """A PTX module of one kernel with a pointer parameter in %d0."""
    registers = [".reg .pred %p<4>;", ".reg .b32 %r<100>;", ".reg .b64 %d<8>;"]
    lines = [f".version {version}", f".target {target}", ".address_size 64", '.file 1 "user.py"']
    lines += [f".visible .entry {name}(.param .u64 x)", ".reqntid 128, 1, 1", head, "{", *registers]
    return "\n".join([*lines, "ld.param.u64 %d0, [x];", *body, "ret;", "}"]) + "\n"


def line_of(ptx: str, text: str) -> int:
    return 1 + next(i for i, line in enumerate(ptx.splitlines()) if text in line)


def regcounts(cubin: bytes) -> set[int]:
    """Register counts from the ELF itself: EIATTR_REGCOUNT records, `04 2f 08 00 <symbol u32> <count u32>`."""
    counts: set[int] = set()
    at = cubin.find(b"\x04\x2f\x08\x00")
    while at >= 0:
        counts.add(struct.unpack_from("<I", cubin, at + 8)[0])
        at = cubin.find(b"\x04\x2f\x08\x00", at + 4)
    return counts


LIVE = [f"ld.volatile.global.u32 %r{i}, [%d0+{4 * i}];" for i in range(64)] + [
    f"st.volatile.global.u32 [%d0+{4 * i}], %r{63 - i};" for i in range(64)
]


@pytest.mark.parametrize("target", TARGETS.values(), ids=str)
def test_reported_registers_are_those_of_the_machine_code(target: Target) -> None:
    version = f"{max(target.ptx_version, (8, 0))[0]}.{max(target.ptx_version, (8, 0))[1]}"
    cubin = assemble(kernel(LIVE, version=version, target=target.name), target)
    assert cubin.cubin[:4] == b"\x7fELF"
    assert {k.registers for k in cubin.kernels} == regcounts(cubin.cubin)
    assert cubin.kernel("k").registers >= 64
    assert cubin.kernel("k").spill_store_nbytes == cubin.kernel("k").stack_nbytes == 0


def test_usage_of_each_kernel_of_a_module() -> None:
    first = kernel([".shared .align 16 .b8 s[512];", "mov.u32 %r0, s;", "st.shared.u32 [%r0], %r0;"], name="first")
    second = kernel(LIVE, name="second").split('"user.py"\n')[1]
    cubin = assemble(first + second, SM90)
    assert cubin.kernel("first").shared_nbytes == 512
    assert cubin.kernel("second").shared_nbytes == 0
    assert cubin.kernel("second").registers > cubin.kernel("first").registers
    with pytest.raises(
        TilusError, match=r"no kernel 'third'(.|\n)*first, second|no kernel 'third'(.|\n)*second, first"
    ):
        cubin.kernel("third")


def test_spills_are_refused_unless_allowed() -> None:
    ptx = kernel(LIVE, head=".maxnreg 24")
    with pytest.raises(TilusError, match=r"'k' spills: \d+ bytes of stores(.|\n)*Used 24 registers(.|\n)*allow_spills"):
        assemble(ptx, SM90)
    usage = assemble(ptx, SM90, allow_spills=True).kernel("k")
    assert usage.registers == 24
    assert usage.spill_store_nbytes > 0 and usage.spill_load_nbytes > 0 and usage.stack_nbytes > 0


WGMMA = (
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r0, %r1, %r2, %r3}, {%r4, %r5, %r6, %r7}, %d0, %p0, 1, 1, 0;"
)
BEGIN = [*(f"mov.b32 %r{i}, 0;" for i in range(8)), "setp.ne.u64 %p0, %d0, 0;", "wgmma.fence.sync.aligned;", WGMMA]
COMMIT, WAIT = "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"
END = [COMMIT, WAIT, *(f"st.global.b32 [%d0+{4 * i}], %r{i};" for i in range(8))]


@pytest.mark.parametrize(
    ("body", "hint"),
    [
        ([*BEGIN, "add.f32 %r0, %r0, %r1;", *END], "wait for a product before its result is read: tilus.wgmma_wait()"),
        ([*BEGIN, "ld.global.b32 %r4, [%d0];", WGMMA, *END], "nothing may write to registers of products"),
        (["setmaxnreg.inc.sync.aligned.u32 240;"], "the registers at launch must be known"),
    ],
    ids=["result", "operand", "registers"],
)
def test_performance_losses_are_refused(body: list[str], hint: str) -> None:
    any_number = "setmaxnreg" in body[0]
    ptx = kernel(body).replace(".reqntid 128, 1, 1\n", "" if any_number else ".reqntid 128, 1, 1\n")
    with pytest.raises(
        TilusError, match=r"(?s)^ptxas .*, expected machine code as the PTX says:.*\(C75\d\d\)"
    ) as caught:
        assemble(ptx, SM90)
    assert ("does not set registers" in str(caught.value)) == any_number
    assert caught.value.hint is not None and caught.value.hint.startswith(hint)


def test_wgmma_with_its_waits_is_assembled() -> None:
    assemble(kernel([*BEGIN, COMMIT, WAIT, "add.f32 %r0, %r0, %r1;", *END]), SM90)


def test_a_refusal_shows_ptx_and_the_users_line(tmp_path: Path) -> None:
    user = tmp_path / "user.py"
    user.write_text("a = 1\n    y = x ^ 3\n")
    body = [".loc 1 1 1", "mov.u32 %r0, 1;", ".loc 1 2 9", "add.u33 %r1, %r0, 3;", "mov.u32 %r2, %r1;"]
    ptx = kernel(body).replace("user.py", str(user))
    with pytest.raises(TilusError) as caught:
        assemble(ptx, SM90)
    text = str(caught.value)
    assert caught.value.loc == Loc(str(user), 2, 9)
    assert "refuses the PTX for sm_90a" in text and "Unknown modifier '.u33'" in text
    assert f">    {line_of(ptx, 'u33'):>2} | add.u33 %r1, %r0, 3;" in text  # the line itself, marked
    assert "| mov.u32 %r0, 1;" in text and "| mov.u32 %r2, %r1;" in text  # its neighbours
    assert "    2 |     y = x ^ 3\n                ^" in text  # the user's line and column


def test_errors_on_several_lines_are_reported_together() -> None:
    with pytest.raises(TilusErrors) as caught:
        assemble(kernel(["add.u33 %r1, %r0, 3;", "ret;", "sub.u35 %r1, %r0, 3;"]), SM90)
    assert len(caught.value.errors) == 2
    assert "'.u33'" in str(caught.value) and "'.u35'" in str(caught.value)


def test_source_loc_does_not_leak_into_the_next_kernel() -> None:
    first = kernel([".loc 1 7 3", "mov.u32 %r0, 1;"], name="first")
    ptx = first + kernel(["mov.u32 %r9, 1;"], name="second").split('"user.py"\n')[1]
    assert source_loc(ptx, line_of(ptx, "%r0, 1")) == Loc("user.py", 7, 3)
    assert source_loc(ptx, line_of(ptx, "%r9, 1")) is None


def test_ptx_newer_than_the_assembler(monkeypatch: pytest.MonkeyPatch) -> None:
    ptx = kernel([], version="99.0")
    with pytest.raises(TilusError, match=r"no assembler reads PTX 99\.0: ptxas [\d.]+ .* reads up to"):
        assemble(ptx, SM90)
    monkeypatch.setenv("TILUS_PTXAS", str(find_assembler().path))  # a chosen one is not second-guessed: ptxas answers
    with pytest.raises(TilusError, match=r"(?s)Unsupported \.version 99\.0.*newer assembler"):
        assemble(ptx, SM90)


def test_the_table_of_ptx_versions_agrees_with_ptxas_itself() -> None:
    tool = find_assembler()
    major, minor = tool.max_ptx_version
    assemble(kernel([], version=f"{major}.{minor}"), SM90, assembler=tool)
    with pytest.raises(TilusError, match=rf"current version is '{major}\.{minor}'"):
        assemble(kernel([], version=f"{major}.{minor + 1}"), SM90, assembler=tool)


def test_wrong_target_and_missing_version() -> None:
    with pytest.raises(TilusError, match="sm_80"):
        assemble(kernel([]), TARGETS["sm_80"])
    with pytest.raises(TilusError, match=r"without a \.version"):
        assemble(".target sm_90a\n", SM90)


def script(path: Path, body: str, version: str = "release 13.0, V13.0.1") -> Path:
    """A stand-in for ptxas: answers --version (appending to a `.asked` file), else runs `body`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    asked = f"echo x >> {path}.asked"
    path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then {asked}; echo "{version}"; exit 0; fi\n{body}\n')
    path.chmod(0o755)
    return path


def test_a_hanging_assembler_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILUS_PTXAS", str(script(tmp_path / "ptxas", "exec sleep 60")))
    with pytest.raises(TilusError, match=r"more than 0\.2 s"):
        assemble(kernel([]), SM90, timeout_s=0.2)


def test_a_crashing_assembler_shows_its_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILUS_PTXAS", str(script(tmp_path / "ptxas", "echo internal trouble; exit 139")))
    with pytest.raises(TilusError, match=r"(?s)exit status 139.*internal trouble"):
        assemble(kernel([]), SM90)


def test_equal_inputs_give_equal_results() -> None:
    assert assemble(kernel(LIVE), SM90) == assemble(kernel(LIVE), SM90)  # the log too: no times, no temporary paths


def test_options_reach_ptxas() -> None:
    ptx = kernel(LIVE).replace(".reqntid 128, 1, 1", "")  # with .reqntid ptxas ignores -maxrregcount
    assert assemble(ptx, SM90).kernel("k").registers > 32
    assert assemble(ptx, SM90, options=("-maxrregcount=32",), allow_spills=True).kernel("k").registers == 32
    with pytest.raises(TilusError, match="no-such-flag"):
        assemble(kernel([]), SM90, options=("--no-such-flag",))


def test_search_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TILUS_PTXAS > wheel > PATH > CUDA_HOME > triton; each is found once those before it are gone."""
    places = {
        "env": tmp_path / "env" / "ptxas",
        "wheel": tmp_path / "nvidia" / "cu13" / "bin" / "ptxas",
        "path": tmp_path / "path" / "ptxas",
        "home": tmp_path / "home" / "bin" / "ptxas",
        "triton": tmp_path / "triton" / "backends" / "nvidia" / "bin" / "ptxas",
    }
    for place in places.values():
        script(place, "exit 1")
    monkeypatch.setattr(toolchain, "_package_dirs", lambda package: [tmp_path / package])
    monkeypatch.setenv("TILUS_PTXAS", str(places["env"]))
    monkeypatch.setenv("PATH", f"{places['path'].parent}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    for name, place in places.items():
        assert find_assembler().path == place
        if name == "env":
            monkeypatch.delenv("TILUS_PTXAS")
        place.unlink()
    with pytest.raises(TilusError, match=r"(?s)no assembler found.*pip install"):
        find_assembler()


def test_an_assembler_too_old_for_the_ptx_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "_package_dirs", lambda package: [tmp_path / package])
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TILUS_PTXAS", raising=False)
    old = script(tmp_path / "home" / "bin" / "ptxas", "", "release 12.0, V12.0.140")
    new = script(tmp_path / "triton" / "backends" / "nvidia" / "bin" / "ptxas", "", "release 12.8, V12.8.93")
    assert find_assembler((8, 0)).path == old
    assert find_assembler((8, 7)).path == new
    with pytest.raises(TilusError, match=r"no assembler reads PTX 8\.8: .*12\.0\.140.*8\.0; .*12\.8\.93.*8\.7"):
        find_assembler((8, 8))


def test_version_is_asked_once_per_modification_time(tmp_path: Path) -> None:
    path = script(tmp_path / "ptxas", "exit 1")
    assert toolchain.probe(path) == toolchain.probe(path)
    assert Path(f"{path}.asked").read_text() == "x\n"
    script(path, "exit 1", "release 13.1, V13.1.2")
    assert toolchain.probe(path).version == "13.1.2"
    path.write_text("#!/bin/sh\necho hello\n")
    with pytest.raises(TilusError, match=r"printed 'hello', expected"):
        toolchain.probe(path)


def test_chosen_assembler_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILUS_PTXAS", "/no/such/ptxas")
    with pytest.raises(TilusError, match=r"TILUS_PTXAS is '/no/such/ptxas'"):
        assemble(kernel([]), SM90)


def test_a_log_without_registers_is_refused() -> None:
    with pytest.raises(TilusError, match="no registers for kernel 'k'"):
        list(parse_usage("ptxas info    : Compiling entry function 'k' for 'sm_90a'\n"))


def test_nothing_is_left_in_the_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembler.tempfile, "tempdir", str(tmp_path))
    assemble(kernel(LIVE), SM90)
    with pytest.raises(TilusError):
        assemble(kernel(["oops;"]), SM90)
    assert list(tmp_path.iterdir()) == []
