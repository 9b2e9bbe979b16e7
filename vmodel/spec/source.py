"""A bank as Python source, formatted as ruff does with lines of 120 characters; the same bank gives the same text."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence

from vmodel.fields import Field, Layout, Values
from vmodel.modes import Mode
from vmodel.register_files import Array, FileArray, RamArea, RegisterFile
from vmodel.regs import Part, Register, RegisterBank
from vmodel.spec.walk import banks, layouts, members, values

_WIDTH = 120
#: Modes that have a name of their own in vmodel.regs.
_SHORT = ("RO", "RW", "WO", "W1C", "W1S", "RC", "RESERVED")
_DECLARED = ("Bit", "Bits", "Layout", "Reg8", "Reg16", "Reg32", "Reg64", "RegisterBank", "Values")


def python_source(bank: type[RegisterBank], origin: str) -> str:
    """The source of a module that defines `bank` and what it consists of; `origin` names where it came from."""
    written: set[type[Layout]] = set()
    named: set[type[Values]] = set()
    classes: list[str] = []
    for inner in banks(bank):
        for layout in layouts(inner):
            if layout not in written:
                written.add(layout)
                for enumeration in values(layout):
                    if enumeration not in named:
                        named.add(enumeration)
                        lines = map(_value, enumeration)
                        classes.append(_class(f"{enumeration.__name__}(Values)", enumeration.__doc__, lines))
                classes.append(_class(f"{layout.__name__}(Layout)", layout.__doc__, map(_field, layout.fields)))
        head = f"{inner.__name__}(RegisterBank, size={_hex(inner.size)}{_access(inner)})"
        classes.append(_class(head, inner.__doc__, (_member(member) for member in members(inner))))
    body = "\n\n\n".join(classes)
    top = _docstring(f"Registers of {origin}; written by `vmodel regs import`.", "")
    return "\n".join([*top, "", *_imports(body), "", "", body, ""])


def _access(bank: type[RegisterBank]) -> str:
    sizes = "" if bank.sizes == (1, 2, 4, 8) else f", sizes={bank.sizes!r}"
    return sizes if bank.misaligned else f"{sizes}, misaligned=False"


def _imports(body: str) -> Iterator[str]:
    """Yields the imports that the text needs, sorted as ruff does."""
    wanted = set(_words(body))
    modules = {
        "vmodel.modes": ["Mode"],
        "vmodel.register_files": ["Array", "FileArray", "RamArea", "RegisterFile"],
        "vmodel.regs": [*sorted(_SHORT), *_DECLARED],
    }
    for module, names in modules.items():
        used = [name for name in names if name in wanted]
        if used:
            line = f"from {module} import {', '.join(used)}"
            yield from [line] if len(line) <= _WIDTH else _wrapped(f"from {module} import ", used, "")


def _words(body: str) -> Iterator[str]:
    """Yields the names in a text, outside of strings."""
    import io
    import tokenize

    for token in tokenize.generate_tokens(io.StringIO(body).readline):
        if token.type == tokenize.NAME:
            yield token.string


def _class(head: str, doc: str | None, lines: Iterator[list[str]]) -> str:
    return "\n".join([f"class {head}:", *_docstring(doc or "", "    "), "", *(line for made in lines for line in made)])


def _docstring(doc: str, indent: str) -> list[str]:
    text = " ".join(doc.split()).replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
    # A quotation mark at the end would be part of what ends the text, unless it is escaped.
    text = f"{text} " if re.search(r'(?<!\\)(\\\\)*"$', text) else text
    lines = textwrap.wrap(text, _WIDTH - len(indent) - 6, break_long_words=False, break_on_hyphens=False) or ["..."]
    if text.endswith(" "):
        lines[-1] += " "
    if len(lines) == 1:
        return [f'{indent}"""{lines[0]}"""']
    return [f'{indent}"""{lines[0]}', *(f"{indent}{line}" for line in lines[1:]), f'{indent}"""']


def _call(target: str, arguments: Sequence[str]) -> list[str]:
    """An assignment of a call, on as few lines as fit."""
    line = f"    {target}({', '.join(arguments)})"
    if len(line) <= _WIDTH:
        return [line]
    return _wrapped(f"    {target}", arguments, "    ")


def _wrapped(head: str, arguments: Sequence[str], indent: str) -> list[str]:
    inside = f"{indent}    {', '.join(arguments)}"
    if len(inside) <= _WIDTH and indent:
        return [f"{head}(", inside, f"{indent})"]
    return [f"{head}(", *(f"{indent}    {argument}," for argument in arguments), f"{indent})"]


def _hex(number: int) -> str:
    return f"0x{number:X}"


def _quoted(text: str) -> str:
    """A string as ruff writes it: in double quotes unless that needs more backslashes."""
    text = text.replace("\\", "\\\\")
    if text.count('"') > text.count("'"):
        return "'" + text.replace("'", "\\'") + "'"
    return '"' + text.replace('"', '\\"') + '"'


def _mode(mode: Mode) -> str:
    return mode.name if mode.name in _SHORT else f"Mode.{mode.name}"


def _field(field: Field) -> list[str]:
    kind, bits = ("Bit", [str(field.lo)]) if field.lo == field.hi else ("Bits", [str(field.lo), str(field.hi)])
    arguments = [*bits, *([] if field.mode is None else [_mode(field.mode)]), *_doc(field.doc)]
    arguments += [] if field.values is None else [f"values={field.values.__name__}"]
    return _call(f"{field.name} = {kind}", arguments)


def _value(value: Values) -> list[str]:
    line = f"    {value.name} = {int(value)}"
    if value.doc:
        line += f", {_quoted(value.doc)}"
    if len(line) <= _WIDTH:
        return [line]
    return [f"    {value.name} = (", f"        {int(value)},", f"        {_quoted(value.doc)},", "    )"]


def _doc(doc: str) -> list[str]:
    return [f"doc={_quoted(doc)}"] if doc else []


def _register(register: Register) -> list[str]:
    """The arguments of a register."""
    arguments = [_hex(register.offset)]
    if register.mode is not Mode.RW:
        arguments.append(_mode(register.mode))
    if register.reset:
        arguments.append(f"reset={_hex(register.reset)}")
    if register.layout is not None:
        arguments.append(f"layout={register.layout.__name__}")
    arguments += _doc(register.doc)
    if register.sizes is not None:
        arguments.append(f"sizes={register.sizes!r}")
    arguments += [f"{name}=True" for name in ("ioeventfd", "sticky") if getattr(register, name)]
    return arguments


def _member(member: Register | Part) -> list[str]:
    if isinstance(member, Register):
        return _call(f"{member.name} = {type(member).__name__}", _register(member))
    if isinstance(member, RamArea):
        mode = [] if member.mode is Mode.RW else [_mode(member.mode)]
        arguments = [_hex(member.offset), _hex(member.size), *mode, *_doc(member.doc)]
        return _call(f"{member.name} = RamArea", arguments)
    if isinstance(member, RegisterFile):
        return _call(f"{member.name} = RegisterFile", [member.of.__name__, f"at={_hex(member.offset)}"])
    assert isinstance(member, Array | FileArray)
    count = str(member.dimensions[0]) if len(member.dimensions) == 1 else str(member.dimensions)
    stride = f"stride={_hex(member.stride)}"
    if isinstance(member, FileArray):
        return _call(f"{member.name} = FileArray", [member.of.__name__, count, f"at={_hex(member.offset)}", stride])
    register = f"{type(member.register).__name__}({', '.join(_register(member.register))})"
    line = _call(f"{member.name} = Array", [register, count, stride])
    if max(map(len, line)) <= _WIDTH:
        return line
    inner = [f"            {argument}," for argument in _register(member.register)]
    kind = type(member.register).__name__
    return [
        f"    {member.name} = Array(",
        f"        {kind}(",
        *inner,
        "        ),",
        f"        {count},",
        f"        {stride},",
        "    )",
    ]
