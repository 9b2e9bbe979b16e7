"""VIOT and DMAR, decoded byte by byte by code of this file's own, and by ACPICA's iasl."""

from __future__ import annotations

import itertools
import re
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from vmodel.errors import ConfigError
from vmodel.guest.artifacts import find_iasl
from vmodel.iommu.capabilities import RegionType, ReservedRegion
from vmodel.machine import Machine, load, parse
from vmodel.patience import patience
from vmodel.span import Span

EXAMPLES = Path(__file__).parents[2] / "examples"
VIOMMU, VTD = "virtio-iommu", "vt-d"
VTD_BASE = 0xE000_0000
#: What SeaBIOS and Linux know of the bridges in `BRIDGED`: the bus behind each requester id.
SECONDARY = {0x20: 1, 0x100: 2, 0x200: 3, 0x208: 4, 0x28: 5, 0x500: 6, 0x608: 7, 0x30: 8, 0x40: 9}
BRIDGES = (
    ("rp0", "root-port", "00:04.0"),
    ("up", "switch-upstream", "01:00.0"),
    ("down0", "switch-downstream", "02:00.0"),
    ("down1", "switch-downstream", "02:01.0"),
    ("rp1", "root-port", "00:05.0"),
    ("to-pci", "pcie-to-pci", "05:00.0"),
    ("below", "pci-bridge", "06:01.0"),
    ("rp2", "root-port", "00:06.0"),
    ("flat", "pci-bridge", "00:08.0"),
)
#: "out" are those that no IOMMU covers.
DEVICES = {
    "x": "03:00.0",
    "out0": "04:00.0",
    "c": "06:02.0",
    "d": "07:03.0",
    "out1": "08:00.0",
    "e0": "00:07.0",
    "e1": "00:07.1",
    "f": "09:01.0",
}
OUTSIDE = {0x400, 0x800}


def bridged(kind: str) -> Machine:
    """Bridges of every kind; two devices are not behind the IOMMU."""
    text = f'[machine]\nname = "m"\n[[iommu]]\nname = "i"\nkind = "{kind}"\naddress = "0000:00:02.0"\n'
    for number, (name, bridge, address) in enumerate(BRIDGES, 1):
        text += f'[[bridge]]\nname = "{name}"\nkind = "{bridge}"\naddress = "0000:{address}"\nsecondary = {number}\n'
    for name, address in DEVICES.items():
        text += f'[[device]]\nname = "{name}"\nmodel = "edu"\naddress = "0000:{address}"\n'
        text += 'iommu = "none"\n' if name.startswith("out") else ""
    return parse(text, Path("m.toml"))


def two(first: str, second: str) -> str:
    """Two units; edu "a" is behind the first, "b" behind the second."""
    text = '[machine]\nname = "m"\n'
    for n, kind in enumerate((first, second)):
        text += f'[[iommu]]\nname = "i{n}"\nkind = "{kind}"\naddress = "0000:00:0{n + 1}.0"\n'
        text += f'covers = ["0000:00:0{n + 5}.0"]\n'
    for n, name in enumerate("ab"):
        text += f'[[device]]\nname = "{name}"\nmodel = "edu"\naddress = "0000:00:0{n + 5}.0"\n'
    return text


def tables(machine: Machine) -> dict[str, bytes]:
    found = machine.acpi_tables()
    machine.close()
    return found


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


def with_ats() -> Machine:
    text = (EXAMPLES / "edu-vtd.toml").read_text()
    return parse(text.replace("[[device]]", "params = { ats = true }\n[[device]]", 1), Path("m.toml"))


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


def described(tmp_path: Path) -> bytes:
    """DMAR of a machine with a namespace device, and a region that two devices need 1:1."""
    text = (EXAMPLES / "edu-vtd.toml").read_text()
    text = text.replace(
        'address = "0000:00:02.0"\n',
        'address = "0000:00:02.0"\nparams = { namespace = { "\\\\_SB.UART" = "0000:00:1e.5" } }\n',
    )
    machine = parse(text, tmp_path / "m.toml")
    machine.system["edu0"].reserved.append(ReservedRegion(Span(0x7000_0800, 0x7000_1FFF), RegionType.DIRECT))
    return tables(machine)["DMAR"]


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


@pytest.mark.slow
def test_iasl_reads_rmrr_and_andd(tmp_path: Path) -> None:
    assert complaints(tmp_path, described(tmp_path)) == []
    text = (tmp_path / "table.dsl").read_text()
    assert "Reserved Memory Region" in text and "0000000070001FFF" in text
    assert "_SB.UART" in text


# ---- iasl --------------------------------------------------------------------------------------------


def iasl(folder: Path, *arguments: str) -> str:
    """What it says."""
    line = [str(find_iasl()), *arguments]
    done = subprocess.run(
        line, cwd=folder, capture_output=True, text=True, timeout=patience(60), stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done
    return done.stdout + done.stderr


def complaints(folder: Path, table: bytes) -> list[str]:
    """The lines in which iasl is not content with a table."""
    (folder / "table.bin").write_bytes(table)
    said = iasl(folder, "-d", "-p", "table", "table.bin") + (folder / "table.dsl").read_text()
    assert " decoded" in said
    return [
        line for line in said.splitlines() if re.search(r"(?i)warning|error|incorrect|unknown|invalid|\*\*\*", line)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "what", ["edu-viommu", "edu-vtd", "bridged-viommu", "bridged-vtd", "two", "one of each", "ats"]
)
def test_iasl_is_content(what: str, tmp_path: Path) -> None:
    """It decodes the table without a warning, and makes the same bytes of what it has decoded."""
    if what.startswith("bridged"):
        machine = bridged(VIOMMU if what.endswith("viommu") else VTD)
    elif what in ("two", "one of each"):
        machine = parse(two(VIOMMU, VIOMMU if what == "two" else VTD), tmp_path / "m.toml")
    elif what == "ats":
        machine = with_ats()
    else:
        machine = load(EXAMPLES / f"{what}.toml")
    for table in tables(machine).values():
        assert complaints(tmp_path, table) == []
        assert "0 Errors, 0 Warnings, 0 Remarks" in iasl(tmp_path, "-p", "again", "table.dsl")
        again = (tmp_path / "again.aml").read_bytes()
        own = {9, *range(28, 36)}  # the checksum, and who has compiled it: that is iasl now
        assert len(again) == len(table)
        assert [n for n in range(len(table)) if table[n] != again[n] and n not in own] == []


@pytest.mark.slow
@pytest.mark.parametrize(("at", "value", "says"), [(9, 0, "Incorrect checksum"), (48, 9, "Unknown")])
def test_iasl_would_complain(at: int, value: int, says: str, tmp_path: Path) -> None:
    table = bytearray(tables(load(EXAMPLES / "edu-viommu.toml"))["VIOT"])
    table[at] = value
    assert any(says in line for line in complaints(tmp_path, bytes(table)))
