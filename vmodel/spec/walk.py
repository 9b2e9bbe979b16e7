"""The classes that a bank consists of, for those who write banks in other formats."""

from __future__ import annotations

from collections.abc import Iterator

from vmodel.fields import Layout, Values
from vmodel.register_files import Array, FileArray, RegisterFile
from vmodel.regs import Part, Register, RegisterBank


def members(bank: type[RegisterBank]) -> list[Register | Part]:
    """Registers and parts as declared, in ascending order."""
    declared = [value for value in vars(bank).values() if isinstance(value, Register | Part)]
    return sorted(declared, key=lambda member: member.offset)  # type: ignore[union-attr]  # all parts have one


def layouts(bank: type[RegisterBank]) -> Iterator[type[Layout]]:
    """Yields the layouts of the bank's own registers, each once."""
    seen: set[type[Layout]] = set()
    for member in members(bank):
        register = member.register if isinstance(member, Array) else member
        if isinstance(register, Register) and register.layout is not None and register.layout not in seen:
            seen.add(register.layout)
            yield register.layout


def values(layout: type[Layout]) -> Iterator[type[Values]]:
    """Yields the enumerations of a layout's fields, each once."""
    yield from dict.fromkeys(field.values for field in layout.fields if field.values is not None)


def banks(bank: type[RegisterBank]) -> list[type[RegisterBank]]:
    """The banks that a bank consists of, inner ones first, itself last."""
    found: list[type[RegisterBank]] = []
    for member in members(bank):
        if isinstance(member, RegisterFile | FileArray):
            found += [inner for inner in banks(member.of) if inner not in found]
    return [*found, bank]
