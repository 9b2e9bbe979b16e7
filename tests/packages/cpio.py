"""A reader of initramfs archives, which knows nothing of their writer."""

from __future__ import annotations

import stat
from dataclasses import dataclass


@dataclass
class Entry:
    mode: int
    data: bytes
    device: tuple[int, int]


def read_back(archive: bytes) -> dict[str, Entry]:
    """A reader of "newc" that knows nothing of the writer; it asserts what the kernel's unpacker relies on."""
    found: dict[str, Entry] = {}
    inodes = set()
    at = 0
    while True:
        assert at % 4 == 0
        head = archive[at : at + 110]
        assert head[:6] == b"070701"
        fields = [int(head[6 + 8 * i : 14 + 8 * i], 16) for i in range(13)]
        inode, mode, _, _, links, _, size, _, _, major, minor, name_size, _ = fields
        raw = archive[at + 110 : at + 110 + name_size]
        assert raw[-1:] == b"\0"
        assert b"\0" not in raw[:-1]
        at = (at + 110 + name_size + 3) & ~3
        data = archive[at : at + size]
        assert len(data) == size
        at = (at + size + 3) & ~3
        name = raw[:-1].decode()
        if name == "TRAILER!!!":
            assert archive[at:] == b""
            return found
        assert name not in found
        assert inode not in inodes
        assert links == 1
        parent = name.rpartition("/")[0]
        assert not parent or stat.S_ISDIR(found[parent].mode), "a folder has to come before what is in it"
        inodes.add(inode)
        found[name] = Entry(mode, data, (major, minor))
