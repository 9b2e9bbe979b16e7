"""`Untaken`: a branch next to code that ran, which itself never did; and signs that it handles an error."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vmodel.coverage.addresses import AddressSet
from vmodel.coverage.disassembly import Block, Instruction
from vmodel.coverage.functions import CodeFunction
from vmodel.coverage.program import Program

#: Functions of the kernel that say that something is wrong.
_COMPLAINS = re.compile(
    r"_?(_?dev_(emerg|alert|crit|err|warn)|dev_err_probe|dev_warn_probe|_?printk|__warn_printk|warn_slowpath\w*|panic)\b"
)
#: `mov eax, -EINVAL` and its like: Linux's functions return errors as negative numbers up to 4095 (IS_ERR_VALUE).
_ERROR = re.compile(r"(?:e|r)\w\w, (?:0xffff(?:ffffffff)?(f[0-9a-f]{3})|-(0x[0-9a-f]+|\d+))")
#: How many instructions before a jump are looked at for what it compares.
_BEFORE = 6
_COMPARES = frozenset({"cmp", "test", "bt", "sub", "and", "or", "add", "dec", "inc", "xor"})


@dataclass(frozen=True)
class Untaken:
    """A side of a conditional jump that never ran, while the jump did.

    `address`: the jump's; `to`: where this side begins; `taken`: whether it is the jump's target, or what follows it.
    `guard`: the comparison and the jump; `behind`: instructions of the same function that can be reached through it
    without code that ran; `signs`: what says that it handles an error, as "returns -EINVAL" or "calls _dev_err".
    """

    module: str
    function: CodeFunction
    address: int
    to: int
    taken: bool
    guard: str
    behind: int
    signs: tuple[str, ...]


def untaken(program: Program, reached: AddressSet) -> list[Untaken]:
    """All of a program, by address."""
    found: list[Untaken] = []
    for function in program.functions:
        if any(address in reached for address in function.addresses):
            found += _of_function(program.name, function, reached)
    return sorted(found, key=lambda branch: (branch.address, branch.taken))


def _of_function(module: str, function: CodeFunction, reached: AddressSet) -> Iterator[Untaken]:
    blocks = {block.address: block for block in function.blocks()}
    for block in blocks.values():
        jump = block.instructions[-1]
        if not jump.conditional or jump.target is None or jump.address not in reached:
            continue
        for to, taken in ((jump.target, True), (jump.address + jump.size, False)):
            if to in reached or to not in blocks:
                continue
            if _is_stack_check(blocks[to]):
                continue
            behind = list(_behind(to, blocks, reached))
            guard = _guard(block.instructions)
            yield Untaken(
                module,
                function,
                jump.address,
                to,
                taken,
                guard,
                sum(len(part.instructions) for part in behind),
                tuple(dict.fromkeys(sign for part in behind for sign in _signs(part.instructions)))[:4],
            )


def _is_stack_check(block: Block) -> bool:
    """Whether it is the compiler's own test at the end of a function that the stack is whole."""
    return any(i.verb == "call" and i.operands.startswith("__stack_chk_fail") for i in block.instructions)


def _behind(start: int, blocks: dict[int, Block], reached: AddressSet) -> Iterator[Block]:
    """The blocks that can be reached from here without one that ran."""
    seen, todo = {start}, [start]
    while todo:
        block = blocks[todo.pop(0)]
        yield block
        for following in block.successors:
            if following in blocks and following not in seen and following not in reached:
                seen.add(following)
                todo.append(following)


def _guard(instructions: Sequence[Instruction]) -> str:
    """The comparison that a block's last jump depends on, if it is near, and the jump's condition."""
    jump = instructions[-1]
    for before in reversed(instructions[-_BEFORE:-1]):
        if before.verb in _COMPARES:
            return f"{before}; {jump.mnemonic}"
    return str(jump.mnemonic)


def _signs(instructions: Sequence[Instruction]) -> Iterator[str]:
    for instruction in instructions:
        if instruction.verb in ("call", "jmp") and _COMPLAINS.match(instruction.operands):
            yield f"calls {instruction.operands.partition('+')[0]}"
        elif instruction.verb == "mov" and (found := _ERROR.fullmatch(instruction.operands)):
            number = 0x10000 - int(found[1], 16) if found[1] else int(found[2], 0)
            # -1 is more often "all bits" than -EPERM, as in an atomic decrement.
            if number != 1 and (name := errno.errorcode.get(number)):
                yield f"returns -{name}"
        elif instruction.verb in ("ud0", "ud1", "ud2"):
            yield "warns (ud2)"
