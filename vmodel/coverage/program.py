"""`Program`: the code of one module, or of a part of the kernel: functions, instructions, branches, source lines.

An address in a module is the instruction's offset in the .ko file: one number for all sections, wherever the module is
loaded.  An address in the kernel is the one that it was linked for.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from vmodel.coverage.disassembly import Block, Instruction, blocks
from vmodel.coverage.errors import CoverageError
from vmodel.coverage.layout import TextLayout
from vmodel.coverage.module_code import ModuleCode
from vmodel.coverage.object_file import ET_REL, ObjectFile


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


@dataclass(frozen=True, eq=False)
class Branch:
    """A conditional jump at `address`, and the addresses of what runs next."""

    address: int
    taken: int
    not_taken: int
    function: CodeFunction


@dataclass(frozen=True, eq=False)
class Program:
    """The code of one module, or of a part of the kernel.  Two programs are the same if name and build id are.

    `notes`: what is not known about it, a line each, for example bytes that could not be decoded.
    """

    name: str
    build_id: str
    functions: tuple[CodeFunction, ...]
    text: TextLayout
    notes: tuple[str, ...] = ()
    _debug: bytes | Path | None = field(default=None, repr=False)

    @classmethod
    def of_module(cls, name: str, elf: bytes, debug: Path | None = None) -> Program:
        """Of a module's .ko file, decompressed.

        `debug`: a file with its debug information, if that is not in the module.  CoverageError: the file is damaged,
        has no symbols, or is no module for x86-64.
        """
        file = ObjectFile(elf, name)
        if file.type != ET_REL:
            raise CoverageError("is no kernel module: an ELF file of another type", file=name)
        code = ModuleCode(file)
        functions = tuple(
            CodeFunction(known.name, known.section, known.address, known.instructions) for known in code.functions()
        )
        if not functions:
            raise CoverageError("has no functions in its symbol table: it was stripped", file=name)
        return cls(name, file.build_id, functions, TextLayout.of_sections(file.sections), code.notes(), debug or elf)

    # ---- instructions -----------------------------------------------------------------------

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        """The addresses of all instructions, in ascending order."""
        return tuple(sorted({address for function in self.functions for address in function.addresses}))

    def instructions(self) -> frozenset[int]:
        """The addresses of all instructions."""
        return self._instructions

    @cached_property
    def _instructions(self) -> frozenset[int]:
        return frozenset(self.addresses)

    def starting_in(self, ranges: Iterable[tuple[int, int]]) -> Iterator[int]:
        """The addresses of instructions that begin in these ranges (start, end), end not included."""
        for start, end in ranges:
            yield from self.addresses[bisect_left(self.addresses, start) : bisect_left(self.addresses, end)]

    @cached_property
    def _by_address(self) -> Mapping[int, tuple[CodeFunction, Instruction]]:
        return {i.address: (function, i) for function in self.functions for i in function.instructions}

    def instruction(self, address: int) -> Instruction:
        """The instruction at an address.  KeyError: none begins there."""
        return self._by_address[address][1]

    def function_at(self, address: int) -> CodeFunction | None:
        """The function whose instruction this address, or the byte there, belongs to."""
        at = bisect_right(self.addresses, address) - 1
        if at < 0:
            return None
        function, instruction = self._by_address[self.addresses[at]]
        return function if address < instruction.address + instruction.size else None

    def function(self, name: str) -> CodeFunction:
        """The first function of this name.  KeyError."""
        for function in self.functions:
            if function.name == name:
                return function
        raise KeyError(name)

    def branches(self) -> list[Branch]:
        """The conditional jumps inside of the program."""
        return [
            Branch(i.address, i.target, i.address + i.size, function)
            for function in self.functions
            for i in function.instructions
            if i.conditional and i.target is not None
        ]

    def __reduce__(self) -> tuple[object, ...]:
        # What is cached can be computed again, and is large.
        return Program, (self.name, self.build_id, self.functions, self.text, self.notes, self._debug)
