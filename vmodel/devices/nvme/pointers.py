"""The guest memory of a command's data pointer: PRP (NVMe 1.4, 4.3) and SGL (4.4).

The lists are not trusted: each form that the specification forbids results in its status, and loops are bounded.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator

from vmodel.devices.nvme.command import DataPointer, NvmeCommand
from vmodel.devices.nvme.status import CommandError, NvmeStatus
from vmodel.dma import Buffer, Dma

#: (address, bytes); address None: the bytes are discarded (bit bucket).
Piece = tuple[int | None, int]

_DESCRIPTOR = struct.Struct("<QI3xB")
DESCRIPTOR_SIZE = _DESCRIPTOR.size
#: Most descriptors of one command.  The specification sets no limit; without one, a segment without data that points
#: to itself would be an endless loop.
MAX_DESCRIPTORS = 16384
#: Descriptors that are fetched at once: the guest may set a segment's length to up to 4 GiB.
_FETCH = 256


class Sgl(enum.IntEnum):
    """SGL descriptor types (figure 114), the upper four bits of the descriptor's last byte."""

    DATA_BLOCK = 0
    BIT_BUCKET = 1
    SEGMENT = 2
    LAST_SEGMENT = 3


def prp_pieces(dma: Dma, prp1: int, prp2: int, size: int, page: int) -> list[Piece]:
    """The memory of `size` bytes at PRP Entry 1 and 2; `page`: the controller's page size.  CommandError, DmaFault."""
    if prp1 & 3:
        raise CommandError(NvmeStatus.PRP_OFFSET_INVALID, location=24)
    if not size:
        return []
    first = min(size, page - prp1 % page)
    pieces: list[Piece] = [(prp1, first)]
    left = size - first
    if left > page:
        for entry in _prp_list(dma, prp2, left, page):
            count = min(left, page)
            _append(pieces, entry, count)
            left -= count
    elif left:
        if prp2 % page:
            raise CommandError(NvmeStatus.PRP_OFFSET_INVALID, location=32)
        _append(pieces, prp2, left)
    return pieces


def _append(pieces: list[Piece], address: int, size: int) -> None:
    """Adds a piece; merges it with the last one if they are adjacent."""
    before, count = pieces[-1]
    if before is not None and before + count == address:
        pieces[-1] = before, count + size
    else:
        pieces.append((address, size))


def _prp_list(dma: Dma, at: int, left: int, page: int) -> Iterator[int]:
    """The entries of a PRP list for `left` bytes."""
    if at & 7:
        raise CommandError(NvmeStatus.PRP_OFFSET_INVALID, location=32)
    wanted = -(-left // page)
    # A list that another one points to begins a page and has room for many entries: each turn but the first has data.
    while wanted:
        room = (page - at % page) // 8
        count = min(room, wanted)
        entries = struct.unpack(f"<{count}Q", dma.read(at, 8 * count))
        # The last entry of a page points to the next list if more than one further entry is needed.
        chained = count == room and wanted > room
        for entry in entries:
            if entry % page:
                raise CommandError(NvmeStatus.PRP_OFFSET_INVALID, location=32)
        yield from entries[:-1] if chained else entries
        wanted -= count - chained
        at = entries[-1]


def sgl_pieces(dma: Dma, descriptor: bytes, size: int, *, to_host: bool) -> list[Piece]:
    """The memory of `size` bytes at the SGL that begins with `descriptor`.

    `to_host`: the direction of the data; bit buckets only count in that direction.  CommandError, DmaFault.
    """
    pieces: list[Piece] = []
    left = size
    for kind, address, length in _descriptors(dma, descriptor):
        if kind is Sgl.BIT_BUCKET and not to_host:
            continue
        if length > left:
            raise CommandError(NvmeStatus.DATA_SGL_LENGTH_INVALID, location=24)
        if length:
            pieces.append((None if kind is Sgl.BIT_BUCKET else address, length))
            left -= length
    if left:
        raise CommandError(NvmeStatus.DATA_SGL_LENGTH_INVALID, location=24)
    return pieces


def _parse(descriptor: bytes) -> tuple[Sgl, int, int]:
    address, length, identifier = _DESCRIPTOR.unpack(descriptor)
    # Subtype 0 is an address; others are offsets or specific to a transport.  Keyed blocks exist in fabrics only.
    if identifier & 15 or identifier >> 4 > Sgl.LAST_SEGMENT:
        raise CommandError(NvmeStatus.SGL_TYPE_INVALID, location=24)
    return Sgl(identifier >> 4), address, length


def _descriptors(dma: Dma, descriptor: bytes) -> Iterator[tuple[Sgl, int, int]]:
    """Data blocks and bit buckets, in order."""
    budget = MAX_DESCRIPTORS
    kind, address, length = _parse(descriptor)
    while kind in (Sgl.SEGMENT, Sgl.LAST_SEGMENT):
        if not length or length % DESCRIPTOR_SIZE:
            raise CommandError(NvmeStatus.INVALID_SGL_SEGMENT, location=24)
        is_last, behind = kind is Sgl.LAST_SEGMENT, address + length
        if behind > 1 << 64:
            # Addresses do not wrap: there is no memory above the last address.
            raise CommandError(NvmeStatus.DATA_TRANSFER_ERROR)
        while address < behind:
            count = min(_FETCH, (behind - address) // DESCRIPTOR_SIZE)
            budget -= count
            if budget < 0:
                raise CommandError(NvmeStatus.INVALID_SGL_COUNT, location=24)
            raw = dma.read(address, count * DESCRIPTOR_SIZE)
            address += len(raw)
            for at in range(0, len(raw), DESCRIPTOR_SIZE):
                kind, where, length = _parse(raw[at : at + DESCRIPTOR_SIZE])
                if kind in (Sgl.DATA_BLOCK, Sgl.BIT_BUCKET):
                    yield kind, where, length
                elif is_last:
                    raise CommandError(NvmeStatus.INVALID_SGL_SEGMENT, location=24)
                elif address < behind or at + DESCRIPTOR_SIZE < len(raw):
                    raise CommandError(NvmeStatus.INVALID_SGL_COUNT, location=24)
        if kind in (Sgl.DATA_BLOCK, Sgl.BIT_BUCKET):
            return
        address = where
    yield kind, address, length


class Transfer:
    """A command's data buffer of `size` bytes; each method moves all of it.

    The constructor reads the lists.  CommandError: they are invalid; DmaFault as in Dma.
    """

    def __init__(
        self, dma: Dma, command: NvmeCommand, page_size: int, size: int, *, to_host: bool, sgl: bool = True
    ) -> None:
        """`sgl` False: the command must use PRPs, as admin commands do on PCIe."""
        self._dma = dma
        self.size = size
        if command.psdt is DataPointer.PRP:
            self.pieces = prp_pieces(dma, command.prp1, command.prp2, size, page_size)
        elif command.psdt is DataPointer.RESERVED or not sgl:
            raise CommandError(NvmeStatus.INVALID_FIELD, location=6 << 8 | 1)
        else:
            self.pieces = sgl_pieces(dma, command.dptr, size, to_host=to_host)

    def to_guest(self, data: Buffer) -> None:
        """Writes `size` bytes.  DmaFault."""
        if len(data) != self.size:
            raise ValueError(f"{len(data)} bytes for a buffer of {self.size}")
        whole = [(address, count) for address, count in self.pieces if address is not None]
        if len(whole) == len(self.pieces):
            self._dma.scatter(whole, data)
            return
        at = 0
        for address, count in self.pieces:
            if address is not None:
                self._dma.write(address, data[at : at + count])
            at += count

    def from_guest(self) -> bytearray:
        """Reads `size` bytes.  DmaFault."""
        data = bytearray(self.size)
        self.from_guest_into(data)
        return data

    def from_guest_into(self, buffer: bytearray | memoryview) -> None:
        """Fills `buffer` of `size` bytes.  DmaFault."""
        # There are no bit buckets here: `sgl_pieces` ignores them for data from the host.
        self._dma.gather_into([(address, count) for address, count in self.pieces if address is not None], buffer)
