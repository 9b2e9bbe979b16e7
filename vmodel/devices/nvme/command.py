"""Submission and completion queue entries (NVMe 1.4, 4.2 and 4.6)."""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Self

_SUBMISSION = struct.Struct("<BBHIIIQ16s6I")
_COMPLETION = struct.Struct("<IIHHHH")

#: Sizes of entries in bytes; the only ones that the controller offers.
SUBMISSION_SIZE, COMPLETION_SIZE = 64, 16
assert _SUBMISSION.size == SUBMISSION_SIZE and _COMPLETION.size == COMPLETION_SIZE

#: NSID of all namespaces.
BROADCAST = 0xFFFF_FFFF


class Fuse(enum.IntEnum):
    """FUSE: which part of a fused operation a command is."""

    NORMAL = 0
    FIRST = 1
    SECOND = 2
    RESERVED = 3


class DataPointer(enum.IntEnum):
    """PSDT: the format of `dptr` and `mptr`."""

    PRP = 0
    #: The data has an SGL, the metadata is one buffer.
    SGL = 1
    #: Data and metadata each have an SGL.
    SGL_METADATA = 2
    RESERVED = 3


@dataclass(frozen=True, slots=True)
class NvmeCommand:
    """A submission queue entry; `flags` is byte 1, with FUSE and PSDT."""

    opcode: int
    flags: int
    cid: int
    nsid: int
    cdw2: int
    cdw3: int
    mptr: int
    #: PRP Entry 1 and 2, or the first SGL descriptor.
    dptr: bytes
    cdw10: int
    cdw11: int
    cdw12: int
    cdw13: int
    cdw14: int
    cdw15: int

    @classmethod
    def parse(cls, entry: bytes) -> Self:
        """Parses a submission queue entry of 64 bytes."""
        return cls(*_SUBMISSION.unpack(entry))

    @classmethod
    def make(
        cls,
        opcode: int,
        *,
        flags: int = 0,
        cid: int = 0,
        nsid: int = 0,
        mptr: int = 0,
        dptr: bytes = bytes(16),
        cdw10: int = 0,
        cdw11: int = 0,
        cdw12: int = 0,
        cdw13: int = 0,
        cdw14: int = 0,
        cdw15: int = 0,
    ) -> Self:
        """Makes a command as a driver does; fields that are not given are 0."""
        return cls(opcode, flags, cid, nsid, 0, 0, mptr, dptr, cdw10, cdw11, cdw12, cdw13, cdw14, cdw15)

    def build(self) -> bytes:
        """Builds the entry of 64 bytes."""
        return _SUBMISSION.pack(
            self.opcode,
            self.flags,
            self.cid,
            self.nsid,
            self.cdw2,
            self.cdw3,
            self.mptr,
            self.dptr,
            self.cdw10,
            self.cdw11,
            self.cdw12,
            self.cdw13,
            self.cdw14,
            self.cdw15,
        )

    @property
    def fuse(self) -> Fuse:
        """Bits 1:0 of byte 1."""
        return Fuse(self.flags & 3)

    @property
    def psdt(self) -> DataPointer:
        """Bits 7:6 of byte 1."""
        return DataPointer(self.flags >> 6)

    @property
    def prp1(self) -> int:
        """PRP Entry 1."""
        return int.from_bytes(self.dptr[:8], "little")

    @property
    def prp2(self) -> int:
        """PRP Entry 2."""
        return int.from_bytes(self.dptr[8:], "little")

    @property
    def slba(self) -> int:
        """Starting LBA of an I/O command: Dwords 10 and 11."""
        return self.cdw11 << 32 | self.cdw10

    @property
    def blocks(self) -> int:
        """Number of Logical Blocks (0's based in the command) of an I/O command: Dword 12."""
        return (self.cdw12 & 0xFFFF) + 1


@dataclass(frozen=True, slots=True)
class Completion:
    """A completion queue entry; `status` is the 15-bit field, without the phase tag."""

    result: int
    sq_head: int
    sqid: int
    cid: int
    status: int
    phase: int

    @classmethod
    def parse(cls, entry: bytes) -> Self:
        """Parses a completion queue entry of 16 bytes."""
        result, _, sq_head, sqid, cid, status = _COMPLETION.unpack(entry)
        return cls(result, sq_head, sqid, cid, status >> 1, status & 1)

    def build(self) -> bytes:
        """Builds the entry of 16 bytes."""
        return _COMPLETION.pack(self.result, 0, self.sq_head, self.sqid, self.cid, self.status << 1 | self.phase)
