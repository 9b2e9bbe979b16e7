"""A C header for drivers: only #defines, so that kernels and programs can include it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from vmodel.fields import Field, Layout
from vmodel.register_files import Array, FileArray, RamArea, RegisterFile
from vmodel.regs import Register, RegisterBank
from vmodel.spec.walk import members


def c_header(name: str, places: list[tuple[int, int, type[RegisterBank]]]) -> str:
    """The text of a header.

    `name` begins each macro; `places`: (BAR, offset in it, bank).  An offset is that in the BAR; an element of an array
    is a macro with the index as argument.  A field has a mask, a shift, and a value macro: NAME_MASK, NAME_SHIFT,
    NAME(x); a field of one bit is its mask only.  A name of a value is the field's value, not shifted.
    """
    prefix = _upper(name)
    writer = _Writer()
    for bar, at, bank in places:
        writer.comment(bank.__doc__ or bank.__name__)
        inner = (
            prefix if len(places) == 1 else f"{prefix}_{_upper(bank.__name__.removesuffix('Regs') or bank.__name__)}"
        )
        writer.define(f"{inner}_BAR", str(bar))
        writer.define(f"{inner}_SIZE", _number(bank.size, 32))
        writer.bank(inner, bank, _number(at, 32), at, [])
    guard = f"{prefix}_REGS_H"
    lines = [
        f"/* Registers of {_comment(name)}; written by `vmodel regs --format c`. */",
        f"#ifndef {guard}",
        f"#define {guard}",
    ]
    return "\n".join([*lines, *writer.lines, "", "#endif", ""])


def _upper(name: str) -> str:
    """A name as macros have it: "dmaChannel" and "DmaChannel" give "DMA_CHANNEL"."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", re.sub(r"\W", "_", name, flags=re.ASCII))
    return words.upper()


def _comment(text: str) -> str:
    return text.replace("*/", "* /").replace("/*", "/ *").replace("??/", "?? /")


def _number(value: int, width: int) -> str:
    return f"0x{value:x}ull" if width == 64 else f"0x{value:x}u" if width == 32 else f"0x{value:x}"


class _Writer:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self._names: set[str] = set()

    def comment(self, text: str) -> None:
        """Begins a paragraph."""
        self.lines += ["", f"/* {_comment(' '.join(text.split()))} */"]

    def define(self, name: str, value: str, arguments: str = "", doc: str = "") -> None:
        """A macro; a name that is taken gets "_", so that no macro is defined twice."""
        while name in self._names:
            name += "_"
        self._names.add(name)
        after = f" /* {_comment(' '.join(doc.split()))} */" if doc else ""
        self.lines.append(f"#define {name}{arguments} {value}{after}")

    def bank(self, prefix: str, bank: type[RegisterBank], base: str, at: int, indices: list[str]) -> None:
        """The macros of a bank's members; `base`: the expression of its offset, `indices` its arguments."""
        for member in members(bank):
            name = f"{prefix}_{_upper(member.name)}"
            if isinstance(member, RegisterFile | FileArray):
                here, names = _indexed(base, member.offset, member.dimensions, member.stride, indices)
                self.bank(name, member.of, here, at + member.offset, names)
                continue
            assert isinstance(member, Register | Array | RamArea)
            dimensions = member.dimensions if isinstance(member, Array) else ()
            stride = member.stride if isinstance(member, Array) else 0
            here, names = _indexed(base, member.offset, dimensions, stride, indices)
            self.lines.append("")
            doc = member.register.doc if isinstance(member, Array) else member.doc
            self.define(
                name, here if names else _number(at + member.offset, 32), f"({', '.join(names)})" * bool(names), doc
            )
            if isinstance(member, RamArea):
                self.define(f"{name}_SIZE", _number(member.size, 32))
                continue
            register = member.register if isinstance(member, Array) else member
            self.define(f"{name}_RESET", _number(register.reset, register.width))
            for field in _fields(register.layout):
                self.field(f"{name}_{_upper(field.name)}", field, register.width)

    def field(self, name: str, field: Field, width: int) -> None:
        """The macros of a field."""
        mask, cast = _number(field.mask, width), "0x0ull" if width == 64 else "0x0u"
        if field.lo == field.hi:
            self.define(name, mask, doc=field.doc)
        else:
            self.define(f"{name}_MASK", mask, doc=field.doc)
            self.define(f"{name}_SHIFT", str(field.lo))
            self.define(name, f"((({cast} + (x)) << {field.lo}) & {mask})", "(x)")
        for value in field.values or ():
            self.define(f"{name}_{_upper(value.name)}", _number(value, width), doc=value.doc)


def _fields(layout: type[Layout] | None) -> Iterator[Field]:
    return iter(layout.fields if layout else ())


def _indexed(
    base: str, offset: int, dimensions: tuple[int, ...], stride: int, indices: list[str]
) -> tuple[str, list[str]]:
    """The expression of an offset, and the arguments of its macro, after those in `indices`."""
    names, terms, step = list(indices), [f"0x{offset:x}u"], stride
    steps = []
    for size in reversed(dimensions):
        steps.append(step)
        step *= size
    for size_step in reversed(steps):
        names.append("ijklmnopqrstuvw"[len(names)] if len(names) < 15 else f"i{len(names)}")
        terms.append(f"0x{size_step:x}u * ({names[-1]})")
    return f"({base} + {' + '.join(terms)})", names
