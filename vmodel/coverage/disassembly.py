"""x86-64 instructions of functions, decoded by Capstone: `Instruction`, and `Block`s between jumps."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
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
#: Instructions that Capstone 5 does not know, by their bytes: the mnemonic, and whether an operand follows.
#: AMD64 APM 3: PVALIDATE, PSMASH; Intel SDM 2: ENQCMD, ENQCMDS.
_UNKNOWN = {
    b"\xf2\x0f\x01\xff": ("pvalidate", False),
    b"\xf3\x0f\x01\xff": ("psmash", False),
    b"\xf2\x0f\x38\xf8": ("enqcmd", True),
    b"\xf3\x0f\x38\xf8": ("enqcmds", True),
}


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

    @classmethod
    def to(cls, target: int | None, name: str, offset: int) -> Referred:
        """To `offset` bytes behind what has a name."""
        return cls(target, f"{name}{offset:+#x}" if offset else name)


def decode(
    code: bytes,
    address: int,
    referred: Mapping[int, Referred],
    refer: Callable[[int], Referred],
    starts: Sequence[int],
    undecoded: list[int],
) -> Iterator[Instruction]:
    """The instructions of a function, or of a part of one, that begins at `address`.

    `referred`: what relocations refer to, by address of the operand: the last four bytes of a direct jump or call.
    `refer`: what one without relocation refers to, by the target's address.  `starts`: addresses at which an
    instruction is known to begin, ascending: behind bytes that Capstone does not know, it goes on at the next.  The
    addresses of such bytes are added to `undecoded`.
    """
    at = 0
    resume = iter(starts)
    while at < len(code):
        for where, size, mnemonic, operands in _decoder().disasm_lite(code[at:], address + at):
            at = where + size - address
            if mnemonic in _UNDEFINED:
                more = _operand_size(code[at : at + 2])
                if at + more <= len(code):
                    at += more
                    yield Instruction(where, size + more, mnemonic, operands)
                    break
            yield _instruction(where, size, mnemonic, operands, referred, refer)
        else:
            if known := _UNKNOWN.get(code[at : at + 4]):
                size = 4 + (_operand_size(code[at + 4 : at + 6]) if known[1] else 0)
                yield Instruction(address + at, size, known[0], "")
                at += size
            elif at < len(code):
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
    address: int,
    size: int,
    mnemonic: str,
    operands: str,
    referred: Mapping[int, Referred],
    refer: Callable[[int], Referred],
) -> Instruction:
    verb = mnemonic.rpartition(" ")[2]
    # A direct jump or call has an address as operand; others have a register, or memory in brackets.
    if operands.startswith("0x") and (verb[0] == "j" or verb == "call" or verb in _COUNTED):
        found = referred.get(address + size - 4) if size >= 5 else None
        found = found or refer(int(operands, 16))
        return Instruction(address, size, mnemonic, found.text, found.target)
    return Instruction(address, size, mnemonic, operands)


def without_padding(instructions: Iterable[Instruction], targets: Collection[int]) -> list[Instruction]:
    """Leaves out what never runs: nops, int3 and ud1 behind a jump without condition or a return, and at the end.

    What something jumps to stays.
    """
    found: list[Instruction] = []
    behind = False
    for instruction in instructions:
        if not behind or instruction.address in targets or not _fills(instruction):
            behind = instruction.ends_block
            found.append(instruction)
    while len(found) > 1 and _fills(found[-1]) and found[-1].address not in targets:
        found.pop()
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
