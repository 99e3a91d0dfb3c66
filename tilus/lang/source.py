"""From a Python function to its syntax tree, with positions that are exact in the user's file.

The whole file is parsed, not the dedented text of the function: so line and column are right for methods, nested
functions, decorators, tabs and strings that span lines.
"""

from __future__ import annotations

import ast
import functools
import linecache
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import CodeType, FunctionType

from tilus.errors import Loc, TilusError

Code = ast.FunctionDef | ast.Lambda


@dataclass(frozen=True, eq=False)
class Source:
    """A function's syntax tree and the file that it stands in."""

    file: str
    node: Code
    lines: tuple[str, ...]
    _known: dict[ast.AST, Loc] = field(default_factory=dict[ast.AST, Loc])  # loops are unrolled: nodes come again

    def loc(self, node: ast.AST) -> Loc:
        """Where a node stands; a node of several lines is marked to the end of its first."""
        if node not in self._known:
            self._known[node] = self._found(node)
        return self._known[node]

    def _found(self, node: ast.AST) -> Loc:
        line = getattr(node, "lineno", self.node.lineno)
        text = self.lines[line - 1].rstrip("\r\n") if line <= len(self.lines) else ""
        start = _characters(text, getattr(node, "col_offset", 0))
        same_line = getattr(node, "end_lineno", line) == line
        end = _characters(text, getattr(node, "end_col_offset", 0)) if same_line else len(text)
        return Loc(self.file, line, start + 1, end + 1)


def _characters(text: str, nbytes: int) -> int:
    """`ast` counts columns in UTF-8 bytes; people count characters."""
    return nbytes if text.isascii() else len(text.encode()[:nbytes].decode(errors="ignore"))


@functools.lru_cache(maxsize=64)
def _functions(lines: tuple[str, ...], file: str) -> dict[tuple[str, int], list[Source]]:
    """All functions of a file, by what their code objects know: name and first line, decorators included."""
    found: dict[tuple[str, int], list[Source]] = {}
    for node in ast.walk(ast.parse("".join(lines), file)):
        if isinstance(node, ast.FunctionDef):
            first = node.decorator_list[0].lineno if node.decorator_list else node.lineno
            found.setdefault((node.name, first), []).append(Source(file, node, lines))
        elif isinstance(node, ast.Lambda):
            found.setdefault(("<lambda>", node.lineno), []).append(Source(file, node, lines))
    return found


def source_of(function: FunctionType) -> Source:
    """The source of a function.

    Raises: TilusError when there is none (built by `exec`, typed into a plain interpreter) or it is ambiguous.
    """
    code = function.__code__
    lines = tuple(linecache.getlines(code.co_filename, function.__globals__))
    if not lines:
        raise TilusError(
            f"the source of {function.__qualname__} is not available ({code.co_filename})",
            hint="kernels and helpers are read from their source: put the function into a file",
        )
    candidates = _functions(lines, code.co_filename).get((code.co_name, code.co_firstlineno), [])
    found = [one for one in candidates if not isinstance(one.node, ast.Lambda) or _covers(one.node.body, code)]
    if len(found) != 1:
        raise TilusError(
            f"found {len(found)} functions named {code.co_name} at {code.co_filename}:{code.co_firstlineno}, expected 1",
            hint="write one function a line; if the file changed since it was imported, start Python again",
        )
    return found[0]


def _covers(body: ast.expr, code: CodeType) -> bool:
    """Whether a lambda's code was compiled from this body: tells two lambdas of one line apart."""
    spans = [p for p in code.co_positions() if p[2] is not None and p[3] is not None and p[2] != p[3]]
    return any(p[0] == body.lineno and p[2] == body.col_offset and p[3] == body.end_col_offset for p in spans)


def assigned_names(nodes: Sequence[ast.stmt]) -> frozenset[str]:
    """Names that these statements bind, not those of functions nested in them."""
    return _assigned_names(tuple(nodes))


@functools.lru_cache(maxsize=4096)  # helpers are inlined many times
def _assigned_names(nodes: tuple[ast.stmt, ...]) -> frozenset[str]:
    names: set[str] = set()
    pending: list[ast.AST] = list(nodes)
    while pending:
        node = pending.pop()
        match node:
            case ast.Name(id, ast.Store() | ast.Del()):
                names.add(id)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names.add(node.name)
                continue
            case ast.Lambda():
                continue
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
                names.update(n.target.id for n in ast.walk(node) if isinstance(n, ast.NamedExpr))
                continue
            case _:
                pass
        pending.extend(ast.iter_child_nodes(node))
    return frozenset(names)


def parameter_names(node: Code) -> list[str]:
    return [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]


def is_read_after(name: str, node: ast.stmt, function: Code) -> bool:
    """Whether a name is read at a place behind the statement, anywhere in the function."""
    end = (node.end_lineno or node.lineno, node.end_col_offset or 0)
    return any(
        isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load) and (n.lineno, n.col_offset) >= end
        for n in ast.walk(function)
    )
