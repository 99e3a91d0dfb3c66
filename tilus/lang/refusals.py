"""Python that kernels do not have: the reason and what to write instead, by syntax node."""

from __future__ import annotations

import ast

from tilus.errors import TilusError

_STATEMENTS: dict[type[ast.AST], tuple[str, str]] = {
    ast.Try: ("try", "a kernel cannot raise; test the condition with `if`"),
    ast.TryStar: ("try", "a kernel cannot raise; test the condition with `if`"),
    ast.Raise: ("raise", "check compile-time values with `assert cond, message`"),
    ast.Global: ("global", "pass the value as an argument, or return it from the helper"),
    ast.Nonlocal: ("nonlocal", "return the value from the helper and assign it where it is called"),
    ast.Delete: ("del", "leave it out: registers are freed when a value is no longer used"),
    ast.ClassDef: ("a class definition", "define the class outside of the kernel"),
    ast.Import: ("import", "import at the top of the file"),
    ast.ImportFrom: ("import", "import at the top of the file"),
    ast.AsyncFunctionDef: ("async", "asynchronous copies are tilus.copy_async, tilus.commit and tilus.wait"),
    ast.AsyncFor: ("async", "use a plain `for`"),
    ast.AsyncWith: ("async", "use a plain `with`"),
    ast.Match: ("match", "use if / elif"),
}

_EXPRESSIONS: dict[type[ast.AST], tuple[str, str]] = {
    ast.Yield: ("yield", "return the value, or pass a helper function that is called with it"),
    ast.YieldFrom: ("yield", "return the value, or pass a helper function that is called with it"),
    ast.Await: ("await", "asynchronous copies are tilus.copy_async, tilus.commit and tilus.wait"),
}


def refuse(node: ast.AST) -> TilusError:
    """The error for a construct that kernels do not have."""
    found = _STATEMENTS.get(type(node)) or _EXPRESSIONS.get(type(node))
    if found is None:
        return TilusError(f"{type(node).__name__} is not supported in a kernel")
    what, instead = found
    return TilusError(f"{what} is not supported in a kernel", hint=instead)
