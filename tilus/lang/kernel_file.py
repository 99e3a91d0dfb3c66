"""Kernels in files: a Python file is run as a module, and its kernels are found by name."""

from __future__ import annotations

import difflib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType

from tilus.errors import Loc, TilusError
from tilus.lang.kernel import Kernel


def load_kernel(path: Path, name: str | None = None) -> Kernel:
    """The kernel called `name` of a Python file; without a name, the only one that the file defines.

    Raises: TilusError when the file fails, or has no such kernel, or several and none is named.
    """
    found = {key: value for key, value in vars(run_module(path)).items() if isinstance(value, Kernel)}
    if name is not None:
        if name in found:
            return found[name]
        close = difflib.get_close_matches(name, found)
        known = f"its kernels are {', '.join(found)}" if found else "it has none"
        raise TilusError(
            f"no kernel {name!r} in {path}: {known}", hint=f"did you mean {path}:{close[0]}?" if close else None
        )
    own = [key for key, kernel in found.items() if Path(kernel.python.__code__.co_filename).resolve() == path.resolve()]
    if not own:
        raise TilusError(f"no kernel in {path}, expected a function with @tilus.kernel directly above its `def`")
    if len(own) > 1:
        raise TilusError(f"{path} has {len(own)} kernels: {', '.join(own)}", hint=f"name one: {path}:{own[0]}")
    return found[own[0]]


def run_module(path: Path) -> ModuleType:
    """Run a Python file as a module that is not `__main__`; it may import its neighbours.

    Raises: TilusError with the line of the file at which it failed.
    """
    if not path.is_file():
        raise TilusError(f"no file {path}")
    name = f"_tilus_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TilusError(f"{path} is not a Python file", hint="its name must end with .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    sys.path.insert(0, str(path.parent))
    own_arguments, sys.argv = sys.argv, [str(path)]
    try:
        spec.loader.exec_module(module)
    except TilusError:
        raise
    except SyntaxError as error:
        loc = Loc(str(path), error.lineno or 1, error.offset or 1, error.end_offset)
        raise TilusError(f"{path} is not valid Python: {error.msg}", loc=loc) from error
    except Exception as error:
        raise TilusError(
            f"{path} failed with {type(error).__name__}: {error}", loc=_last_line_in(path, error)
        ) from error
    finally:
        sys.argv = own_arguments
        sys.path.remove(str(path.parent))
    return module


def _last_line_in(path: Path, error: Exception) -> Loc | None:
    """The innermost line of the file on the way to an exception."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == path.resolve()]
    if not frames:
        return None
    frame = frames[-1]
    return Loc(str(path), frame.lineno or 1, (frame.colno or 0) + 1, (frame.end_colno or 0) + 1)
