"""x86-64 instructions of functions, decoded by Capstone: `Instruction`, and `Block`s between jumps."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import capstone

from vmodel.coverage.errors import CoverageError

#: Jumps that depend on a register; the others are j and a condition.
_COUNTED = frozenset({"loop", "loope", "loopne", "jrcxz", "jecxz", "jcxz"})
_RETURNS = frozenset({"ret", "retf", "retfq", "iret", "iretd", "iretq", "sysret", "sysretq", "sysexit"})
#: Undefined instructions by which the kernel marks static calls and warnings.  They have an operand, but Capstone gives
#: them none.
_UNDEFINED = frozenset({"ud0", "ud1"})


@dataclass(frozen=True, slots=True)
class Instruction:
    """An instruction.  `target`: of a direct jump or call, if it is in the program."""

    address: int
    size: int
    mnemonic: str
    operands: str
    target: int | None = None

    @property
    def verb(self) -> str:
        """The mnemonic without prefixes, as "jmp" of "notrack jmp"."""
        return self.mnemonic.rpartition(" ")[2]

    @property
    def conditional(self) -> bool:
        """Whether it is a conditional jump."""
        verb = self.verb
        return (verb.startswith("j") and verb != "jmp") or verb in _COUNTED

    @property
    def ends_block(self) -> bool:
        """Whether what follows in memory does not follow when it runs: a jump without condition, or a return."""
        verb = self.verb
        return verb in ("jmp", "ljmp") or verb in _RETURNS

    def __str__(self) -> str:
        return f"{self.mnemonic} {self.operands}".rstrip()


@dataclass(frozen=True, slots=True)
class Block:
    """Instructions that run one after the other.  `successors`: addresses that may follow, as far as they are known."""

    instructions: tuple[Instruction, ...]
    successors: tuple[int, ...]

    @property
    def address(self) -> int:
        """Of its first instruction."""
        return self.instructions[0].address


@cache
def _decoder() -> capstone.Cs:
    try:
        return capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    except capstone.CsError as error:  # its library was built without x86
        raise CoverageError(f"Capstone cannot decode x86-64: {error}") from None


@dataclass(frozen=True)
class Referred:
    """What a relocation puts into a jump or call: the address in the program (None: elsewhere), and how to write it."""

    target: int | None
    text: str


def decode(
    code: bytes,
    address: int,
    referred: Mapping[int, Referred],
    known: Sequence[int],
    undecoded: list[int],
) -> Iterator[Instruction]:
    """The instructions of a function, or of a part of one, that begins at `address`.

    `referred`: by address of the operand, which is the last four bytes of a direct jump or call.  `known`: addresses at
    which an instruction is known to begin, ascending: behind bytes that Capstone does not know, it goes on at
    the next.  The addresses of such bytes are added to `undecoded`.
    """
    at = 0
    resume = iter(known)
    while at < len(code):
        for where, size, mnemonic, operands in _decoder().disasm_lite(code[at:], address + at):
            at = where + size - address
            if mnemonic in _UNDEFINED:
                more = _operand_size(code[at : at + 2])
                if at + more <= len(code):
                    at += more
                    yield Instruction(where, size + more, mnemonic, operands)
                    break
            yield _instruction(where, size, mnemonic, operands, referred)
        else:
            if at < len(code):
                undecoded.append(address + at)
                at = next((where for where in resume if where > address + at), address + len(code)) - address


def _operand_size(code: bytes) -> int:
    """Bytes of a ModRM byte and what belongs to it (Intel SDM 2, table 2-2), given it and the byte behind it."""
    mod, rm = (code[0] >> 6, code[0] & 7) if code else (3, 0)
    if mod == 3:
        return 1
    base = code[1] & 7 if rm == 4 and len(code) > 1 else rm
    return 1 + (rm == 4) + (1 if mod == 1 else 4 if mod == 2 or base == 5 else 0)


def _instruction(
    address: int, size: int, mnemonic: str, operands: str, referred: Mapping[int, Referred]
) -> Instruction:
    verb = mnemonic.rpartition(" ")[2]
    if not (verb[0] == "j" or verb == "call" or verb in _COUNTED):
        return Instruction(address, size, mnemonic, operands)
    found = referred.get(address + size - 4)
    if found is not None and size >= 5:
        # A register or memory cannot be the operand of what has a relocation for a direct one: [rip + x] is written so.
        direct = not operands.endswith("]")
        return Instruction(
            address, size, mnemonic, found.text if direct else operands, found.target if direct else None
        )
    try:
        return Instruction(address, size, mnemonic, operands, int(operands, 16))
    except ValueError:
        return Instruction(address, size, mnemonic, operands)


def without_padding(instructions: Iterable[Instruction], targets: Collection[int]) -> list[Instruction]:
    """Leaves out what never runs: nops, int3 and ud1 behind a jump without condition or a return, unless jumped to."""
    found: list[Instruction] = []
    behind = False
    for instruction in instructions:
        if not behind or instruction.address in targets or not _fills(instruction):
            behind = instruction.ends_block
            found.append(instruction)
    return found


def _fills(instruction: Instruction) -> bool:
    return instruction.verb in ("nop", "int3", "ud1") or (
        instruction.verb == "xchg" and instruction.operands == "ax, ax"
    )


def blocks(instructions: Sequence[Instruction]) -> list[Block]:
    """The blocks of a function, in ascending order."""
    starts = {i.target for i in instructions if i.target is not None and i.verb != "call"}
    found: list[Block] = []
    current: list[Instruction] = []
    for instruction, following in zip(instructions, [*instructions[1:], None], strict=True):
        current.append(instruction)
        end = instruction.address + instruction.size
        jumps = instruction.conditional or instruction.ends_block
        if jumps or following is None or following.address != end or following.address in starts:
            successors = [instruction.target] if jumps and instruction.target is not None else []
            if not instruction.ends_block and following is not None and following.address == end:
                successors.insert(0, end)
            found.append(Block(tuple(current), tuple(dict.fromkeys(successors))))
            current = []
    return found
