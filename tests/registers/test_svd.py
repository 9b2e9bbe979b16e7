"""CMSIS-SVD files as banks, after the description of the format of CMSIS 5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vmodel.errors import ConfigError
from vmodel.modes import Mode
from vmodel.spec import load
from vmodel.spec.xml_tree import Element


def device(registers: str, more: str = "", head: str = "") -> str:
    return f"""<?xml version="1.0" encoding="utf-8"?>
<device schemaVersion="1.3" xmlns:xs="http://www.w3.org/2001/XMLSchema-instance">
<name>CARD</name><description>A
 card.</description>{head}
<peripherals>
<peripheral><name>UART</name><baseAddress>0x40000000</baseAddress><size>0x20</size>
<addressBlock><offset>0</offset><size>0x80</size><usage>registers</usage></addressBlock>
<registers>
{registers}
</registers></peripheral>{more}
</peripherals></device>
"""


def made(text: str, folder: Path, name: str | None = None) -> Any:
    path = folder / "card.svd"
    path.write_text(text)
    return load(path, name)


def register(name: str, at: int, rest: str = "") -> str:
    return f"<register><name>{name}</name><addressOffset>{at:#x}</addressOffset>{rest}</register>"


def field(name: str, rest: str) -> str:
    return f"<fields><field><name>{name}</name>{rest}</field></fields>"


@pytest.mark.parametrize(
    ("properties", "mode"),
    [
        ("", "RW"),
        ("<access>read-only</access>", "RO"),
        ("<access>write-only</access>", "WO"),
        ("<modifiedWriteValues>oneToClear</modifiedWriteValues>", "W1C"),
        ("<modifiedWriteValues>oneToSet</modifiedWriteValues>", "W1S"),
        ("<modifiedWriteValues>oneToToggle</modifiedWriteValues>", "W1T"),
        ("<modifiedWriteValues>zeroToClear</modifiedWriteValues>", "W0C"),
        ("<modifiedWriteValues>zeroToSet</modifiedWriteValues>", "W0S"),
        ("<modifiedWriteValues>zeroToToggle</modifiedWriteValues>", "W0T"),
        ("<modifiedWriteValues>clear</modifiedWriteValues>", "WC"),
        ("<modifiedWriteValues>set</modifiedWriteValues>", "WS"),
        ("<access>read-only</access><readAction>clear</readAction>", "RC"),
        ("<readAction>set</readAction>", "WRS"),
        ("<readAction>modifyExternal</readAction>", "RW"),
    ],
)
def test_access_modes(properties: str, mode: str, tmp_path: Path) -> None:
    """Of a field, of a register without fields, and of a register for its fields."""
    bits = "<bitOffset>4</bitOffset><bitWidth>2</bitWidth>"
    text = device(
        register("A", 0, field("F", bits + properties))
        + register("B", 4, properties)
        + register("C", 8, properties + field("F", bits))
    )
    bank = made(text, tmp_path)
    assert (bank.A.layout.F.mode or bank.A.mode) is Mode[mode] and bank.B.mode is Mode[mode] and bank.B.fields == ()
    assert (bank.C.layout.F.mode or bank.C.mode) is Mode[mode]


def values(*members: str, name: str = "", more: str = "") -> str:
    inside = "".join(f"<enumeratedValue>{member}</enumeratedValue>" for member in members)
    return f"<enumeratedValues{more}>{f'<name>{name}</name>' if name else ''}{inside}</enumeratedValues>"


def value(name: str, number: str, doc: str = "") -> str:
    return f"<name>{name}</name><description>{doc}</description><value>{number}</value>"


def names_of(field: Any) -> dict[str, int]:
    return {member.name: int(member) for member in field.values}


def test_names_of_values(tmp_path: Path) -> None:
    """enumeratedValues: numbers of all kinds; "don't care" bits and the default stand for more than one value."""
    listed = values(value("SLOW", "0", "up to 1 m"), value("FAST", "#11"), value("8bit", "0b01"), value("any", "#1x"))
    default = values("<name>rest</name><isDefault>true</isDefault>", value("in", "0x2"))
    bits = "<bitOffset>4</bitOffset><bitWidth>2</bitWidth>"
    bank = made(device(register("A", 0, field("F", bits + listed + default))), tmp_path)
    found = bank.A.layout.F.values
    assert names_of(bank.A.layout.F) == {"SLOW": 0, "FAST": 3, "n8bit": 1, "in_": 2}
    assert (found.__name__, found.SLOW.doc, found.FAST.doc) == ("F2", "up to 1 m", "")


def test_names_of_values_for_reads_and_for_writes(tmp_path: Path) -> None:
    read = values(value("IDLE", "0"), value("BUSY", "1"))
    written = values(value("NOTHING", "0"), value("START", "2"), value("BUSY", "3"))
    bits = "<bitOffset>0</bitOffset><bitWidth>2</bitWidth>"
    bank = made(device(register("A", 0, field("F", bits + read + written))), tmp_path)
    assert names_of(bank.A.layout.F) == {"IDLE": 0, "BUSY": 1, "START": 2}


def test_derived_names_of_values(tmp_path: Path) -> None:
    bits = "<bitOffset>0</bitOffset><bitWidth>2</bitWidth>"
    first = register("A", 0, field("F", bits + values(value("ON", "1"), name="Power")))
    path = values(more=' derivedFrom="UART.A.F.Power"')
    bank = made(device(first + register("B", 4, field("G", bits + path))), tmp_path)
    assert bank.B.layout.G.values is bank.A.layout.F.values
    with pytest.raises(ConfigError, match="has no enumeratedValues Powr; did you mean Power"):
        made(device(first + register("B", 4, field("G", bits + values(more=' derivedFrom="Powr"')))), tmp_path)
    itself = values(name="Power", more=' derivedFrom="Power"')
    with pytest.raises(ConfigError, match="derived from itself, by way of Power"):
        made(device(register("B", 4, field("G", bits + itself))), tmp_path)


@pytest.mark.parametrize(
    ("member", "said"),
    [(value("A", "4"), r"line \d+: F: a field of bits 0..1: F2.A = 4 does not fit"), (value("A", "x"), "is no number")],
)
def test_names_of_values_that_are_wrong(member: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        made(device(register("A", 0, field("F", "<bitRange>[1:0]</bitRange>" + values(member)))), tmp_path)


def test_what_is_inherited(tmp_path: Path) -> None:
    more = """<peripheral derivedFrom="UART"><name>UART1</name><baseAddress>0x40000100</baseAddress></peripheral>"""
    text = device(
        register("A", 0, "<description>The first.</description>")
        + register("B", 4, "<size>16</size><resetValue>0xABCD</resetValue><resetMask>0xFF</resetMask>")
        + '<register derivedFrom="B"><name>C</name><addressOffset>6</addressOffset></register>',
        more,
        "<resetValue>0x12345678</resetValue><access>read-only</access>",
    )
    bank = made(text, tmp_path)
    assert bank.__name__ == "CARDRegs" or bank.__name__ == "CardRegs"
    assert [(r.name, r.offset, r.width, r.reset, r.mode.name) for r in bank.registers] == [
        (f"{name}.{r}", base + at, width, reset, "RO")
        for name, base in (("UART", 0), ("UART1", 0x100))
        for r, at, width, reset in (("A", 0, 32, 0x12345678), ("B", 4, 16, 0xCD), ("C", 6, 16, 0xCD))
    ]
    assert bank.UART.A.doc == "The first."
    alone = made(text, tmp_path, "UART1")
    assert [r.name for r in alone.registers] == ["A", "B", "C"] and alone.size == 0x80


def test_many_that_are_derived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each base is looked up, not searched for among all: 30,000 of them took minutes."""
    looks, find = 0, Element.find

    def counted(element: Element, tag: str) -> Element | None:
        nonlocal looks
        looks += 1
        return find(element, tag)

    monkeypatch.setattr(Element, "find", counted)

    def needed(count: int) -> int:
        nonlocal looks
        looks = 0
        registers = "".join(
            f'<register derivedFrom="A"><name>B{n}</name><addressOffset>{4 * n + 4}</addressOffset></register>'
            for n in range(count)
        )
        folder = tmp_path / str(count)
        folder.mkdir()
        assert len(made(device(register("A", 0) + registers), folder, "UART").registers) == count + 1
        return looks

    assert needed(600) < 4 * needed(200)


def test_arrays_and_clusters(tmp_path: Path) -> None:
    dim = "<dim>3</dim><dimIncrement>8</dimIncrement>"
    text = device(
        register("R[%s]", 0, dim)
        + register("S%s", 0x20, dim + "<dimIndex>A-C</dimIndex>")
        + f"<cluster><name>CH[%s]</name><addressOffset>0x40</addressOffset>{dim}{register('CTRL', 4)}</cluster>"
        + register("F", 0x60, field("BIT%s", "<bitRange>[2:1]</bitRange><dim>2</dim><dimIncrement>4</dimIncrement>"))
    )
    bank = made(text, tmp_path)
    assert [(r.name, r.offset) for r in bank.registers] == [
        *((f"R[{n}]", 8 * n) for n in range(3)),
        *((f"S{letter}", 0x20 + 8 * n) for n, letter in enumerate("ABC")),
        *((f"CH[{n}].CTRL", 0x44 + 8 * n) for n in range(3)),
        ("F", 0x60),
    ]
    assert [(f.name, f.lo, f.hi) for f in bank.F.fields] == [("BIT0", 1, 2), ("BIT1", 5, 6)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (device(register("A", 0, "<access>writeOnce</access>")), "line 9: A: access writeOnce has no meaning here"),
        (device(register("A", 0, "<access>rw</access>")), "line 9: A: access has no value rw"),
        (device(register("A", 0, "<readAction>cleer</readAction>")), "has no value cleer; did you mean clear?"),
        (device(register("A", 0, "<size>24</size>")), "line 9: A: regwidth = 24"),
        (device(register("A", 0, "<size>forty</size>")), "line 9: A: <size> 'forty' is no number"),
        (device(register("A", 0, "<size>" + "9" * 5000 + "</size>")), "is no number"),
        (device(register("A", 0) + "\n" + register("B", 2, "<size>16</size>")), "overlap"),
        (device(register("A B", 0)), "the name 'A B' is no identifier"),
        (device("<register><name>A</name></register>"), "line 9: A: lacks <addressOffset>"),
        (device(register("A", 0, field("F", "<lsb>30</lsb><msb>33</msb>"))), "field F is outside its 32 bits"),
        (device(register("A", 0, field("F", "<lsb>3</lsb><msb>1</msb>"))), "bits 1:3 are not within 63:0"),
        (device(register("A%s", 0, "<dim>99999999</dim><dimIncrement>4</dimIncrement>")), "<dim> 99999999 is not 1"),
        (device(register("A", 0, "<dim>2</dim><dimIncrement>4</dimIncrement>")), "its name lacks %s"),
        (device('<register derivedFrom="Z"><name>A</name><addressOffset>0</addressOffset></register>'), "register Z"),
        (device('<register derivedFrom="A"><name>A</name><addressOffset>0</addressOffset></register>'), "from itself"),
        (
            device(
                register("A0", 0)
                + "".join(
                    f'<register derivedFrom="A{n}"><name>A{n + 1}</name><addressOffset>8</addressOffset></register>'
                    for n in range(2000)
                )
            ),
            "more than 16 elements derived from one another",
        ),
        (device(""), "no registers"),
        ("<device><name>A</name>", "line 1: is no XML"),
        ("<!DOCTYPE d [<!ENTITY a 'b'>]><device>&a;</device>", "line 1: declares entities"),
        ("<device>" + "<a>" * 5000 + "</a>" * 5000 + "</device>", "is nested too deeply"),
        ("<html></html>", "is neither IP-XACT (<component>) nor CMSIS-SVD (<device>)"),
    ],
)  # fmt: skip
def test_files_that_are_refused(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        made(text, tmp_path)
    assert said in str(caught.value) and "\n" not in str(caught.value)
