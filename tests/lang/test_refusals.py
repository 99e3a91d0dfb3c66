"""What kernels do not have is refused with the line, the caret, the reason and what to write instead."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from refused_programs import REFUSED
from written import write

import tilus

HEAD = """\
@tilus.kernel
def k(x: tilus.Tensor[tilus.f32, 'n'], a: tilus.int32, *, block: tilus.Const = 4):
    tilus.grid(1)
    t = tilus.zeros([4])
"""


@pytest.mark.parametrize(("body", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refused_with_the_whole_message(body: str, message: str) -> None:
    text = HEAD + "".join(f"    {line}\n" for line in body.splitlines())
    names = {"tilus": tilus, "math_floor": math.floor, "glist": [], "gobj": SimpleNamespace(value=1)}
    with pytest.raises(tilus.TilusError) as caught:
        write(text, names, "kernel.py")["k"].ir()
    assert str(caught.value) == message


def test_every_message_has_a_place_and_most_say_what_to_write_instead() -> None:
    assert all("\n  at kernel.py:" in message and "^" in message for _, _, message in REFUSED)
    without_hint = [name for name, _, message in REFUSED if "\n  hint: " not in message]
    assert len(without_hint) <= len(REFUSED) // 6, without_hint
