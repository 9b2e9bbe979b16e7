"""A bank as SystemRDL 2.0: what `load` makes of the text is the bank again, as far as SystemRDL can say it."""

from __future__ import annotations

from vmodel.fields import Field, Values
from vmodel.modes import Mode, Read, Write
from vmodel.register_files import Array, FileArray, RamArea, RegisterFile
from vmodel.regs import Part, Register, RegisterBank
from vmodel.spec.draft import WHOLE
from vmodel.spec.walk import banks, layouts, members, values

_ON_WRITE = {
    Write.ONE_CLEARS: "woclr",
    Write.ONE_SETS: "woset",
    Write.ONE_TOGGLES: "wot",
    Write.ZERO_CLEARS: "wzc",
    Write.ZERO_SETS: "wzs",
    Write.ZERO_TOGGLES: "wzt",
    Write.CLEARS: "wclr",
    Write.SETS: "wset",
}


def rdl_text(bank: type[RegisterBank]) -> str:
    """The definitions of the bank and of what it consists of."""
    with_ram = {inner for inner in banks(bank) if inner.memories}
    found = (each for inner in banks(bank) for layout in layouts(inner) for each in values(layout))
    lines = [line for each in dict.fromkeys(found) for line in _enumeration(each)]
    for inner in banks(bank):
        kind = "addrmap" if inner is bank or inner in with_ram else "regfile"
        lines += [f"{kind} {inner.__name__} {{", *_desc(inner.__doc__ or "", "    ")]
        for member in members(inner):
            lines += _member(member)
        lines += ["};", ""]
    return "\n".join(lines)


def _enumeration(named: type[Values]) -> list[str]:
    lines = [f"enum {named.__name__} {{"]
    for value in named:
        desc = " ".join(_desc(value.doc, ""))
        lines.append(f"    \\{value.name} = 0x{value:x}{f' {{ {desc} }}' if desc else ''};")
    return [*lines, "};", ""]


def _desc(doc: str, indent: str) -> list[str]:
    text = " ".join(doc.split()).replace("\\", "\\\\").replace('"', '\\"')
    return [f'{indent}desc = "{text}";'] if text else []


def _array(dimensions: tuple[int, ...], offset: int, stride: int) -> str:
    sizes = "".join(f"[{n}]" for n in dimensions)
    return f"{sizes} @ 0x{offset:x}" + (f" += 0x{stride:x}" if dimensions else "")


def _member(member: Register | Part) -> list[str]:
    if isinstance(member, RamArea):
        sw = "rw" if member.mode is Mode.RW else "r"
        size = f"mementries = {member.size}; memwidth = 8; sw = {sw};"
        return [
            "    external mem {",
            *_desc(member.doc, "        "),
            f"        {size}",
            f"    }} \\{member.name} @ 0x{member.offset:x};",
        ]
    if isinstance(member, RegisterFile | FileArray):
        at = _array(member.dimensions, member.offset, member.stride)
        return [f"    {member.of.__name__} \\{member.name}{at};"]
    register = member.register if isinstance(member, Array) else member
    assert isinstance(register, Register)
    at = (
        _array(member.dimensions, member.offset, member.stride)
        if isinstance(member, Array)
        else f" @ 0x{register.offset:x}"
    )
    lines = ["    reg {", *_desc(register.doc, "        "), f"        regwidth = {register.width};"]
    lines += [line for field in _fields(register) for line in _field(register, field)]
    return [*lines, f"    }} \\{member.name}{at};"]


def _fields(register: Register) -> list[Field]:
    """The fields, and one for each run of bits without a field, unless these are what a field-less bit is anyway."""
    if not register.fields:
        return [Field(0, register.width - 1, None, "", WHOLE)]
    found, at = [], 0
    for field in (*register.fields, Field(register.width, register.width)):
        if at < field.lo:
            rest = Field(at, field.lo - 1, None, "", f"BITS_{field.lo - 1}_{at}")
            if register.mode not in (Mode.RO, Mode.RESERVED) or register.reset & rest.mask:
                found.append(rest)
        if field.lo < register.width:
            found.append(field)
        at = field.hi + 1
    return found


def _field(register: Register, field: Field) -> list[str]:
    mode, reset = field.mode or register.mode, field.of(register.reset)
    write, read = mode.write, mode.read
    if write is Write.PASSES:
        properties = ["sw = w", "hw = r"]
    elif write is Write.NOTHING:
        properties = ["sw = r", "hw = w"]
    else:
        properties = ["sw = rw", "hw = rw"]
    if write in _ON_WRITE:
        properties.append(f"onwrite = {_ON_WRITE[write]}")
    if read is not Read.NOTHING:
        properties.append(f"onread = {'rclr' if read is Read.CLEARS else 'rset'}")
    if read is not Read.NOTHING and write is Write.NOTHING:
        properties[1] = "hw = rw"
    if field.values is not None:
        properties.append(f"encode = {field.values.__name__}")
    text = "; ".join(properties)
    value = "" if write is Write.PASSES else f" = 0x{reset:x}"
    return [
        "        field {",
        *_desc(field.doc, "            "),
        f"            {text};",
        f"        }} \\{field.name}[{field.hi}:{field.lo}]{value};",
    ]
