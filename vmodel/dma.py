"""`Dma`: how a device reads and writes the guest's memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from vmodel import _shim
from vmodel.errors import Access, DmaFault, Reason
from vmodel.memory import GuestMemory

Buffer = bytes | bytearray | memoryview

_FETCH_ADD, _SWAP, _CAS = 0, 1, 2


class Courier(Protocol):
    """Reaches memory that the client gave no file for, by DMA_READ and DMA_WRITE messages."""

    def read(self, gpa: int, size: int) -> bytes:
        """`size` bytes; DmaFault(CLIENT) when the client refuses or is gone."""

    def write(self, gpa: int, data: Buffer) -> None:
        """Writes all of `data`; DmaFault(CLIENT) likewise."""


@dataclass(frozen=True)
class DmaStats:
    """Accesses and bytes since the device was made."""

    read_ops: int
    read_bytes: int
    write_ops: int
    write_bytes: int
    faults: int


class Dma:
    """DMA by one requester.

    All methods raise DmaFault; its `done` says how many bytes had been moved.  With bus mastering off each
    access fails with Reason.BUS_MASTER_OFF, as an unsupported request does on PCIe.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._requester = _shim.Requester(memory.shim)
        self._bus_master = False
        #: Set by the server while a client is connected.
        self.courier: Courier | None = None
        self._message_bytes = [0, 0]

    @property
    def bus_master(self) -> bool:
        """Command.BusMaster; the config space sets it."""
        return self._bus_master

    @bus_master.setter
    def bus_master(self, on: bool) -> None:
        self._bus_master = on
        self._requester.enable(on)

    def read(self, iova: int, size: int) -> bytes:
        """`size` bytes from `iova` on."""
        try:
            return self._requester.read(iova, size)
        except _shim.ByMessage:
            buffer = bytearray(size)
            self._walk(iova, memoryview(buffer), Access.READ)
            return bytes(buffer)

    def readinto(self, iova: int, buffer: bytearray | memoryview) -> None:
        """Fills `buffer` (writable, contiguous) from `iova` on."""
        try:
            self._requester.readinto(iova, buffer)
        except _shim.ByMessage:
            self._walk(iova, memoryview(buffer).cast("B"), Access.READ)

    def write(self, iova: int, data: Buffer) -> None:
        """Writes all of `data` (contiguous) to `iova`."""
        try:
            self._requester.write(iova, data)
        except _shim.ByMessage:
            self._walk(iova, memoryview(data).cast("B"), Access.WRITE)

    def _walk(self, iova: int, view: memoryview, access: Access) -> None:
        """The whole transfer again, piece by piece: from files where there are some, else by message."""
        done = 0
        while done < len(view):
            rest = view[done:]
            try:
                if access is Access.READ:
                    self._requester.readinto(iova + done, rest)
                else:
                    self._requester.write(iova + done, rest)
                return
            except _shim.ByMessage as piece:
                done += piece.done
                self._message(piece.gpa, view[done : done + piece.size], access, iova, done)
                done += piece.size
            except DmaFault as fault:
                fault.done += done
                raise

    def _message(self, gpa: int, view: memoryview, access: Access, iova: int, done: int) -> None:
        if self.courier is None:
            raise DmaFault(Reason.CLIENT, iova + done, access, done)
        try:
            if access is Access.READ:
                view[:] = self.courier.read(gpa, len(view))
            else:
                self.courier.write(gpa, view)
        except DmaFault as fault:
            raise DmaFault(fault.reason, iova + done, access, done) from fault
        self._message_bytes[access is Access.WRITE] += len(view)

    def gather(self, pieces: Sequence[tuple[int, int]]) -> bytes:
        """The bytes of all (iova, size) pieces, one after the other."""
        buffer = bytearray(sum(size for _, size in pieces))
        self.gather_into(pieces, buffer)
        return bytes(buffer)

    def gather_into(self, pieces: Sequence[tuple[int, int]], buffer: bytearray | memoryview) -> None:
        """Fills `buffer` from (iova, size) pieces; ValueError when their sizes do not add up to its length."""
        view = memoryview(buffer).cast("B")
        if sum(size for _, size in pieces) != len(view):
            raise ValueError("the pieces and the buffer differ in size")
        try:
            self._requester.gather(pieces, view, 0)
        except _shim.ByMessage:
            self._walk_pieces(pieces, view, Access.READ)

    def scatter(self, pieces: Sequence[tuple[int, int]], data: Buffer) -> None:
        """Writes `data` to (iova, size) pieces; ValueError when their sizes do not add up to its length."""
        view = memoryview(data).cast("B")
        if sum(size for _, size in pieces) != len(view):
            raise ValueError("the pieces and the data differ in size")
        try:
            self._requester.gather(pieces, view, _shim.DMA_WRITE)
        except _shim.ByMessage:
            self._walk_pieces(pieces, view, Access.WRITE)

    def _walk_pieces(self, pieces: Sequence[tuple[int, int]], view: memoryview, access: Access) -> None:
        at = 0
        for iova, size in pieces:
            self._walk(iova, view[at : at + size], access)
            at += size

    @contextmanager
    def view(self, iova: int, size: int, *, writable: bool = False) -> Iterator[memoryview]:
        """[iova, iova+size) itself, no copy; it must lie in one window with a file.

        Slices must not outlive the `with` block.  Memory without a file, or in two windows, is NO_FILE or
        NO_WINDOW: use read/write there.  Bytes of a file that the client truncates meanwhile read as zeros.
        """
        try:
            pin = self._requester.pin(iova, size, _shim.DMA_WRITE if writable else 0)
        except _shim.ByMessage as piece:
            access = Access.READ | Access.WRITE if writable else Access.READ
            raise DmaFault(Reason.NO_FILE, iova, access, piece.done) from None
        try:
            yield pin.view
        finally:
            pin.close()

    def fetch_add(self, iova: int, size: int, operand: int) -> int:
        """PCIe FetchAdd on 4 or 8 bytes, naturally aligned; the value before."""
        return self._atomic(iova, _FETCH_ADD, size, operand, 0)

    def swap(self, iova: int, size: int, operand: int) -> int:
        """PCIe Swap; the value before."""
        return self._atomic(iova, _SWAP, size, operand, 0)

    def compare_swap(self, iova: int, size: int, expected: int, operand: int) -> int:
        """PCIe CAS: stores `operand` if the value is `expected`; the value before."""
        return self._atomic(iova, _CAS, size, operand, expected)

    def _atomic(self, iova: int, op: int, size: int, operand: int, compare: int) -> int:
        mask = (1 << 8 * size) - 1
        try:
            return self._requester.atomic(iova, op, size, operand & mask, compare & mask)
        except _shim.ByMessage:
            # The protocol has no atomic message, and a read and a write would not be one.
            raise DmaFault(Reason.NO_FILE, iova, Access.READ | Access.WRITE) from None

    @property
    def stats(self) -> DmaStats:
        """Counters; message transfers included."""
        read_ops, read_bytes, write_ops, write_bytes, faults, *_ = self._requester.stats()
        by_read, by_write = self._message_bytes
        return DmaStats(read_ops, read_bytes + by_read, write_ops, write_bytes + by_write, faults)

    def close(self) -> None:
        """Forgets the client; accesses fail from now on."""
        self.courier = None
        self.bus_master = False
