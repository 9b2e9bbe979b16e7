"""Programs and libraries that are made here."""

from __future__ import annotations

import struct


def elf(*names: str, base: int = 0x400000, loader: str = "") -> bytes:
    """A minimal ELF64 that is loaded at `base` and needs these libraries, and a loader if one is named."""
    strings = b"\0" + b"".join(name.encode() + b"\0" for name in names)
    segments = 3 if loader else 2
    head, at = 64 + segments * 56, 1
    tags = []
    for name in names:
        tags.append((1, at))
        at += len(name) + 1
    interpreter = head + len(strings)
    strings += loader.encode() + b"\0"
    dynamic = head + len(strings)
    tags += [(5, base + head), (10, len(strings)), (0, 0), (1, 0)]  # what follows DT_NULL is not there
    body = strings + b"".join(struct.pack("<QQ", *tag) for tag in tags)
    end = head + len(body)
    return (
        b"\x7fELF\2\1\1".ljust(16, b"\0")
        + struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, segments, 64, 0, 0)
        + struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, end, end, 4096)
        + struct.pack("<IIQQQQQQ", 2, 6, dynamic, base + dynamic, base + dynamic, 16 * len(tags), 16 * len(tags), 8)
        + (struct.pack("<IIQQQQQQ", 3, 4, *[interpreter] * 3, *[len(loader) + 1] * 2, 1) if loader else b"")
        + body
    )
