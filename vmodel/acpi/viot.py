"""VIOT: which devices are behind a virtio-iommu (ACPI 6.5, 5.2.34)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from construct import Const, Int8ul, Int16ul, Int32ul, Padding, Struct

from vmodel.acpi.table import Header, table
from vmodel.pci.topology import Bdf

_Head = Struct("node_count" / Int16ul, "node_offset" / Int16ul, Padding(8))
_PciRange = Struct(
    "type" / Const(1, Int8ul),
    Padding(1),
    "length" / Const(24, Int16ul),
    "first_endpoint" / Int32ul,
    "first_segment" / Int16ul,
    "last_segment" / Int16ul,
    "first_bdf" / Int16ul,
    "last_bdf" / Int16ul,
    "output_node" / Int16ul,
    Padding(6),
)
_PciIommu = Struct(
    "type" / Const(3, Int8ul),
    Padding(1),
    "length" / Const(16, Int16ul),
    "segment" / Int16ul,
    "bdf" / Int16ul,
    Padding(8),
)


@dataclass(frozen=True)
class PciRange:
    """The functions `first`..`last` have consecutive endpoint ids, starting at `first_endpoint`."""

    first: Bdf
    last: Bdf
    first_endpoint: int


def viot(units: Sequence[tuple[Bdf, Sequence[PciRange]]]) -> bytes:
    """Builds the table from (address of a virtio-iommu, PCI ranges behind it) pairs."""
    at = Header.sizeof() + _Head.sizeof()
    nodes, ranges = b"", b""
    count = len(units) + sum(len(behind) for _, behind in units)
    for bdf, behind in units:
        offset = at + len(nodes)
        nodes += _PciIommu.build({"segment": bdf.segment, "bdf": bdf.rid})
        for part in behind:
            ranges += _PciRange.build(
                {
                    "first_endpoint": part.first_endpoint,
                    "first_segment": part.first.segment,
                    "last_segment": part.last.segment,
                    "first_bdf": part.first.rid,
                    "last_bdf": part.last.rid,
                    "output_node": offset,
                }
            )
    return table(b"VIOT", 0, _Head.build({"node_count": count, "node_offset": at}) + nodes + ranges)
