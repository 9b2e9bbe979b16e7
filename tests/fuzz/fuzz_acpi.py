"""ACPI tables of machines of any shape: lengths, checksums, and every entry within its table (DMAR, VIOT)."""

from __future__ import annotations

import struct
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["vmodel.machine", "vmodel.acpi"]):
    from vmodel.errors import ConfigError
    from vmodel.machine import parse

from tests.fuzz.harness import Input, fuzz

KINDS = ["vt-d", "virtio-iommu", "vt-d", "virtio-iommu", "amd-vi", "smmu-v3"]
BRIDGES = ["root-port", "switch-upstream", "switch-downstream", "pcie-to-pci", "pci-bridge"]
#: Bytes before the first entry: the header, and what each table has besides (VT-d 8.1; ACPI 6.5, 5.2.29).
HEADS = {"DMAR": 48, "VIOT": 48}


def address(source: Input) -> str:
    """Of a function."""
    where = source.number(2)
    return f"0000:{where >> 8 & 7:02x}:{where >> 3 & 31:02x}.{where & 7 if where & 0x8000 else 0}"


def machine(source: Input) -> str:
    """A machine file."""
    text = '[machine]\nname = "m"\n'
    shape = source.number(1)
    for n in range(shape & 3):
        what = source.number(1)
        text += f'[[iommu]]\nname = "i{n}"\nkind = "{KINDS[what % len(KINDS)]}"\naddress = "{address(source)}"\n'
        if what & 0x40:
            text += f'covers = ["{address(source)}", "{address(source)}-{address(source)}"]\n'
        if what & 0x80:
            text += f"capabilities = {{ input_bits = {source.number(1) & 63} }}\n"
            text += f"params = {{ scalable = {str(bool(what & 0x20)).lower()} }}\n"
    for n in range(shape >> 2 & 7):
        kind = BRIDGES[source.number(1) % len(BRIDGES)]
        text += f'[[bridge]]\nname = "b{n}"\nkind = "{kind}"\naddress = "{address(source)}"\nsecondary = {n + 1}\n'
    for n in range(shape >> 5):
        text += f'[[device]]\nname = "d{n}"\nmodel = "edu"\naddress = "{address(source)}"\n'
        if source.number(1) & 1:
            text += 'iommu = "none"\n'
    return text


def check(name: str, table: bytes) -> None:
    """A table by its own words."""
    assert table[:4].decode() == name and sum(table) % 256 == 0
    assert struct.unpack_from("<I", table, 4)[0] == len(table)
    at = HEADS[name]
    if name == "VIOT":
        count, at = struct.unpack_from("<HH", table, 36)
    found = 0
    while at < len(table):
        length = struct.unpack_from("<H", table, at + 2)[0]
        assert length >= 4 and at + length <= len(table), f"{name}: an entry at {at} of {length} bytes"
        if name == "DMAR":
            scopes(table[at : at + length])
        at += length
        found += 1
    assert at == len(table) and (name != "VIOT" or found == count)


def scopes(entry: bytes) -> None:
    """Device scopes of a DRHD, RMRR or ATSR (8.3.1)."""
    at = {0: 16, 1: 24, 2: 8}.get(struct.unpack_from("<H", entry)[0])
    while at is not None and at < len(entry):
        length = entry[at + 1]
        assert length >= 8 and length % 2 == 0 and at + length <= len(entry)
        at += length


def one_input(data: bytes) -> None:
    """A machine; most are refused for a reason."""
    try:
        made = parse(machine(Input(data)), Path("m.toml"))
    except ConfigError:
        return
    try:
        for name, table in made.acpi_tables().items():
            check(name, table)
    except ConfigError as error:
        assert str(error)
    finally:
        made.close()


if __name__ == "__main__":
    fuzz(one_input)
