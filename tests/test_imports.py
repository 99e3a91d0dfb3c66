"""Imports go only downward, also those inside of functions; `import tilus` loads next to nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the bottom up: a module imports from its own part and from the layers before it. See docs/design.md.
LAYERS = (
    ("errors", "rounding"),
    ("config", "dtypes", "target"),
    ("layout", "ptx"),
    ("ir",),
    ("codegen",),
    ("instructions",),
    ("transforms", "dump"),
    ("compiler",),
    ("runtime",),
    ("report", "doctor"),
    ("forms",),
    ("lang",),
    ("kernels",),
    ("command",),
    ("tune_command",),
    ("cli", "docs", "interop"),
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}

# What `serving` may use of tilus besides the package's own names.
PUBLIC = {"tilus", "tilus.dtypes", "tilus.errors", "tilus.kernels", "tilus.kernels.quantize", "tilus.config"}

# The command line offers what stands above the library, and imports it only when it is asked for.
COMMANDS = {"tilus.cli": {"serving.offline.quantize_model"}}

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("tilus", "serving")
    for path in (ROOT / package).rglob("*.py")
}


def imported(module: str) -> Iterator[str]:
    """The modules of this project that a module imports, wherever in it, except for type checkers only."""
    tree = ast.parse(MODULES[module].read_text())
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                if submodule in MODULES:
                    yield submodule
                elif node.module in MODULES:
                    yield node.module


def part(module: str) -> str:
    """The package itself, whose names are found when they are used, stands for the language."""
    return module.split(".")[1] if "." in module else "lang"


def is_below(module: str, other: str) -> bool:
    return other.startswith("tilus") and (LEVEL[part(other)] < LEVEL[part(module)] or part(other) == part(module))


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m.startswith("tilus.")))
def test_imports_go_downward(module: str) -> None:
    above = {other for other in imported(module) if not is_below(module, other)}
    assert above == COMMANDS.get(module, set())


def test_nothing_needs_the_bridges_to_other_libraries() -> None:
    users = {m for m in MODULES if any(other.startswith("tilus.interop") for other in imported(m))}
    assert {user for user in users if not user.startswith("tilus.interop")} == set()


def test_code_generation_knows_no_instruction() -> None:
    """Not even for type checkers."""
    for path in (ROOT / "tilus" / "codegen").rglob("*.py"):
        assert "tilus.instructions" not in path.read_text(), path


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m.split(".")[0] == "serving"))
@pytest.mark.parametrize("tools", ["serving.bench", "serving.offline"])
def test_the_server_needs_none_of_its_tools(module: str, tools: str) -> None:
    """Not even inside of functions, but where `python -m serving bench` and `simulate` start."""
    is_command = (module, tools) == ("serving.__main__", "serving.bench")
    used = {other for other in imported(module) if other.startswith(tools)}
    assert used == set() or is_command or module.startswith(tools)


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m.startswith("serving")))
def test_serving_uses_public_names(module: str) -> None:
    assert {other for other in imported(module) if other.split(".")[0] == "tilus"} <= PUBLIC


def loaded_by(statement: str) -> set[str]:
    program = f"import sys\nold = set(sys.modules)\n{statement}\nprint(*set(sys.modules) - old)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True)
    return {name for name in done.stdout.split() if name.split(".")[0] not in sys.stdlib_module_names}


def test_import_tilus_loads_only_errors() -> None:
    """Everything else waits until it is used; benchmarks/compile_time.py measures how long the import takes."""
    assert loaded_by("import tilus") == {"tilus", "tilus.errors"}


@pytest.mark.parametrize(
    "statement", ["import tilus.cli", "import tilus\ntilus.kernel, tilus.load, tilus.f16", "import tilus.kernels"]
)
def test_no_torch_driver_or_parser_before_they_are_needed(statement: str) -> None:
    packages = {name.split(".")[0] for name in loaded_by(statement)}
    assert packages & {"torch", "cuda", "lark", "transformers", "serving"} == set()


@pytest.mark.parametrize("statement", ["import serving.__main__", "import serving.server"])
def test_the_server_needs_nothing_of_what_measures_it(statement: str) -> None:
    found = loaded_by(statement)
    assert statement.split()[1] in found
    assert {name for name in found if name.split(".")[0] in ("aiohttp", "matplotlib")} == set()
    assert {name for name in found if name.startswith("serving.bench")} == set()
