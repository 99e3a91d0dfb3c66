"""What the L2 cache shall drop first or last: how an access says so in PTX (ISA, "createpolicy" and .L2::cache_hint)."""

from __future__ import annotations

from tilus.codegen.context import EmitContext
from tilus.errors import TilusError
from tilus.ptx.module import Operand


def check_eviction(what: str, evict: str | None) -> None:
    if evict not in (None, "first", "last"):
        raise TilusError(f"{what}: evict={evict!r}, expected 'first', 'last' or None")


def cache_hint(evict: str | None) -> str:
    """The modifier of an access with a policy for the L2 cache."""
    return "" if evict is None else ".L2::cache_hint"


def policy(ctx: EmitContext, evict: str | None) -> tuple[Operand, ...]:
    """The operand of an access with a policy for the L2 cache."""
    return () if evict is None else (ctx.cache_policy(evict),)
