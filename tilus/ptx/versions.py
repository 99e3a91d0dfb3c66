"""The lowest PTX ISA version an instruction needs (PTX ISA, "PTX ISA Notes" of each instruction).

The newest version is never emitted for its own sake: a driver refuses PTX newer than itself.
"""

from __future__ import annotations

from collections.abc import Iterable

from tilus.target import Target

BASE_VERSION = (7, 0)

# Prefix of an opcode -> version; the longest matching prefix decides. Everything else is in BASE_VERSION.
_INTRODUCED: dict[str, tuple[int, int]] = {
    "stmatrix": (7, 8),
    "wgmma": (8, 0),
    "setmaxnreg": (8, 0),
    "mbarrier.try_wait": (7, 8),
    "mbarrier.arrive.expect_tx": (8, 0),
    "cp.async.bulk": (8, 0),
    "cp.reduce.async.bulk": (8, 0),
    "fence.mbarrier_init": (8, 0),
    "createpolicy": (7, 4),
    "mbarrier.expect_tx": (8, 0),
    "fence.proxy.async": (8, 0),
    "fence.acquire": (8, 6),
    "ld.global.L1::no_allocate": (7, 4),
    "ld.global.L2::cache_hint": (7, 4),
    "ld.global.nc.L1::no_allocate": (7, 4),
    "ld.global.nc.L2::cache_hint": (7, 4),
    "cvta.param": (7, 7),
    "griddepcontrol": (7, 8),
    "barrier.cluster": (7, 8),
    "mapa": (7, 8),
    "ld.shared::cluster": (7, 8),
    "st.shared::cluster": (7, 8),
    "add.bf16": (7, 8),
    "add.rn.bf16": (7, 8),
    "sub.bf16": (7, 8),
    "sub.rn.bf16": (7, 8),
    "mul.bf16": (7, 8),
    "mul.rn.bf16": (7, 8),
    "cvt.rn.f16x2.e4m3x2": (8, 1),
    "cvt.rn.f16x2.e5m2x2": (8, 1),
    "cvt.rn.satfinite.e4m3x2": (8, 1),
    "cvt.rn.satfinite.e5m2x2": (8, 1),
    "mma.sync.aligned.m16n8k32.row.col.f32.e4m3": (8, 4),
    "mma.sync.aligned.m16n8k32.row.col.f32.e5m2": (8, 4),
    "elect.sync": (8, 0),
    "red.global.add.v": (8, 1),
    "red.global.add.noftz.v": (8, 1),
    "red.global.add.noftz.bf16": (7, 8),
    "redux.sync.min.f32": (8, 6),
    "redux.sync.max.f32": (8, 6),
}
# Types at the end of a warpgroup's product -> version.
_INTRODUCED_IN_WGMMA = {".s32.u8.s8": (8, 4), ".s32.s8.u8": (8, 4)}


def required_version(opcodes: Iterable[str], target: Target) -> tuple[int, int]:
    """The lowest `.version` for these opcodes on this target."""
    version = max(BASE_VERSION, target.ptx_version)
    for opcode in set(opcodes):
        for prefix, introduced in _INTRODUCED.items():
            if opcode.startswith(prefix):
                version = max(version, introduced)
        if opcode.startswith("wgmma"):
            version = max([version, *(v for types, v in _INTRODUCED_IN_WGMMA.items() if opcode.endswith(types))])
    return version
