"""The batches that are measured, and what is wanted of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tilus.kernels.kv_cache import KV_FORMATS

LONGEST = 65536  # tokens of a sequence of a skewed batch, at most


@dataclass(frozen=True)
class Case:
    """batch: sequences. context: cached tokens of each, in a skewed batch of their mean; those of the queries are among them.

    bar: what is wanted, TB/s of cached bytes in decoding, TFLOP/s in prefill.
    """

    batch: int
    context: int
    skewed: bool = False
    bar: float | None = None
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page: int = 16
    kv_dtype: str = "bfloat16"  # or a name of KV_FORMATS, with queries of bfloat16
    q_len: int = 1

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of a skewed batch in proportion to 1, 1/2, 1/3 and so on, the longest ones cut."""
        if not self.skewed:
            return (self.context,) * self.batch
        harmonic = sum(1 / rank for rank in range(1, self.batch + 1))
        total = self.batch * self.context
        return tuple(min(LONGEST, max(self.q_len, round(total / harmonic / rank))) for rank in range(1, self.batch + 1))

    @property
    def code_nbits(self) -> int:
        """Of a cached element."""
        return 16 if self.kv_dtype not in KV_FORMATS else KV_FORMATS[self.kv_dtype].code.nbits

    @property
    def nbytes(self) -> int:
        """That have to be read: keys and values of all tokens and heads, scales and minimums (f16) included."""
        kinds = 0 if self.kv_dtype not in KV_FORMATS else KV_FORMATS[self.kv_dtype].kinds
        return sum(self.lengths) * 2 * self.kv_heads * (self.head_dim * self.code_nbits // 8 + 2 * kinds)

    @property
    def flops(self) -> int:
        """Of both products with what each query sees: the tokens up to its own."""
        seen = sum(self.q_len * length - self.q_len * (self.q_len - 1) // 2 for length in self.lengths)
        return 4 * self.head_dim * self.heads * seen

    def __str__(self) -> str:
        skew = " skewed" if self.skewed else ""
        queries = "" if self.q_len == 1 else f"{self.q_len} of "
        return f"{self.batch} x {queries}{self.context}{skew}, heads {self.heads}/{self.kv_heads}, {self.kv_dtype}"


DECODE = [
    Case(1, 4096, bar=1.6), Case(1, 16384, bar=2.5), Case(8, 1024, bar=2.1), Case(8, 4096, bar=2.7), Case(8, 16384, bar=2.95),
    Case(32, 4096, bar=3.0), Case(128, 4096, bar=3.0), Case(8, 4096, skewed=True, bar=2.7),
    Case(128, 4096, skewed=True, bar=2.9), Case(32, 16384, bar=3.0), Case(128, 16384, bar=3.0), Case(1, 1024),
    Case(32, 1024), Case(128, 1024), Case(1, 4096, kv_heads=32), Case(8, 4096, kv_heads=32), Case(32, 4096, kv_heads=32),
    Case(8, 4096, q_len=4), Case(32, 8192, q_len=4), Case(32, 4096, page=64), Case(32, 4096, head_dim=64),
]  # fmt: skip
FP8 = [
    Case(8, 4096, bar=2.3, kv_dtype="fp8"), Case(32, 4096, bar=2.75, kv_dtype="fp8"), Case(128, 16384, bar=2.95, kv_dtype="fp8"),
    Case(32, 16384, kv_dtype="fp8"), Case(1, 4096, kv_dtype="fp8"), Case(1, 16384, kv_dtype="fp8"),
    Case(128, 4096, skewed=True, kv_dtype="fp8"),
]  # fmt: skip
QUANTISED = [*FP8, *(replace(case, bar=None, kv_dtype=name) for name in ("int4", "int8") for case in FP8)]
PREFILL = [
    Case(16, 1024, q_len=1024, bar=460), Case(4, 4096, q_len=4096, bar=590), Case(1, 16384, q_len=16384, bar=700),
    Case(1, 34816, q_len=2048, bar=670), Case(8, 8320, q_len=128, bar=570), Case(32, 8196, q_len=4, bar=50),
    Case(1, 1024, q_len=1024), Case(1, 4096, q_len=4096), Case(4, 8704, q_len=512), Case(32, 8208, q_len=16),
    Case(1, 16384, q_len=16384, page=128), Case(16, 1024, q_len=1024, page=128), Case(4, 4096, q_len=4096, page=128),
    Case(4, 4096, q_len=4096, kv_heads=32), Case(4, 4096, q_len=4096, head_dim=64),
    Case(1, 8320, q_len=128), Case(1, 32896, q_len=128), Case(2, 8448, q_len=256), Case(1, 16896, q_len=512),
]  # fmt: skip
SUSTAINED = [case for case in PREFILL if case.q_len > 8 and (case.bar or (case.page, case.batch) == (128, 1))]
QUANTISED_PREFILL = [
    replace(case, bar=None, kv_dtype=name) for name in KV_FORMATS for case in PREFILL if case.page == 16 and case.q_len >= 128
]  # fmt: skip
