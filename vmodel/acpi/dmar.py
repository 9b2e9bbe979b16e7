"""DMAR: VT-d remapping units and the devices behind them (VT-d specification, chapter 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from construct import Bytes, Const, CString, GreedyBytes, Int8ul, Int16ul, Int64ul, Padding, Struct

from vmodel.acpi.table import table
from vmodel.span import Span

_ENDPOINT, _HIERARCHY, _NAMESPACE = 1, 2, 5
_Head = Struct("host_address_width" / Int8ul, "flags" / Int8ul, Padding(10))
_Scope = Struct(
    "type" / Int8ul,
    "length" / Int8ul,
    Padding(2),
    "enumeration_id" / Int8ul,  # of a namespace device: the number in its ANDD structure
    "start_bus" / Int8ul,
    "path" / GreedyBytes,
)
_Drhd = Struct(
    "type" / Const(0, Int16ul),
    "length" / Int16ul,
    "flags" / Const(0, Int8ul),
    "size" / Const(0, Int8ul),  # 4 KiB
    "segment" / Int16ul,
    "base" / Int64ul,
    "scopes" / Bytes(lambda this: this.length - 16),
)
_Rmrr = Struct(
    "type" / Const(1, Int16ul),
    "length" / Int16ul,
    Padding(2),
    "segment" / Int16ul,
    "base" / Int64ul,
    "limit" / Int64ul,  # the last byte
    "scopes" / Bytes(lambda this: this.length - 24),
)
_Atsr = Struct(
    "type" / Const(2, Int16ul),
    "length" / Const(8, Int16ul),
    "flags" / Const(1, Int8ul),  # all root ports
    Padding(1),
    "segment" / Int16ul,
)
_Andd = Struct(
    "type" / Const(4, Int16ul),
    "length" / Int16ul,
    Padding(3),
    "number" / Int8ul,
    "name" / CString("ascii"),
)


@dataclass(frozen=True)
class Scope:
    """Device scope (8.3.1): the root bus number, then (device, function) of each bridge down to the device.

    A bridge (`hierarchy`) covers all devices behind it as well.  With a `name` the scope is a device of the ACPI
    namespace instead of a PCI function, and bus and path give the source-id of its requests.
    """

    bus: int
    path: Sequence[tuple[int, int]]
    hierarchy: bool
    name: str = ""


@dataclass(frozen=True)
class Reserved:
    """Memory that must be mapped 1:1 for the devices in `scopes` (RMRR, 8.4); `span` is in whole pages."""

    segment: int
    span: Span
    scopes: Sequence[Scope]


@dataclass(frozen=True)
class RemappingUnit:
    """A remapping unit (DRHD): `base` is the address of its registers, `scopes` are the devices behind it.

    `ats`: those devices may have TLBs of their own (ATSR).
    """

    segment: int
    base: int
    scopes: Sequence[Scope]
    ats: bool = False


def dmar(units: Sequence[RemappingUnit], reserved: Sequence[Reserved] = (), address_width: int = 46) -> bytes:
    """Builds the table.  `address_width` is the host's, in bits.  Structures are ordered by type (8.1)."""
    named = list(dict.fromkeys(scope.name for unit in units for scope in unit.scopes if scope.name))
    numbers = {name: number for number, name in enumerate(named, 1)}
    body = _Head.build({"host_address_width": address_width - 1, "flags": 0})
    for unit in units:
        scopes = _scopes(unit.scopes, numbers)
        fields = {"length": 16 + len(scopes), "segment": unit.segment, "base": unit.base, "scopes": scopes}
        body += _Drhd.build(fields)
    for part in reserved:
        scopes = _scopes(part.scopes, numbers)
        where = {"segment": part.segment, "base": part.span.start, "limit": part.span.last}
        body += _Rmrr.build({**where, "length": 24 + len(scopes), "scopes": scopes})
    for segment in sorted({unit.segment for unit in units if unit.ats}):
        body += _Atsr.build({"segment": segment})
    for name, number in numbers.items():
        body += _Andd.build({"length": 8 + len(name) + 1, "number": number, "name": name})
    return table(b"DMAR", 1, body)


def _scopes(scopes: Sequence[Scope], numbers: Mapping[str, int]) -> bytes:
    built = b""
    for scope in scopes:
        path = b"".join(bytes(step) for step in scope.path)
        kind = _NAMESPACE if scope.name else _HIERARCHY if scope.hierarchy else _ENDPOINT
        fields = {"length": 6 + len(path), "start_bus": scope.bus, "path": path}
        built += _Scope.build({"type": kind, "enumeration_id": numbers.get(scope.name, 0), **fields})
    return built
