"""PTX text to machine code with ptxas, and what ptxas says about it: registers, spills, stack, shared memory.

nvJitLink is never used: it assembles in relocatable mode, which drops `setmaxnreg` and costs 14 to 19 registers.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tilus import config
from tilus.errors import Loc, TilusError, raise_all
from tilus.ptx import toolchain
from tilus.ptx.toolchain import Tool
from tilus.target import Target

DEFAULT_TIMEOUT_S = 120.0
_CONTEXT_NLINES = 2
_MAX_SHOWN_ERRORS = 5

_PTX_VERSION = re.compile(r"^\s*\.version\s+(\d+)\.(\d+)", re.MULTILINE)
_DIAGNOSTIC = re.compile(r"^ptxas (?:.*, )?line (\d+); (?:error|fatal)\s*: (.*)$", re.MULTILINE)
_PERFORMANCE_LOSS = re.compile(r"^.*\(C75\d\d\).*$", re.MULTILINE)
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"')
_LOC = re.compile(r"^\s*\.loc\s+(\d+)\s+(\d+)\s+(\d+)")

_COMPILE_TIME = re.compile(r"^ptxas info\s*: Compile time = .*\n", re.MULTILINE)
_COMPILING = re.compile(r"Compiling entry function '([^']+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class KernelUsage:
    """What one kernel needs. `registers` and the spill and stack bytes are per thread; `shared_nbytes` is the
    static shared memory of a block (dynamic shared memory is given at launch)."""

    name: str
    registers: int
    spill_store_nbytes: int
    spill_load_nbytes: int
    stack_nbytes: int
    shared_nbytes: int


@dataclass(frozen=True)
class Cubin:
    """Machine code of one PTX module. `log` is ptxas' whole output, `assembler` the ptxas that wrote it."""

    cubin: bytes
    kernels: tuple[KernelUsage, ...]
    log: str
    assembler: Tool

    def kernel(self, name: str) -> KernelUsage:
        """The usage of the kernel of that name.

        Raises: TilusError naming the kernels that there are.
        """
        for usage in self.kernels:
            if usage.name == name:
                return usage
        raise TilusError(f"no kernel {name!r} in this cubin", hint=f"it has: {', '.join(k.name for k in self.kernels)}")


def find_assembler(ptx_version: tuple[int, int] = (0, 0)) -> Tool:
    """The ptxas to use for PTX of `.version` at least `ptx_version`.

    Order: TILUS_PTXAS (taken without a version check), the nvidia-cuda-nvcc wheel, PATH, CUDA_HOME, triton's copy; the
    first that reads this PTX version wins.

    Raises: TilusError when there is none, listing those that are too old.
    """
    chosen = config.ptxas()
    if chosen is not None:
        return toolchain.probe(Path(chosen))
    too_old: list[Tool] = []
    for path in toolchain.candidates("ptxas"):
        tool = toolchain.probe(path)
        if tool.max_ptx_version >= ptx_version:
            return tool
        too_old.append(tool)
    hint = "pip install 'nvidia-cuda-nvcc==13.0.*', or set TILUS_PTXAS to a ptxas binary"
    if not too_old:
        raise TilusError("no assembler found: looked for ptxas in NVIDIA's wheels, PATH, CUDA_HOME, triton", hint=hint)
    found = "; ".join(f"{tool} reads up to {_dotted(tool.max_ptx_version)}" for tool in too_old)
    raise TilusError(f"no assembler reads PTX {_dotted(ptx_version)}: {found}", hint=hint)


def ptx_version(ptx: str) -> tuple[int, int]:
    """The `.version` that a PTX text declares.

    Raises: TilusError when it declares none.
    """
    match = _PTX_VERSION.search(ptx)
    if match is None:
        raise TilusError("PTX text without a .version directive", hint="it must start with e.g. '.version 8.0'")
    return (int(match[1]), int(match[2]))


def assemble(
    ptx: str,
    target: Target,
    *,
    options: Sequence[str] = (),
    allow_spills: bool = False,
    assembler: Tool | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Cubin:
    """Machine code for `target`. `options` are further ptxas flags; `assembler` defaults to `find_assembler`.

    Raises: TilusError when ptxas refuses the PTX (with the PTX lines, and the user's line where a `.loc` precedes),
    when it does not do as the PTX says (any C75xx remark: it serialises wgmma, or ignores setmaxnreg), when a kernel spills
    registers unless `allow_spills`, when it crashes or runs for more than `timeout_s` seconds.
    """
    tool = assembler or find_assembler(ptx_version(ptx))
    with tempfile.TemporaryDirectory(prefix="tilus-") as directory:
        source, output = Path(directory, "kernel.ptx"), Path(directory, "kernel.cubin")
        source.write_text(ptx)
        command = [str(tool.path), "-v", f"-arch={target.name}", *options, source.name, "-o", output.name]
        log, status = _run(command, directory, timeout_s)
        if status != 0:
            _raise_refusal(ptx, target, tool, log, status)
        machine_code = output.read_bytes()
    _refuse_performance_loss(ptx, log)
    cubin = Cubin(machine_code, tuple(parse_usage(log)), log, tool)
    if not allow_spills:
        require_no_spills(cubin)
    return cubin


class SpillError(TilusError):
    """A kernel needs more registers than it can have."""


def require_no_spills(cubin: Cubin) -> None:
    """Raise a SpillError when a kernel keeps registers in local memory."""
    for usage in cubin.kernels:
        if usage.spill_store_nbytes or usage.spill_load_nbytes:
            raise SpillError(
                f"kernel {usage.name!r} spills: {usage.spill_store_nbytes} bytes of stores and "
                f"{usage.spill_load_nbytes} bytes of loads a thread with {usage.registers} registers, "
                f"expected none\n{cubin.log.rstrip()}",
                hint="use smaller tiles or more warps, lift the register cap, or pass allow_spills=True",
            )


def parse_usage(log: str) -> Iterator[KernelUsage]:
    """The resource usage of each kernel, from the output of `ptxas -v`."""
    parts = _COMPILING.split(log)[1:]
    for name, text in zip(parts[::2], parts[1::2]):
        stack, used, shared = _STACK.search(text), _USED.search(text), _SHARED.search(text)
        if stack is None or used is None:
            raise TilusError(f"ptxas -v reported no registers for kernel {name!r}:\n{text}")
        yield KernelUsage(
            name=name,
            registers=int(used[1]),
            spill_store_nbytes=int(stack[2]),
            spill_load_nbytes=int(stack[3]),
            stack_nbytes=int(stack[1]),
            shared_nbytes=int(shared[1]) if shared else 0,
        )


def _run(command: list[str], directory: str, timeout_s: float) -> tuple[str, int]:
    """The combined output of ptxas, without the time it took (equal inputs give equal logs), and the exit status."""
    try:
        done = subprocess.run(
            command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired as error:
        raise TilusError(
            f"ptxas ran for more than {timeout_s:g} s on this PTX and was stopped",
            hint="its time grows faster than the kernel: unroll less, or raise timeout_s",
        ) from error
    except OSError as error:
        raise TilusError(f"cannot run {command[0]}: {error}") from error
    return _COMPILE_TIME.sub("", done.stdout), done.returncode


def _raise_refusal(ptx: str, target: Target, tool: Tool, log: str, status: int) -> None:
    messages: dict[int, list[str]] = {}
    for line, text in _DIAGNOSTIC.findall(log):
        messages.setdefault(int(line), []).append(text.strip())
    if not messages:
        raise TilusError(f"{tool} failed for {target} with exit status {status}:\n{log.rstrip()}")
    hint = None
    if "Unsupported .version" in log:
        hint = "use a newer assembler: pip install -U nvidia-cuda-nvcc, or set TILUS_PTXAS"
    raise_all(
        [
            TilusError(
                f"ptxas {tool.version} refuses the PTX for {target}, line {line}: {'; '.join(texts)}\n"
                f"{_excerpt(ptx, line)}",
                loc=source_loc(ptx, line),
                hint=hint,
            )
            for line, texts in itertools.islice(messages.items(), _MAX_SHOWN_ERRORS)
        ]
    )


# What to do about a remark C75xx, by a part of its text; the first that fits counts.
_LOSSES: tuple[tuple[str, str], ...] = (
    ("'setmaxnreg' ignored", "the registers at launch must be known: give the kernel its number of threads and blocks"),
    ("setmaxnreg.dec", "let the role keep as many registers as its code needs"),
    ("insufficient register resources", "use smaller tiles or more warpgroups, or give the role more registers"),
    ("reading accumulator registers", "wait for a product before its result is read: tilus.wgmma_wait()"),
    ("warpgroup.wait is injected", "wait for a product before its result is read: tilus.wgmma_wait()"),
    (
        "defining input registers",
        "wait before the registers of A are written again, or let two tiles take turns in them",
    ),
    ("warpgroup.arrive is injected", "nothing may write to registers of products between the first wgmma and its wait"),
    ("defining accumulator registers", "assign the result of wgmma at once to the variable that it adds to"),
    ("call", "leave out what calls a function, such as tilus.print, while products are under way"),
    ("divergent", "let all warps of a group take the same branches around wgmma and its waits"),
    ("", "accumulators must stay in the same registers, untouched, from the first wgmma to its wait"),
)


# Remarks that a kernel which is right gets where registers are too few: left operands then move while products read them.
_SHORT_OF_REGISTERS = ("insufficient register", "defining input registers")


def _refuse_performance_loss(ptx: str, log: str) -> None:
    remarks = list(dict.fromkeys(_PERFORMANCE_LOSS.findall(log)))
    if not remarks:
        return
    where = re.search(r"line (\d+)", remarks[0])
    line = int(where[1]) if where else None
    what = "does not set registers" if "setmaxnreg" in remarks[0] else "inserts waits between wgmma instructions"
    kind = SpillError if any(text in remarks[0] for text in _SHORT_OF_REGISTERS) else TilusError
    raise kind(
        f"ptxas {what}, expected machine code as the PTX says:\n"
        + "\n".join(remarks)
        + (f"\n{_excerpt(ptx, line)}" if line else ""),
        loc=source_loc(ptx, line) if line else None,
        hint=next(hint for text, hint in _LOSSES if text in remarks[0]),
    )


def _excerpt(ptx: str, line: int) -> str:
    """Numbered PTX lines around `line`, which is marked."""
    lines = ptx.splitlines()
    first, last = max(1, line - _CONTEXT_NLINES), min(len(lines), line + _CONTEXT_NLINES)
    return "\n".join(f"{'>' if n == line else ' '} {n:>5} | {lines[n - 1]}" for n in range(first, last + 1))


def source_loc(ptx: str, line: int) -> Loc | None:
    """The user's position that PTX line `line` was generated from: the last `.loc` before it in the same kernel."""
    lines = ptx.splitlines()
    for text in reversed(lines[:line]):
        if ".entry" in text:
            return None
        if match := _LOC.match(text):
            files = {m[1]: m[2] for m in map(_FILE.match, lines) if m}
            return Loc(files[match[1]], int(match[2]), int(match[3])) if match[1] in files else None
    return None


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
