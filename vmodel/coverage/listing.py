"""A module's code as text, a line for each instruction: what lcov and the page show where no source is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vmodel.coverage.disassembly import Instruction
from vmodel.coverage.functions import CodeFunction
from vmodel.coverage.program import Program


@dataclass(frozen=True)
class Listing:
    """`text`, and in it the line numbers (from 1) of instructions by address."""

    text: str
    lines: Mapping[int, int]


def listing(program: Program) -> Listing:
    """The functions of a program by address, each with its instructions."""
    rows = [f"# {program.name}, build id {program.build_id or 'none'}", "# address  instruction"]
    lines: dict[int, int] = {}
    for function in program.functions:
        rows += ["", f"{function.name}:  # {function.section}"]
        for instruction in function.instructions:
            rows.append(f"{instruction.address:10x}  {shown(program, instruction)}")
            lines[instruction.address] = len(rows)
    return Listing("\n".join(rows) + "\n", lines)


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
