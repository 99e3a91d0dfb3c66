"""Roles in the IR: what the verifier refuses, and what passes leave as it is."""

from __future__ import annotations

import numpy as np
import pytest

from tilus.compiler import compile_function
from tilus.errors import TilusError
from tilus.instructions import INSTRUCTIONS
from tilus.ir.parser import parse_function
from tilus.ir.printer import print_function
from tilus.ir.stmt import Role
from tilus.ir.verify import verify
from tilus.ir.visit import by_warps, walk
from tilus.runtime.emulator.run import run_kernel
from tilus.runtime.reference import run_reference
from tilus.target import get_target
from tilus.transforms import run_pipeline

HEAD = "kernel f(\n  %x: global f32[%n] strides[1] align 16\n) where %n: int32 >= 0 grid(1) warps(12) {\n"


def parsed(body: str):
    return parse_function(f"{HEAD}{body}}}\n", INSTRUCTIONS)


SOUND = """\
  %i: int32 = load_scalar(src=%x, index=[0])
  mut %m: int32 = 1
  warps 0, 4 registers 40 {
    %m = %m + %i
    %t: f32[128] = full(value=%m)
    store(dst=%x, src=%t, offsets=[0], dims=[0], checked=true)
  }
  warps 8, 4 {
    for %k: int32 in range(0, %m, 1) {
      if %k > 3 {
        return
      }
      %t_1: f32[256] = full(value=%m)
      store(dst=%x, src=%t_1, offsets=[%k], dims=[0], checked=true)
      break
    }
  }
  warps 4, 4 registers 24 {
  }
"""


def test_a_sound_program() -> None:
    """Roles see the variables in front of them, change their own, and are what they were after all passes."""
    function = parsed(SOUND)
    verify(function)
    assert print_function(function) == f"{HEAD}{SOUND}}}\n"
    placed = run_pipeline(function, get_target("sm_90a"))
    roles = [(r.first_warp, r.num_warps, r.registers) for r in walk(placed.body) if isinstance(r, Role)]
    assert roles == [(0, 4, 40), (8, 4, None), (4, 4, 24)]
    for stmt, warps in by_warps(placed.body, placed.warps):
        for tile in (*stmt.inst.register_results, *stmt.inst.register_operands):
            assert tile.layout is not None
            assert tile.layout.num_threads == 32 * len(warps)


def test_each_role_starts_with_the_variables_in_front_of_it() -> None:
    body = "mut %m: int32 = 1"
    for role in range(3):
        store = f"store(dst=%x, src=%t{role}, offsets=[{32 * role}], dims=[0], checked=true)"
        body += f" warps {role}, 1 {{ %m = %m + {role} %t{role}: f32[32] = full(value=%m) {store} }}"
    function = parsed(body)
    verify(function)
    found = np.zeros(96, np.float32), np.zeros(96, np.float32)
    run_reference(function, {"x": found[0]}, (1, 1, 1))
    compiled = compile_function(function, get_target("sm_90a"))
    run_kernel(compiled.ptx, compiled.kernel_name, (1, 1, 1), [found[1], 96])
    for values in found:
        np.testing.assert_array_equal(values, np.repeat([1, 2, 3], 32))


def test_a_role_without_effect_goes_away_but_for_its_registers() -> None:
    dead = "  warps 0, 1 {\n    %dead: f32[32] = full(value=0.0)\n  }\n"
    body = run_pipeline(parsed(dead + SOUND), get_target("sm_90a")).body
    assert [r.first_warp for r in walk(body) if isinstance(r, Role)] == [0, 8, 4]


REFUSED = {
    "nested": ("warps 0, 4 { warps 0, 1 { } }", "the role of warp 0 is inside of the role of warps 0 to 3"),
    "too many warps": ("warps 8, 5 { }", "the role has warps 8 to 12, the block has 12"),
    "no warps": ("warps 0, 0 { }", "the role has warps 0 to -1, the block has 12"),
    "overlap": ("warps 0, 4 { } warps 3, 2 { }", "warps 3 to 4 run a role next to one of warps 0 to 3"),
    "odd registers": ("warps 0, 4 registers 41 { }", "registers is 41, expected a multiple of 8 from 24 to 256"),
    "few registers": ("warps 0, 4 registers 16 { }", "registers is 16, expected a multiple of 8 from 24 to 256"),
    "warpgroup": (
        "warps 2, 4 registers 40 { }",
        "the role of warps 2 to 5 sets its registers, expected whole warpgroups",
    ),
    "part of a warpgroup": (
        "warps 4, 1 registers 40 { }",
        "the role of warp 4 sets its registers, expected whole warpgroups",
    ),
    "warpgroup with a gap": (
        "warps 4, 1 registers 40 { } warps 6, 2 registers 40 { }",
        "the role of warp 4 sets its registers, expected whole warpgroups",
    ),
    "registers in a loop": (
        "for %k: int32 in range(0, 2, 1) { warps 0, 4 registers 40 { } }",
        "the role of warps 0 to 3 sets its registers, and is not at the end of the kernel",
    ),
    "registers before": (
        "warps 0, 4 registers 40 { } sync()",
        "the role of warps 0 to 3 sets its registers, and is not at the end of the kernel",
    ),
    "return": ("warps 0, 1 { return } sync()", "the role of warp 0 returns, and statements follow the roles"),
    "break": ("while true { warps 0, 1 { break } }", "break leaves the role of warp 0"),
    "continue": ("while true { warps 0, 1 { if %n > 3 { continue } } }", "continue leaves the role of warp 0"),
    "tile from outside": (
        "%t: f32[32] = full(value=0.0) warps 0, 1 { store(dst=%x, src=%t, offsets=[0], dims=[0]) }",
        "tile t is read in a role and was made outside of it: its layout is for other threads",
    ),
    "tile from a role": (
        "warps 0, 1 { %t: f32[32] = full(value=0.0) } store(dst=%x, src=%t, offsets=[0], dims=[0])",
        "tile t is read behind the role of warp 0 that assigns it: other warps do not know the value",
    ),
    "scalar from a role": (
        "mut %i: int32 = 0 warps 0, 2 { %i = 1 } %t: f32[32] = full(value=%i)",
        "scalar i is read behind the role of warps 0 to 1 that assigns it: other warps do not know the value",
    ),
    "scalar from a neighbour": (
        "warps 0, 1 { mut %i: int32 = 0 } warps 1, 1 { %t: f32[32] = full(value=%i) }",
        "scalar i is read before it has a value",
    ),
    "layout of the block": (
        "warps 0, 2 { %t: f32[384] in spatial(384) = full(value=0.0) }",
        "layout spatial(384) of t is for 384 threads, the role has 64",
    ),
    "barrier in a loop": (
        "shared %b: uint64[1] while true { mbarrier(barrier=%b, arrivals_per_phase=1) }",
        "mbarrier in a loop, branch or role, expected where the whole block passes once",
    ),
}


def test_roles_may_share_a_warpgroup_that_sets_its_registers() -> None:
    """Together they are whole warpgroups; with other numbers, or a warp that sets none, they are refused."""
    verify(parsed("warps 4, 1 registers 40 { } warps 5, 3 registers 40 { } warps 0, 4 registers 24 { }"))
    verify(parsed("warps 0, 3 registers 40 { } warps 3, 5 registers 40 { }"))
    for second in ("3, 1 registers 48", "3, 1"):
        with pytest.raises(TilusError) as caught:
            verify(parsed(f"warps 0, 3 registers 40 {{ }} warps {second} {{ }}"))
        assert "the role of warps 0 to 2 sets its registers, expected whole warpgroups" in str(caught.value)


@pytest.mark.parametrize(("body", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(body: str, message: str) -> None:
    with pytest.raises(TilusError) as caught:
        verify(parsed(body))
    assert caught.value.message == message


def test_a_variable_has_a_value_again() -> None:
    verify(parsed("mut %i: int32 = 0 warps 0, 2 { %i = 1 } %i = 2 %t: f32[32] = full(value=%i)"))
