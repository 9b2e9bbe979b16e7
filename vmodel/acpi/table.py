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

#: Where the checksum is.
_CHECKSUM = 9


def table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A whole table: header, `body`, and a checksum that makes all bytes add up to 0."""
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
