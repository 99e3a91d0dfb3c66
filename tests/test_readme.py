"""The README is true: its program runs as printed, its transcript is what the command prints, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tilus.cli import main

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def stable(line: str) -> str:
    """What of a line of the report is ours: counts of registers and machine instructions belong to the assembler's version."""
    return re.sub(r"^  (registers|assembler|all|loop) .*", r"  \1", line)


def block(start: str) -> str:
    """The fenced block that starts with this text."""
    (found,) = re.findall(rf"^{re.escape(start)}(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    return found


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "int4_matmul.py"
    path.write_text(block("```python\n"))
    return path


@pytest.mark.parametrize("device", ["reference", "cpu", "emulator"])
def test_the_program_runs_as_printed(program: Path, device: str) -> None:
    command = [sys.executable, "-W", "error", "-m", "tilus.cli", "run", "--device", device, "--time", program]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert re.match(rf"int4_matmul +{device} +1 launches", done.stderr)
    assert len(program.read_text().splitlines()) <= 25


def test_the_transcript_is_what_the_command_prints(program: Path) -> None:
    printed = CliRunner().invoke(main, ["compile", str(program), "--report"]).stdout.splitlines()
    shown = block("```\n$ tilus compile int4_matmul.py --report\n").splitlines()
    assert list(map(stable, shown)) == list(map(stable, printed))


@pytest.mark.parametrize(
    "command", re.findall(r"(?:^    |`)tilus ((?:compile|layout|doctor)\b(?:\\\n|[^`\n])*)", TEXT, re.MULTILINE)
)
def test_the_commands_work(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(command.replace("\\\n", " "))
    result = CliRunner().invoke(main, arguments if arguments != ["compile"] else ["compile", "--help"])
    assert result.exit_code == 0, result.output


def test_pages_exist() -> None:
    pages = re.findall(r"\b(?:docs/\w+|CONTRIBUTING)\.md", TEXT)
    assert len(set(pages)) >= 7
    assert [page for page in pages if not (ROOT / page).is_file()] == []


def test_the_two_commands_exist() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"^    make (\w+)", TEXT, re.MULTILINE)) == {"serve", "test"} <= set(targets)
