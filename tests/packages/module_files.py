"""Kernel modules that are made here, and a kernel that has them."""

from __future__ import annotations

import struct
from pathlib import Path

from vmodel.guest.artifacts import Kernel

RELEASE = "9.9-test"


def elf(**info: str | list[str]) -> bytes:
    """A minimal ELF64 with a .modinfo section."""
    pairs = [
        (key, value) for key, values in info.items() for value in ([values] if isinstance(values, str) else values)
    ]
    text = b"".join(f"{key}={value}".encode() + b"\0" for key, value in pairs)
    names = b"\0.modinfo\0.shstrtab\0"
    head = b"\x7fELF\2\1\1".ljust(16, b"\0") + struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, 64, 0, 64, 0, 0, 64, 3, 2)
    body = 64 + 3 * 64

    def section(name: int, offset: int, size: int) -> bytes:
        return struct.pack("<IIQQQQIIQQ", name, 1, 0, 0, offset, size, 0, 0, 1, 0)

    table = bytes(64) + section(1, body, len(text)) + section(10, body + len(text), len(names))
    return head + table + text + names


def kernel_with(folder: Path, modules: dict[str, bytes], builtin: str = "") -> Kernel:
    for name, data in modules.items():
        path = folder / "kernel" / "drivers" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    folder.mkdir(exist_ok=True)
    (folder / "modules.builtin").write_text(builtin)
    return Kernel(RELEASE, folder / "vmlinuz", folder)
