"""The header that all ACPI tables have, and their checksum (ACPI 6.5, 5.2.6)."""

from __future__ import annotations

from construct import Bytes, Int8ul, Int32ul, Struct

Header = Struct(
    "signature" / Bytes(4),
    "length" / Int32ul,
    "revision" / Int8ul,
    "checksum" / Int8ul,
    "oem_id" / Bytes(6),
    "oem_table_id" / Bytes(8),
    "oem_revision" / Int32ul,
    "creator_id" / Bytes(4),
    "creator_revision" / Int32ul,
)

#: Offset of the checksum.
_CHECKSUM = 9


def table(signature: bytes, revision: int, body: bytes) -> bytes:
    """Builds a table: the header, then `body`.  The checksum makes the sum of all bytes 0 modulo 256."""
    fields = {
        "signature": signature,
        "length": Header.sizeof() + len(body),
        "revision": revision,
        "checksum": 0,
        "oem_id": b"VMODEL",
        "oem_table_id": signature.ljust(8, b" "),
        "oem_revision": 1,
        "creator_id": b"VMDL",
        "creator_revision": 1,
    }
    whole: bytes = Header.build(fields) + body
    return whole[:_CHECKSUM] + bytes([-sum(whole) % 256]) + whole[_CHECKSUM + 1 :]
