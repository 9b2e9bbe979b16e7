"""Banks as CMSIS-SVD, for debuggers and for other tools that read registers."""

from __future__ import annotations

from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from vmodel.fields import Field
from vmodel.modes import Mode, Read, Write
from vmodel.register_files import Array, FileArray, RamArea, RegisterFile
from vmodel.regs import Register, RegisterBank
from vmodel.spec.walk import members

_WRITES = {
    Write.ONE_CLEARS: "oneToClear",
    Write.ONE_SETS: "oneToSet",
    Write.ONE_TOGGLES: "oneToToggle",
    Write.ZERO_CLEARS: "zeroToClear",
    Write.ZERO_SETS: "zeroToSet",
    Write.ZERO_TOGGLES: "zeroToToggle",
    Write.CLEARS: "clear",
    Write.SETS: "set",
}


def svd_text(name: str, doc: str, places: list[tuple[int, type[RegisterBank]]]) -> str:
    """A device with a peripheral for each of `places`: (address, bank).  Arrays are written out; SVD has no RAM."""
    device = Element("device", schemaVersion="1.3")
    _texts(device, name=name, version="1", description=doc, addressUnitBits="8", width="32")
    peripherals = SubElement(device, "peripherals")
    for at, bank in places:
        peripheral = SubElement(peripherals, "peripheral")
        _texts(peripheral, name=bank.__name__, description=bank.__doc__ or "", baseAddress=f"0x{at:X}")
        _texts(SubElement(peripheral, "addressBlock"), offset="0", size=f"0x{bank.size:X}", usage="registers")
        _members(SubElement(peripheral, "registers"), bank)
    ElementTree.indent(device)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ElementTree.tostring(device, encoding="unicode")}\n'


def _texts(parent: Element, **texts: str) -> None:
    for tag, text in texts.items():
        if text:
            SubElement(parent, tag).text = " ".join(text.split())


def _members(parent: Element, bank: type[RegisterBank]) -> None:
    for member in members(bank):
        if isinstance(member, RegisterFile | FileArray):
            for n, (name, at) in enumerate(member.elements()):
                cluster = SubElement(parent, "cluster")
                _texts(cluster, name=_flat(name), description=member.of.__doc__ or "" if not n else "")
                _texts(cluster, addressOffset=f"0x{at:X}")
                _members(cluster, member.of)
        elif isinstance(member, Array):
            for register in member.registers():
                _register(parent, register)
        elif isinstance(member, Register):
            _register(parent, member)
        else:
            assert isinstance(member, RamArea)


def _flat(name: str) -> str:
    """An element's name as an identifier: "BELL[2][3]" gives "BELL_2_3"."""
    return name.replace("][", "_").replace("[", "_").replace("]", "")


def _register(parent: Element, register: Register) -> None:
    element = SubElement(parent, "register")
    _texts(element, name=_flat(register.name), description=register.doc, addressOffset=f"0x{register.offset:X}")
    _texts(element, size=str(register.width), resetValue=f"0x{register.reset:X}")
    if not register.fields:
        _access(element, register.mode)
        return
    fields = SubElement(element, "fields")
    for field in register.fields:
        _field(SubElement(fields, "field"), field, field.mode or register.mode)


def _field(element: Element, field: Field, mode: Mode) -> None:
    _texts(element, name=field.name, description=field.doc, bitOffset=str(field.lo))
    _texts(element, bitWidth=str(field.hi - field.lo + 1))
    _access(element, mode)
    if field.values is not None:
        values = SubElement(element, "enumeratedValues")
        _texts(values, name=field.values.__name__)
        for value in field.values:
            named = SubElement(values, "enumeratedValue")
            _texts(named, name=value.name, description=value.doc, value=f"0x{value:X}")


def _access(element: Element, mode: Mode) -> None:
    names = {Write.PASSES: "write-only", Write.NOTHING: "read-only"}
    _texts(element, access=names.get(mode.write, "read-write"), modifiedWriteValues=_WRITES.get(mode.write, ""))
    _texts(element, readAction={Read.CLEARS: "clear", Read.SETS: "set"}.get(mode.read, ""))
