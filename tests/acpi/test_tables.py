"""VIOT and DMAR, decoded byte by byte by code of this file's own."""

from __future__ import annotations

import itertools
import re
import struct
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.acpi.machines import (
    DEVICES,
    EXAMPLES,
    OUTSIDE,
    SECONDARY,
    VIOMMU,
    VTD,
    VTD_BASE,
    bridged,
    described,
    tables,
    two,
    with_ats,
)
from vmodel.errors import ConfigError
from vmodel.machine import load, parse

# ---- the tests' own decoders: ACPI 6.5, 5.2.6 and 5.2.34; VT-d specification 4.1, chapter 8 -----------


def body(table: bytes, signature: bytes, revision: int) -> bytes:
    """What follows the header, which must be right."""
    assert sum(table) % 256 == 0
    assert table[0:4] == signature
    assert int.from_bytes(table[4:8], "little") == len(table)
    assert table[8] == revision
    assert table[10:16] == b"VMODEL"
    assert table[16:24] == signature + b"    "
    assert table[24:36] == b"\1\0\0\0VMDL\1\0\0\0"
    return table[36:]


class Range(NamedTuple):
    """A PCI range node."""

    endpoint: int
    first: int
    last: int
    unit: int


def decode_viot(table: bytes) -> tuple[dict[int, int], list[Range]]:
    """The units (offset of the node: requester id), and the ranges."""
    rest = body(table, b"VIOT", 0)
    count, at = struct.unpack("<HH", rest[:4])
    assert rest[4:12] == bytes(8) and at == 48
    units: dict[int, int] = {}
    ranges = []
    for _ in range(count):
        kind, zero, length = struct.unpack_from("<BBH", table, at)
        node = table[at : at + length]
        assert len(node) == length and zero == 0
        if kind == 3:
            segment, rid = struct.unpack("<HH", node[4:8])
            assert (length, segment, node[8:]) == (16, 0, bytes(8))
            units[at] = rid
        else:
            assert (kind, length, node[18:]) == (1, 24, bytes(6))
            endpoint, first_segment, last_segment, first, last, unit = struct.unpack("<IHHHHH", node[4:18])
            assert (first_segment, last_segment) == (0, 0) and first <= last
            ranges.append(Range(endpoint, first, last, unit))
        at += length
    assert at == len(table)
    assert all(part.unit in units for part in ranges)
    return units, ranges


def ids(ranges: list[Range]) -> list[int]:
    """The requester ids; that of a function is its endpoint id as well."""
    assert all(part.endpoint == part.first for part in ranges)
    return [rid for part in ranges for rid in range(part.first, part.last + 1)]


class Scope(NamedTuple):
    """A device scope; 1 is an endpoint, 2 a bridge with what is behind it."""

    kind: int
    path: tuple[tuple[int, int], ...]


def decode_dmar(table: bytes) -> list[tuple[int, list[Scope]]]:
    """The base of each unit and its scopes."""
    rest = body(table, b"DMAR", 1)
    assert rest[:12] == b"\x2d" + bytes(11)  # 46 bits; no interrupt remapping, no opt-outs
    units = []
    at = 48
    while at < len(table):
        kind, length, flags, size, segment, base = struct.unpack_from("<HHBBHQ", table, at)
        assert (kind, flags, size, segment) == (0, 0, 0, 0)
        end, at = at + length, at + 16
        assert end <= len(table)
        scopes = []
        while at < end:
            scope, size, reserved, enumeration, bus = struct.unpack_from("<BBHBB", table, at)
            path = table[at + 6 : at + size]
            assert size >= 8 and size % 2 == 0 and at + size <= end
            assert (reserved, enumeration, bus) == (0, 0, 0)
            scopes.append(Scope(scope, tuple(zip(path[0::2], path[1::2], strict=True))))
            at += size
        assert at == end
        units.append((base, scopes))
    return units


def reached(scope: Scope, everything: set[int]) -> set[int]:
    """The requester ids among `everything` that a scope stands for, as firmware's bus numbers have it."""
    bus, rid = 0, 0
    for n, (device, function) in enumerate(scope.path):
        bus = SECONDARY[rid] if n else 0
        rid = bus << 8 | device << 3 | function
    assert rid in everything and (rid in SECONDARY) == (scope.kind == 2)
    found, buses = {rid}, {SECONDARY[rid]} if scope.kind == 2 else set()
    while more := {other for other in everything if other >> 8 in buses} - found:
        found |= more
        buses |= {SECONDARY[other] for other in more if other in SECONDARY}
    return found


def rid_of(address: str) -> int:
    bus, device, function = (int(part, 16) for part in re.split("[:.]", address))
    return bus << 8 | device << 3 | function


ENDPOINTS = {rid_of(address) for name, address in DEVICES.items() if not name.startswith("out")}
EVERYTHING = {rid_of(address) for address in DEVICES.values()} | set(SECONDARY)

# ---- VIOT --------------------------------------------------------------------------------------------


def test_viot_of_the_example() -> None:
    """To the byte."""
    found = tables(load(EXAMPLES / "edu-viommu.toml"))
    assert list(found) == ["VIOT"]
    head = b"VIOT\x58\0\0\0\0\xc2VMODELVIOT    \1\0\0\0VMDL\1\0\0\0"
    nodes = b"\3\0\x10\0\0\0\x10\0" + bytes(8) + b"\1\0\x18\0\x18\0\0\0\0\0\0\0\x18\0\x18\0\x30\0" + bytes(6)
    assert found["VIOT"] == head + b"\2\0\x30\0" + bytes(8) + nodes


def test_viot_covers_every_id_of_every_endpoint() -> None:
    """Its own, those that bridges put in its place; each once, neighbours in one range."""
    found = tables(bridged(VIOMMU))
    assert list(found) == ["VIOT"]
    units, ranges = decode_viot(found["VIOT"])
    assert units == {48: 0x10}
    covered = ids(ranges)
    assert len(covered) == len(set(covered))
    # PCIe-to-PCI bridges take ownership with devfn 0 of their secondary bus.
    assert set(covered) == (EVERYTHING - OUTSIDE) | {0x600}
    assert set(covered) >= ENDPOINTS and not (OUTSIDE | {0x10}) & set(covered)
    assert Range(0x38, 0x38, 0x39, 48) in ranges
    assert all(a.last + 1 < b.first for a, b in itertools.pairwise(ranges))


def test_viot_of_two_units() -> None:
    units, ranges = decode_viot(tables(parse(two(VIOMMU, VIOMMU), Path("m.toml")))["VIOT"])
    assert sorted(units.values()) == [0x08, 0x10]
    assert [(units[part.unit], part.first, part.last) for part in ranges] == [(0x08, 0x28, 0x28), (0x10, 0x30, 0x30)]
    ids(ranges)


def test_viot_with_endpoint_ids_of_the_files_own() -> None:
    text = (EXAMPLES / "edu-viommu.toml").read_text()
    text = text.replace(
        'address = "0000:00:02.0"\n', 'address = "0000:00:02.0"\nparams = { first_endpoint = 0x1000 }\n'
    )
    _, ranges = decode_viot(tables(parse(text, Path("m.toml")))["VIOT"])
    assert ranges == [Range(0x1018, 0x18, 0x18, 48)]


# ---- DMAR --------------------------------------------------------------------------------------------


def test_dmar_of_the_example() -> None:
    """To the byte."""
    found = tables(load(EXAMPLES / "edu-vtd.toml"))
    assert list(found) == ["DMAR"]
    head = b"DMAR\x48\0\0\0\1\xc2VMODELDMAR    \1\0\0\0VMDL\1\0\0\0\x2d\0" + bytes(10)
    assert found["DMAR"] == head + b"\0\0\x18\0\0\0\0\0\0\0\0\xe0\0\0\0\0" + b"\1\x08\0\0\0\0\3\0"


def test_dmar_with_ats() -> None:
    """One ATSR more: below all root ports of segment 0 there may be devices with TLBs."""
    plain = tables(load(EXAMPLES / "edu-vtd.toml"))["DMAR"]
    assert tables(with_ats())["DMAR"][36:] == plain[36:] + b"\2\0\x08\0\1\0\0\0"


def test_dmar_scopes() -> None:
    """A bridge stands for all behind it; where something behind it is outside, the others are listed by their paths."""
    found = tables(bridged(VTD))
    assert list(found) == ["DMAR"]
    ((base, scopes),) = decode_dmar(found["DMAR"])
    assert base == VTD_BASE
    assert sorted(scopes) == [
        Scope(1, ((7, 0),)),
        Scope(1, ((7, 1),)),
        Scope(2, ((4, 0), (0, 0), (0, 0))),
        Scope(2, ((5, 0),)),
        Scope(2, ((8, 0),)),
    ]
    everywhere = [reached(scope, EVERYTHING) for scope in scopes]
    together = set().union(*everywhere)
    assert sum(map(len, everywhere)) == len(together), "nothing twice"
    assert together >= ENDPOINTS and not together & OUTSIDE
    assert {rid for rid in together if rid not in SECONDARY} == ENDPOINTS


def test_dmar_of_two_units_is_refused() -> None:
    """Their registers would be at one address."""
    with pytest.raises(ConfigError) as caught:
        parse(two(VTD, VTD), Path("m.toml"))
    assert str(caught.value) == (
        "m.toml: iommu[1].address: a guest can drive one vt-d only, and 'i0' is one: leave one of the addresses out"
    )


def test_a_unit_of_each_kind() -> None:
    found = tables(parse(two(VIOMMU, VTD), Path("m.toml")))
    assert sorted(found) == ["DMAR", "VIOT"]
    units, ranges = decode_viot(found["VIOT"])
    assert (units, ids(ranges)) == ({48: 0x08}, [0x28])
    assert decode_dmar(found["DMAR"]) == [(VTD_BASE, [Scope(1, ((6, 0),))])]


def test_dmar_says_which_memory_and_namespace_devices_there_are(tmp_path: Path) -> None:
    """VT-d 8.3.1 scope 5, 8.4 RMRR, 8.7 ANDD; structures in the order of their types."""
    table = described(tmp_path)
    rest = body(table, b"DMAR", 1)[12:]
    structures = []
    while rest:
        kind, length = struct.unpack_from("<HH", rest)
        structures.append((kind, rest[4:length]))
        rest = rest[length:]
    assert [kind for kind, _ in structures] == [0, 1, 4]
    edu, uart = b"\1\x08\0\0\0\0\x03\0", b"\5\x08\0\0\1\0\x1e\5"
    assert structures[0][1][12:] == edu + uart
    assert structures[1][1] == bytes(4) + struct.pack("<QQ", 0x7000_0000, 0x7000_1FFF) + edu
    assert structures[2][1] == bytes(3) + b"\1" + b"\\_SB.UART\0"
