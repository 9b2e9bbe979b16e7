"""IP-XACT components (IEEE 1685-2014) as banks."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("peakrdl_ipxact", reason="needs the extra `registers`")

from vmodel.errors import ConfigError
from vmodel.modes import Mode
from vmodel.spec import load

COMPONENT = """<?xml version="1.0"?>
<ipxact:component xmlns:ipxact="http://www.accellera.org/XMLSchema/IPXACT/1685-2014">
 <ipxact:vendor>v</ipxact:vendor><ipxact:library>l</ipxact:library>
 <ipxact:name>card</ipxact:name><ipxact:version>1</ipxact:version>
 <ipxact:memoryMaps><ipxact:memoryMap><ipxact:name>regs</ipxact:name>
  <ipxact:addressBlock><ipxact:name>main</ipxact:name><ipxact:baseAddress>0x0</ipxact:baseAddress>
   <ipxact:range>0x100</ipxact:range><ipxact:width>32</ipxact:width>
   <ipxact:register><ipxact:name>STATUS</ipxact:name><ipxact:dim>2</ipxact:dim>
    <ipxact:addressOffset>0x10</ipxact:addressOffset><ipxact:size>32</ipxact:size>
    <ipxact:field><ipxact:name>DONE</ipxact:name><ipxact:description>It is done.</ipxact:description>
     <ipxact:bitOffset>0</ipxact:bitOffset>
     <ipxact:resets><ipxact:reset><ipxact:value>0x1</ipxact:value></ipxact:reset></ipxact:resets>
     <ipxact:bitWidth>1</ipxact:bitWidth><ipxact:access>read-write</ipxact:access>
     <ipxact:modifiedWriteValue>oneToClear</ipxact:modifiedWriteValue></ipxact:field>
   </ipxact:register>
  </ipxact:addressBlock></ipxact:memoryMap></ipxact:memoryMaps>
</ipxact:component>
"""


def test_a_component(tmp_path: Path) -> None:
    path = tmp_path / "card.xml"
    path.write_text(COMPONENT)
    bank = load(path)
    (name, second), done = [r.name for r in bank.registers], bank.registers[0].layout.DONE
    assert (name.rpartition(".")[2], second.rpartition(".")[2]) == ("STATUS[0]", "STATUS[1]")
    assert [(r.offset, r.reset) for r in bank.registers] == [(0x10, 1), (0x14, 1)]
    assert done.mode is Mode.W1C and done.doc == "It is done."


def test_names_of_values(tmp_path: Path) -> None:
    named = """<ipxact:enumeratedValues>
     <ipxact:enumeratedValue><ipxact:name>BUSY</ipxact:name><ipxact:value>0</ipxact:value></ipxact:enumeratedValue>
     <ipxact:enumeratedValue><ipxact:name>READY</ipxact:name><ipxact:description>Take it.</ipxact:description>
      <ipxact:value>1</ipxact:value></ipxact:enumeratedValue></ipxact:enumeratedValues>"""
    path = tmp_path / "card.xml"
    path.write_text(COMPONENT.replace("</ipxact:field>", f"{named}</ipxact:field>"))
    values = load(path).registers[0].layout.DONE.values
    assert [(v.name, int(v), v.doc) for v in values] == [("BUSY", 0, ""), ("READY", 1, "Take it.")]


@pytest.mark.parametrize("text", ["<component>", "<component></component>", COMPONENT.replace("0x10<", "ten<")])
def test_components_that_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "card.xml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
