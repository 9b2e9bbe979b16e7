"""BTF, the types of a kernel: what is needed of them to find a member of a structure.

Linux's Documentation/bpf/btf.rst, include/uapi/linux/btf.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_HEADER = struct.Struct("<HBBIIIII")
_MAGIC = 0xEB9F
_TYPE = struct.Struct("<III")
_STRUCT, _ENUM = 4, 6
#: Of one structure or enumeration, and of places that look like one: more are no kernel's.
_MOST_MEMBERS = 1024
_MOST_PLACES = 1000


@dataclass(frozen=True)
class BtfStruct:
    """A structure: its size in bytes, and the offset in bytes of each member that has a name."""

    size: int
    members: Mapping[str, int]


class Btf:
    """The types in a .BTF section.  ValueError: it is damaged.

    Types are found by their name's place in the strings, and not by counting through all that come before: that is
    fast, and sound, as the caller names members that the type must have.
    """

    def __init__(self, data: bytes) -> None:
        magic, version, _, header, types, types_size, strings, strings_size = _HEADER.unpack_from(data)
        if (magic, version) != (_MAGIC, 1) or header < _HEADER.size or types % 4:
            raise ValueError("its BTF has an unknown header")
        self._types = data[header + types : header + types + types_size]
        self._strings = data[header + strings : header + strings + strings_size]
        if len(self._types) != types_size or len(self._strings) != strings_size:
            raise ValueError("its BTF ends early")

    def structure(self, name: str, *members: str) -> BtfStruct | None:
        """The structure of this name that has all these members; None: there is none."""
        for at, flag, count, size in self._named(name, _STRUCT):
            found = {}
            for member, _, offset in struct.iter_unpack("<III", self._types[at : at + 12 * count]):
                bits = offset & 0xFFFFFF if flag else offset  # a bit field's size is above
                found[self._string(member)] = bits // 8
            if found.keys() >= set(members):
                return BtfStruct(size, found)
        return None

    def enumeration(self, name: str, *members: str) -> Mapping[str, int] | None:
        """The values of the enumeration of this name that has all these members; None: there is none."""
        for at, _, count, _ in self._named(name, _ENUM):
            values = struct.iter_unpack("<Ii", self._types[at : at + 8 * count])
            found = {self._string(member): value for member, value in values}
            if found.keys() >= set(members):
                return found
        return None

    def _named(self, name: str, kind: int) -> Iterator[tuple[int, bool, int, int]]:
        """Types of this name: (where the members begin, kind_flag, how many there are, size in bytes)."""
        string = self._strings.find(b"\0%s\0" % name.encode()) + 1
        wanted = struct.pack("<I", string)
        at = -1
        for _ in range(_MOST_PLACES if string else 0):
            at = self._types.find(wanted, at + 1)
            if at < 0:
                return
            if at % 4 or at + _TYPE.size > len(self._types):
                continue
            _, info, size = _TYPE.unpack_from(self._types, at)
            count = info & 0xFFFFFF
            if info >> 24 & 0x7F == kind and count <= _MOST_MEMBERS:
                members = at + _TYPE.size
                if members + count * (12 if kind == _STRUCT else 8) <= len(self._types):
                    yield members, bool(info >> 31), count, size

    def _string(self, offset: int) -> str:
        end = self._strings.find(b"\0", offset, offset + 512)
        return self._strings[offset : max(end, offset)].decode("ascii", "replace")
