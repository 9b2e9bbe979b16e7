"""`Program`: the code of one module, or of a part of the kernel: functions, instructions, branches, source lines.

An address in a module is the instruction's offset in the .ko file: one number for all sections, wherever the module is
loaded.  An address in the kernel is the one that it was linked for.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from vmodel.compressed import decompress, format_of
from vmodel.coverage.disassembly import Instruction
from vmodel.coverage.errors import CoverageError
from vmodel.coverage.functions import CodeFunction
from vmodel.coverage.kernel_code import KernelCode
from vmodel.coverage.kernel_image import KernelImage
from vmodel.coverage.layout import TextLayout
from vmodel.coverage.lines import Lines
from vmodel.coverage.module_code import ModuleCode
from vmodel.coverage.object_file import ET_REL, ObjectFile
from vmodel.files import pieces

#: Bytes of a file with debug information.
_LARGEST = 1 << 30
__all__ = ["Branch", "CodeFunction", "Program"]


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

    `build_id`: the linker's, in hexadecimal digits; of a file without, a hash of its code.

    `notes`: what is not known about it, a line each, for example bytes that could not be decoded.
    """

    name: str
    build_id: str
    functions: tuple[CodeFunction, ...]
    text: TextLayout
    notes: tuple[str, ...] = ()
    _debug: ObjectFile | Path | None = field(default=None, repr=False)

    @classmethod
    def of_module(cls, name: str, elf: bytes, debug: Path | None = None, path: Path | None = None) -> Program:
        """Of a module's .ko file, decompressed.

        `debug`: a file with its debug information, if that is not in the module.  `path`: the module's, for messages.
        CoverageError: the file is damaged, has no symbols, or is no module for x86-64.
        """
        file = ObjectFile(elf, path or name)
        if file.type != ET_REL:
            raise CoverageError("is no kernel module: an ELF file of another type", file=file.file)
        code = ModuleCode(file)
        functions = tuple(code.functions())
        if not functions:
            raise CoverageError("has no functions in its symbol table: it was stripped", file=file.file)
        layout = TextLayout.of_sections(file.sections)
        return cls(name, _identity(file), functions, layout, _notes(code.undecoded), debug or file)

    @classmethod
    def of_kernel(cls, image: KernelImage, prefixes: Sequence[str], debug: Path | None = None) -> Program:
        """Of the kernel's functions whose names begin with one of the prefixes; its name is "vmlinux:PREFIX,...".

        `debug`: the vmlinux of the same build that has debug information.  CoverageError: there is no such function.
        """
        file = ObjectFile(image.elf, image.path)
        code = KernelCode(file, image.symbols, prefixes)
        functions = tuple(code.functions())
        name = f"vmlinux:{','.join(dict.fromkeys(prefixes))}"
        return cls(name, _identity(file), functions, TextLayout(), _notes(code.undecoded), debug)

    # ---- source lines -----------------------------------------------------------------------

    def lines(self) -> Lines | None:
        """The source lines of the instructions; None: there is no debug information.

        They are read at the first call.  CoverageError: the file is damaged, cannot be read, or is of another build.
        """
        return self._lines

    @cached_property
    def _lines(self) -> Lines | None:
        if self._debug is None:
            return None
        if isinstance(self._debug, ObjectFile):
            file = self._debug
        else:
            file = ObjectFile(_read(self._debug), self._debug)
            if file.build_id != self.build_id:
                raise CoverageError(
                    f"is not the debug information of this {self.name}: its build id is {file.build_id or 'missing'},"
                    f" the module's is {self.build_id or 'missing'}",
                    file=self._debug,
                )
        return Lines.of_file(file, {section.name: section.address for section in reversed(self.text.sections)})

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


def _read(path: Path) -> bytes:
    """A file, decompressed if it is compressed."""
    try:
        data = b"".join(pieces(path, _LARGEST))
        return decompress(data, _LARGEST) if format_of(data) else data
    except OSError as error:
        raise CoverageError(f"cannot be read: {error.strerror}", file=path) from None
    except ValueError as error:
        raise CoverageError(str(error), file=path) from None


def _identity(file: ObjectFile) -> str:
    """The build id; of a file without, a hash of its code."""
    if file.build_id:
        return file.build_id
    code = hashlib.sha1(usedforsecurity=False)
    for section in file.sections:
        if section.executable:
            code.update(section.name.encode() + b"\0" + file.contents(section))
    return code.hexdigest()


def _notes(undecoded: list[int]) -> tuple[str, ...]:
    if not undecoded:
        return ()
    places = ", ".join(f"{address:#x}" for address in undecoded[:3])
    return (f"bytes that Capstone cannot decode, at {len(undecoded)} places: {places}",)
