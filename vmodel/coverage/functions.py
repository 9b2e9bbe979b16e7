"""Functions of a program, put together from the code that each symbol names."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from vmodel.coverage.disassembly import Block, Instruction, blocks, without_padding

#: Symbols of the nops in front of functions that ftrace and CFI may use: never executed.
_PREFIXES = ("__pfx_", "__cfi_")
#: A part of a function that GCC or Clang has moved to where cold code is.
_MOVED = re.compile(r"(.+)\.cold(?:\.\d+)?")


@dataclass(frozen=True, eq=False)
class CodeFunction:
    """A function with the parts that the compiler has moved away from it (NAME.cold), and without padding.

    `address` is its entry; the instructions are in ascending order, those of moved parts behind its own.
    Several functions of a program may have the same name: static ones of several source files.
    """

    name: str
    section: str
    address: int
    instructions: tuple[Instruction, ...]

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        """Those of the instructions."""
        return tuple(instruction.address for instruction in self.instructions)

    def blocks(self) -> list[Block]:
        """The instructions as blocks between jumps."""
        return blocks(self.instructions)

    def __repr__(self) -> str:
        return (
            f"CodeFunction({self.name!r}, {self.section!r}, {self.address:#x}, {len(self.instructions)} instructions)"
        )


@dataclass
class NamedCode:
    """The instructions that one symbol names, at addresses from `start` to `end`, `end` not included."""

    name: str
    section: str
    start: int
    end: int
    instructions: list[Instruction]


def put_together(parts: Sequence[NamedCode]) -> list[CodeFunction]:
    """The functions in ascending order, each with its moved parts, without padding and what is no code."""
    targets = {i.target for part in parts for i in part.instructions if i.target is not None}
    parts = sorted((part for part in parts if not part.name.startswith(_PREFIXES)), key=lambda part: part.start)
    for part in parts:
        part.instructions = without_padding(part.instructions, targets)
    moved = _moved(parts)
    rest: defaultdict[int, list[NamedCode]] = defaultdict(list)
    for part in parts:
        if id(part) in moved:
            rest[id(moved[id(part)])].append(part)
    return [
        CodeFunction(
            part.name,
            part.section,
            part.start,
            tuple(i for own in [part, *rest[id(part)]] for i in own.instructions),
        )
        for part in parts
        if part.instructions and id(part) not in moved
    ]


def _moved(parts: Sequence[NamedCode]) -> dict[int, NamedCode]:
    """By id of a moved part: the function that it belongs to."""
    by_name: defaultdict[str, list[NamedCode]] = defaultdict(list)
    for part in parts:
        if part.instructions:
            by_name[part.name].append(part)
    found: dict[int, NamedCode] = {}
    for part in parts:
        name = _MOVED.fullmatch(part.name)
        candidates = by_name.get(name[1], []) if name else []
        if len(candidates) > 1:  # static functions of several files: the one that jumps there
            jumping = [c for c in candidates if any(part.start <= (i.target or 0) < part.end for i in c.instructions)]
            candidates = jumping or candidates
        if candidates:
            found[id(part)] = candidates[0]
    return found
