"""DMAR: VT-d remapping units and what is behind them (VT-d specification, chapter 8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from construct import Bytes, Const, GreedyBytes, Int8ul, Int16ul, Int64ul, Padding, Struct

from vmodel.acpi.table import table

_Head = Struct("host_address_width" / Int8ul, "flags" / Int8ul, Padding(10))
_Scope = Struct(
    "type" / Int8ul,  # 1: a PCI endpoint, 2: a bridge with all that is below
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


Way = tuple[int, Sequence[tuple[int, int]]]


@dataclass(frozen=True)
class Unit:
    """A remapping unit: where its registers are, and the way to each device behind it, from a root bus down.

    A way is the number of the root bus and a (device, function) for each step.  What is below a bridge of `bridges` is
    behind the unit as well.
    """

    segment: int
    base: int
    ways: Sequence[Way]
    bridges: Sequence[Way] = ()


def dmar(units: Sequence[Unit], address_width: int = 46) -> bytes:
    """The table; `address_width` of the host in bits."""
    body = _Head.build({"host_address_width": address_width - 1, "flags": 0})
    for unit in units:
        scopes = b""
        for kind, bus, way in [(2, *way) for way in unit.bridges] + [(1, *way) for way in unit.ways]:
            path = b"".join(bytes(step) for step in way)
            scopes += _Scope.build({"type": kind, "length": 6 + len(path), "start_bus": bus, "path": path})
        fields = {"length": 16 + len(scopes), "segment": unit.segment, "base": unit.base, "scopes": scopes}
        body += _Drhd.build(fields)
    return table(b"DMAR", 1, body)
