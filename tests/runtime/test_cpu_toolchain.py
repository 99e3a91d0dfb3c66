"""Finding a C compiler, what it says of this machine, and how many threads there are."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cpu_programs import python, script
from hypothesis import given
from hypothesis import strategies as st

from tilus import config
from tilus.errors import TilusError
from tilus.runtime.cpu import features, temporary, threads, toolchain
from tilus.runtime.cpu.toolchain import CCompiler, find_compiler

REAL = find_compiler()


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The only directory on PATH; no TILUS_CC, and no package ziglang unless a test makes one."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("TILUS_CC", raising=False)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not (Path(entry) / "ziglang").exists()])
    toolchain._find.cache_clear()
    yield tmp_path / "bin"
    toolchain._find.cache_clear()


def answering(path: Path, version: str) -> Path:
    return script(path, f"echo '{version}'; echo more")


def test_the_compiler_of_this_machine() -> None:
    assert REAL.version and "\n" not in REAL.version
    assert REAL.command[0] in str(REAL) and REAL.version in str(REAL)


def test_cc_comes_before_gcc_and_clang(places: Path) -> None:
    for name in ("clang", "gcc", "cc"):
        path = answering(places / name, f"{name} 1.0")
        toolchain._find.cache_clear()
        assert find_compiler() == CCompiler((str(path),), f"{name} 1.0")


def test_it_is_looked_for_once(places: Path) -> None:
    script(places / "cc", f"echo run >> {places}/log; echo 'cc 1.0'")
    assert find_compiler() is find_compiler()
    assert (places / "log").read_text() == "run\n"


@pytest.mark.parametrize("broken", ["exit 1", "exit 0", "kill -9 $$"])
def test_one_that_does_not_run_is_passed_over(places: Path, broken: str) -> None:
    script(places / "cc", broken)
    answering(places / "gcc", "gcc 1.0")
    assert find_compiler().version == "gcc 1.0"


def test_no_compiler(places: Path) -> None:
    with pytest.raises(TilusError, match="no C compiler found: looked for cc, gcc, clang on PATH") as caught:
        find_compiler()
    assert "pip install ziglang" in str(caught.value) and "TILUS_CC" in str(caught.value)
    script(places / "cc", "echo no licence; exit 7")
    toolchain._find.cache_clear()
    with pytest.raises(TilusError, match="cc --version ended with status 7, expected a version: 'no licence'"):
        find_compiler()


def test_tilus_cc_is_taken_and_must_exist(places: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answering(places / "cc", "cc 1.0")
    mine = answering(tmp_path / "my cc", "mine 2.0")
    monkeypatch.setenv("TILUS_CC", str(mine))
    assert find_compiler() == CCompiler((str(mine),), "mine 2.0")
    answering(places / "cc-13", "cc 13.0")
    monkeypatch.setenv("TILUS_CC", "cc-13")
    assert find_compiler().version == "cc 13.0"
    for bad in (str(tmp_path / "nowhere"), "cc-14", str(tmp_path)):
        monkeypatch.setenv("TILUS_CC", bad)
        with pytest.raises(TilusError, match=f"TILUS_CC is '{bad}', expected a program"):
            find_compiler()
    script(mine, "exit 1")
    monkeypatch.setenv("TILUS_CC", str(mine))
    toolchain._find.cache_clear()
    with pytest.raises(TilusError, match="my cc --version ended with status 1"):  # never another one instead
        find_compiler()


def test_ziglang_is_the_last_resort(places: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "site" / "ziglang"
    package.mkdir(parents=True)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(
        "import sys, os\nprint('clang', sys.argv[1:], os.environ['ZIG_GLOBAL_CACHE_DIR'])"
    )
    monkeypatch.setenv("TILUS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("ZIG_GLOBAL_CACHE_DIR", raising=False)
    found = find_compiler()
    assert found.command == (sys.executable, "-m", "ziglang", "cc") and found.is_zig
    assert found.version == f"clang ['cc', '--version'] {tmp_path / 'cache' / 'cpu' / 'zig'}"
    toolchain._find.cache_clear()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TILUS_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert find_compiler().version == f"clang ['cc', '--version'] {temporary.directory() / 'zig'}"
    assert features.native_flags(found) == ("-mcpu=native",)
    answering(places / "clang", "clang 1.0")
    toolchain._find.cache_clear()
    assert find_compiler().version == "clang 1.0"


def test_a_run_has_an_end_and_leaves_nothing_behind(tmp_path: Path) -> None:
    slow = script(tmp_path / "slow", f"sleep 60 & echo $! > {tmp_path}/child; wait")
    start = time.monotonic()
    with pytest.raises(TilusError, match=r"slow ran for more than 0.5 s and was stopped"):
        toolchain.run([str(slow)], timeout_s=0.5)
    assert time.monotonic() - start < 30
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":  # nobody here is its parent
            break
        time.sleep(0.01)
    else:
        assert not Path(f"/proc/{child}").exists()


def test_what_cannot_be_started(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("")
    for path, reason in ((tmp_path / "none", "No such file"), (tmp_path / "text", "Permission denied")):
        with pytest.raises(TilusError, match=f"cannot run {path}: {reason}"):
            toolchain.run([str(path)], timeout_s=1)


def test_this_machine_is_what_the_system_says() -> None:
    """The kernel lists the same extensions under other names."""
    host = features.host_cpu(REAL)
    flags = next(
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features"))
    )
    names = {
        "__AVX2__": "avx2",
        "__FMA__": "fma",
        "__F16C__": "f16c",
        "__AVX512F__": "avx512f",
        "__AVX512BW__": "avx512bw",
    }
    if host.arch == "x86_64":
        assert {m for m, flag in names.items() if flag in flags.split()} == host.macros & names.keys()
    assert host.arch == os.uname().machine
    assert features.host_target() == host.target


@given(st.sets(st.sampled_from(sorted(features.MACROS))))
def test_lanes_follow_from_features(macros: set[str]) -> None:
    target = features.describe({"__x86_64__": "1", "__GNUC__": "12", **dict.fromkeys(macros, "1")}).target
    assert target.features == macros and target.arch == "x86_64" and str(target) == "cpu"
    if {"__AVX512F__", "__AVX512BW__", "__AVX512DQ__", "__AVX512VL__"} <= macros:
        assert target.lanes == 16
    else:
        assert target.lanes == (8 if {"__AVX2__", "__FMA__", "__F16C__"} <= macros else 4)


def test_every_macro_is_in_the_fingerprint() -> None:
    macros = {"__aarch64__": "1", "__ARM_NEON": "1"}
    known = features.describe(macros)
    assert known.arch == "aarch64" and known.macros == {"__ARM_NEON"}
    for other in ({**macros, "__ARM_FEATURE_UNHEARD_OF": "1"}, {**macros, "__ARM_NEON": "2"}):
        assert features.describe(other).fingerprint != known.fingerprint
    assert features.describe(dict(reversed(macros.items()))) == known


@pytest.mark.parametrize("text", ["echo '#define A 1'", "echo unknown argument -march=native >&2; exit 1"])
def test_a_compiler_that_does_not_know_the_cpu(tmp_path: Path, text: str) -> None:
    mute = CCompiler((str(script(tmp_path / "cc", f"cat > /dev/null; {text}")),), "mute 1.0")
    with pytest.raises(TilusError, match=r"mute 1.0 .* does not say what this CPU can do"):
        features.host_cpu(mute)


def test_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TILUS_NUM_THREADS", raising=False)
    assert 1 <= threads.num_threads() == threads.usable_cpus() <= (os.cpu_count() or 1)
    for good in ("1", "3", "1024"):
        monkeypatch.setenv("TILUS_NUM_THREADS", good)
        assert threads.num_threads() == int(good)
    for bad in ("0", "1025", "-1", "2.5", "many", "٣", "9" * 5000):
        monkeypatch.setenv("TILUS_NUM_THREADS", bad)
        with pytest.raises(TilusError, match=f"TILUS_NUM_THREADS is '{bad}', expected a whole number from 1 to 1024"):
            config.num_threads()


def test_affinity_limits_the_threads() -> None:
    program = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    program += "from tilus.runtime.cpu import threads; print(threads.usable_cpus())"
    assert python(program) == "1\n"


def quota_files(root: Path, quotas: dict[str, str]) -> None:
    for name, text in quotas.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("groups", "quotas", "expected"),
    [
        ("0::/", {}, []),
        ("0::/", {"cpu.max": "max 100000\n"}, []),
        ("0::/", {"cpu.max": "150000 100000\n"}, [2]),
        ("0::/", {"cpu.max": "1000 100000\n"}, [1]),
        ("0::/a/b", {"cpu.max": "800000 100000", "a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, [8, 3]),
        ("0::/of/the/host", {"cpu.max": "400000 100000"}, [4]),
        ("0::/", {"cpu.max": "broken"}, []),
        ("0::/", {"cpu.max": "100000 0"}, []),
        ("3:cpu,cpuacct:/a\n0::/", {"cpu/a/cpu.cfs_quota_us": "250000", "cpu/a/cpu.cfs_period_us": "100000"}, [3]),
        ("3:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, []),
        ("3:cpu:/", {"cpu/cpu.cfs_quota_us": "200000"}, []),
        ("3:cpuset:/\n2:name=systemd:/x:y", {"cpu/cpu.cfs_quota_us": "1", "cpu/cpu.cfs_period_us": "1"}, []),
    ],
)
def test_quotas_of_cgroups(tmp_path: Path, groups: str, quotas: dict[str, str], expected: list[int]) -> None:
    quota_files(tmp_path, quotas)
    (tmp_path / "self").write_text(groups + "\n")
    assert threads.cgroup_quotas(tmp_path / "self", tmp_path) == expected
    assert threads.cgroup_quotas(tmp_path / "nowhere", tmp_path) == []


def test_quotas_limit_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "cgroup_quotas", lambda: [7, 1])
    assert threads.usable_cpus() == 1
