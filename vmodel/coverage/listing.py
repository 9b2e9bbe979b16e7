"""A module's code as text, a line for each instruction: what lcov and the page show where no source is known."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vmodel.coverage.disassembly import Instruction
from vmodel.coverage.functions import CodeFunction
from vmodel.coverage.program import Program

#: The second line of a listing; the most characters of both.
_COLUMNS = "# address  instruction"
_MOST_HEAD = 1000


@dataclass(frozen=True)
class Listing:
    """`text`, and in it the line numbers (from 1) of instructions by address."""

    text: str
    lines: Mapping[int, int]


def listing(program: Program) -> Listing:
    """The functions of a program by address, each with its instructions."""
    rows = [f"# {program.name}, build id {program.build_id or 'none'}", _COLUMNS]
    lines: dict[int, int] = {}
    for function in program.functions:
        rows += ["", f"{function.name}:  # {function.section}"]
        for instruction in function.instructions:
            rows.append(f"{instruction.address:10x}  {shown(program, instruction)}")
            lines[instruction.address] = len(rows)
    return Listing("\n".join(rows) + "\n", lines)


def listed(path: Path) -> str | None:
    """The name of the program whose listing is in a file; None: it is something else.  OSError."""
    with path.open(encoding="utf-8", errors="replace") as file:
        head = file.read(_MOST_HEAD).split("\n")
    match = re.fullmatch(r"# (.+), build id (?:[0-9a-f]+|none)", head[0])
    return match[1] if match is not None and head[1:2] == [_COLUMNS] else None


def shown(program: Program, instruction: Instruction) -> str:
    """An instruction as text; a jump or call inside of the program with the name of where it leads."""
    target = instruction.target
    function = program.function_at(target) if target is not None else None
    if target is None or function is None:
        return str(instruction)
    return f"{instruction.mnemonic} {place(function, target)}"


def place(function: CodeFunction, address: int) -> str:
    """An address as text: the function's name, and how far behind its begin; of a moved part, the address."""
    if address == function.address:
        return function.name
    if 0 < address - function.address < 1 << 16:
        return f"{function.name}+{address - function.address:#x}"
    return f"{function.name} at {address:#x}"
