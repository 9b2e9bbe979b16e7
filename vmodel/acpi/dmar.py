"""DMAR: VT-d remapping units and what is behind them (VT-d specification, chapter 8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from construct import Bytes, Const, GreedyBytes, Int8ul, Int16ul, Int64ul, Padding, Struct

from vmodel.acpi.table import table

_ENDPOINT, _HIERARCHY = 1, 2
_Head = Struct("host_address_width" / Int8ul, "flags" / Int8ul, Padding(10))
_Scope = Struct(
    "type" / Int8ul,
    "length" / Int8ul,
    Padding(2),
    "enumeration_id" / Const(0, Int8ul),
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
_Atsr = Struct(
    "type" / Const(2, Int16ul),
    "length" / Const(8, Int16ul),
    "flags" / Const(1, Int8ul),  # all root ports
    Padding(1),
    "segment" / Int16ul,
)


@dataclass(frozen=True)
class Scope:
    """The way to a device: the number of the root bus, then (device, function) for each step down.

    A bridge (`hierarchy`) stands for all that is behind it as well.
    """

    bus: int
    path: Sequence[tuple[int, int]]
    hierarchy: bool


@dataclass(frozen=True)
class Unit:
    """A remapping unit: where its registers are, and what is behind it; `ats`: that may have TLBs of its own."""

    segment: int
    base: int
    scopes: Sequence[Scope]
    ats: bool = False


def dmar(units: Sequence[Unit], address_width: int = 46) -> bytes:
    """The table; `address_width` of the host in bits."""
    body = _Head.build({"host_address_width": address_width - 1, "flags": 0})
    for unit in units:
        scopes = b""
        for scope in unit.scopes:
            path = b"".join(bytes(step) for step in scope.path)
            kind = _HIERARCHY if scope.hierarchy else _ENDPOINT
            scopes += _Scope.build({"type": kind, "length": 6 + len(path), "start_bus": scope.bus, "path": path})
        fields = {"length": 16 + len(scopes), "segment": unit.segment, "base": unit.base, "scopes": scopes}
        body += _Drhd.build(fields)
    for segment in sorted({unit.segment for unit in units if unit.ats}):
        body += _Atsr.build({"segment": segment})
    return table(b"DMAR", 1, body)
