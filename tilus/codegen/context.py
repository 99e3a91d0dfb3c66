"""What an instruction needs to emit PTX: besides threads and addresses, the registers of tiles, and what a kernel owns.

A tile's local slots form one little-endian bit string per thread in 32-bit words: slot i of an n-bit type has bits
[i*n, (i+1)*n). Types of 64 bits use one 64-bit register a slot; boolean tiles one predicate a slot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tilus.codegen.addresses import AddressContext
from tilus.codegen.cast_plan import plan_slots
from tilus.codegen.tensor_map import TensorMap
from tilus.codegen.word_program import emit_program
from tilus.dtypes import DataType, boolean
from tilus.errors import Loc, TilusError
from tilus.ir.expr import Expr, Var
from tilus.ir.instruction import Instruction
from tilus.ir.tensor import RegisterTensor, SharedTensor
from tilus.layout import RegisterLayout, slot_map
from tilus.layout.word_program import pick_fields
from tilus.ptx.module import FloatImm, Imm, Reg, RegClass, Symbol
from tilus.target import Target

LOCAL_SYMBOL = "local_memory"
_ONE = 0x3F800000  # 1.0: all lines


def word_class(dtype: DataType) -> RegClass:
    """The class of the registers that hold a tile of this dtype."""
    if dtype == boolean:
        return RegClass.PRED
    return RegClass.B64 if dtype.nbits == 64 else RegClass.B32


def num_words(dtype: DataType, num_locals: int) -> int:
    """Registers per thread of a tile with `num_locals` slots."""
    if dtype == boolean or dtype.nbits == 64:
        return num_locals
    return -(-num_locals * dtype.nbits // 32)


@dataclass(frozen=True)
class Note:
    """One line of the compile report."""

    mnemonic: str
    text: str
    loc: Loc | None


@dataclass
class EmitContext(AddressContext):
    """State of lowering one kernel.

    read_only: pointers to memory that nobody writes while the kernel runs. parameters: what the launcher knows. arriving_warps:
    of one arrival at each mbarrier. met_by_other_blocks: mbarriers at which other blocks arrive. entry_registers: of a thread at
    launch, where roles change it. first_meeting: the barrier of the cluster at which blocks have nothing to hand on.
    """

    target: Target
    read_only: frozenset[Var]
    parameters: frozenset[Expr]
    arriving_warps: Mapping[SharedTensor, int]
    met_by_other_blocks: frozenset[SharedTensor]
    entry_registers: int | None
    first_meeting: Instruction | None
    tiles: dict[RegisterTensor, list[Reg]] = field(default_factory=dict[RegisterTensor, list[Reg]])
    notes: list[Note] = field(default_factory=list[Note])
    strings: dict[str, str] = field(default_factory=dict[str, str])
    tensor_maps: dict[TensorMap, str] = field(default_factory=dict[TensorMap, str])
    local_nbytes: int = 0

    # Tiles.

    def layout(self, tensor: RegisterTensor) -> RegisterLayout:
        if tensor.layout is None:
            raise TilusError(f"tile {tensor.name} has no layout")
        return tensor.layout

    def words(self, tensor: RegisterTensor) -> list[Reg]:
        """The registers that hold a tile; do not write to them."""
        return self.tiles[tensor]

    def define(self, tensor: RegisterTensor, words: Sequence[Reg]) -> None:
        """Give a tile its registers. The storage of a mutable tile stays where it is and is copied into."""
        if tensor in self.tiles:
            for dst, src in zip(self.tiles[tensor], words, strict=True):
                if dst != src:
                    self.b.mov(dst, src)
        elif tensor.mutable:
            for dst, src in zip(self.allocate(tensor), words, strict=True):
                self.b.mov(dst, src)
        else:
            self.tiles[tensor] = list(words)

    def allocate(self, tensor: RegisterTensor) -> list[Reg]:
        """Fresh storage for a mutable tile, at the current level."""
        count = num_words(tensor.dtype, self.layout(tensor).num_locals)
        regs = [self.b.reg(word_class(tensor.dtype)) for _ in range(count)]
        self.tiles[tensor] = regs
        return regs

    def aligned_words(self, tensor: RegisterTensor, layout: RegisterLayout) -> list[Reg]:
        """The tile's registers in the slot order of another layout; every thread must own what that layout gives it.

        This serves broadcast operands (size 1 where the layout has more) and operands in another local order.
        """
        own = self.layout(tensor)
        if own == layout:
            return self.words(tensor)
        return self.pick(tensor.dtype, self.words(tensor), slot_map(layout, own))

    def pick(self, dtype: DataType, words: Sequence[Reg], slots: Sequence[int]) -> list[Reg]:
        """New words whose slot i is slot `slots[i]` of `words`."""
        if dtype == boolean or dtype.nbits >= 32:
            return [words[slot] for slot in slots]
        return emit_program(self.b, pick_fields(dtype.nbits, len(words), tuple(slots)), words)

    def extract(self, nbits: int, words: Sequence[Reg], slot: int) -> Reg:
        """Field `slot` of a string of fields of up to 32 bits, zero-extended in a 32-bit register."""
        word, shift = divmod(slot * nbits, 32)
        if nbits == 32:
            return words[word]
        if shift + nbits <= 32:
            return self.b.emit("bfe.u32", words[word], Imm(shift), Imm(nbits))
        pair = self.b.emit("shf.r.wrap.b32", words[word], words[word + 1], Imm(shift))
        return self.b.emit("and.b32", pair, Imm((1 << nbits) - 1))

    def pack(self, nbits: int, codes: Sequence[Reg]) -> list[Reg]:
        """Words from one 32-bit register per field, whose bits above `nbits` are zero."""
        result: list[Reg] = []
        for index in range(-(-len(codes) * nbits // 32)):
            word: Reg | None = None
            for slot, code in enumerate(codes):
                shift = slot * nbits - 32 * index
                if -nbits < shift < 32:
                    word = self._insert(word, code, shift)
            result.append(word if word is not None else self.b.const(0))
        return result

    def _insert(self, word: Reg | None, code: Reg, shift: int) -> Reg:
        moved = code
        if shift > 0:
            moved = self.b.emit("shl.b32", code, Imm(shift))
        elif shift < 0:
            moved = self.b.emit("shr.u32", code, Imm(-shift))
        return moved if word is None else self.b.emit("or.b32", word, moved)

    def cast(self, src: DataType, dst: DataType, words: Sequence[Reg], count: int) -> list[Reg]:
        """Words of another type, slot for slot."""
        if src == dst:
            return list(words)
        return plan_slots(src, dst, self.target, len(words), range(count)).emit(self.b, words)

    def require_sm_90a(self, what: str) -> None:
        """Refuse targets that do not know what the code needs."""
        if self.target.sm < 90 or not self.target.arch_specific:
            raise TilusError(
                f"{what} needs sm_90a or a later GPU, the target is {self.target}",
                hint='compile for sm_90a, or run it on device "reference" or "emulator"',
            )

    def string(self, text: str) -> Symbol:
        """The name of a zero-terminated UTF-8 string in global memory."""
        name = self.strings.setdefault(text, f"string_{len(self.strings)}")
        return Symbol(name)

    def tensor_map(self, tensor_map: TensorMap) -> Reg:
        """The generic address of a tensor map, which becomes a parameter of the kernel.

        Raises: TilusError when the map depends on more than the parameters, which is all that the launcher knows.
        """
        unknown = sorted(str(e) for e in tensor_map.variables() if e not in self.parameters)
        if unknown:
            raise TilusError(
                f"a tensor copy of {tensor_map.name}: where the view lies depends on {', '.join(unknown)}; expected a tensor "
                "that is known when the kernel is launched",
                hint="copy from the whole tensor, and say by the offsets where: copy_tensor(dst, x, [i, j, k], ...)",
            )
        stem = "".join(c if c.isalnum() else "_" for c in tensor_map.name)
        name = self.tensor_maps.setdefault(tensor_map, f"tensor_map_{len(self.tensor_maps)}_{stem}")
        return self.b.pure("cvta.param.u64", self.b.pure("mov.u64", Symbol(name)))

    def cache_policy(self, evict: str) -> Reg:
        """What the L2 cache shall do with lines of an access: drop them `first`, or `last`."""
        return self.b.pure(f"createpolicy.fractional.L2::evict_{evict}.b64", FloatImm(_ONE))

    def local_memory(self, nbytes: int) -> Symbol:
        """The name of each thread's own memory, at least this large; instructions take turns in it."""
        self.local_nbytes = max(self.local_nbytes, nbytes)
        return Symbol(LOCAL_SYMBOL)

    def note(self, inst: Instruction, text: str) -> None:
        """A line for the report, with the user's position."""
        self.notes.append(Note(inst.mnemonic, text, self.b.loc))
