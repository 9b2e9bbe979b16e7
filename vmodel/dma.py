"""`Dma`: how a device reads and writes the guest's memory."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from vmodel import _shim
from vmodel.errors import Access, DmaFault, Reason
from vmodel.iommu.endpoint import Endpoint
from vmodel.memory import GuestMemory
from vmodel.points import Points

Buffer = bytes | bytearray | memoryview
_T = TypeVar("_T")

#: A page handler may answer SUCCESS this often for one access that gets no further.
_TRIES = 8


class Courier(Protocol):
    """Reaches memory that the client gave no file for, by DMA_READ and DMA_WRITE messages."""

    def read(self, gpa: int, size: int) -> bytes:
        """`size` bytes; DmaFault(CLIENT) when the client refuses or is gone."""

    def write(self, gpa: int, data: Buffer) -> None:
        """Writes all of `data`; DmaFault(CLIENT) likewise."""

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Waits for `event` while the client is served; False: it was not set in time, or cannot be waited for.

        Whoever sets it then wakes the device's thread, by PciDevice.post.
        """


@dataclass(frozen=True)
class DmaStats:
    """Accesses and bytes since the device was made; `faults` that the IOMMU has mended are not counted."""

    read_ops: int
    read_bytes: int
    write_ops: int
    write_bytes: int
    faults: int
    iotlb_hits: int
    iotlb_misses: int
    #: Uses of stale translations; 0 where the IOMMU does not look for them (`report_stale`).
    stale: int


class _Line:
    """What a device's accesses have in common, with whichever PASID."""

    def __init__(self, memory: GuestMemory) -> None:
        self.requester = _shim.Requester(memory.shim)
        self.bus_master = False
        self.courier: Courier | None = None
        self.endpoint: Endpoint | None = None
        self.message_bytes = [0, 0]
        self.mended = 0
        #: Who hears of accesses, as long as all of `makers` are of a class that tells; and all of them.
        self.points: Points | None = None
        self.makers: weakref.WeakSet[Dma] = weakref.WeakSet()


class Dma:
    """DMA by one requester, with or without a PASID.

    All methods raise DmaFault; its `done` says how many bytes had been moved.  With bus mastering off each
    access fails with Reason.BUS_MASTER_OFF, as an unsupported request does on PCIe.  Where an IOMMU covers the device,
    it is told of each fault first, and may have mended it.
    """

    # With slots the class can be replaced (`become`) without making accesses slower from then on.
    __slots__ = ("__weakref__", "_line", "_pasid", "_requester")

    def __init__(self, memory: GuestMemory) -> None:
        self._line = _Line(memory)
        self._requester = self._line.requester
        self._pasid = _shim.NO_PASID
        self._line.makers.add(self)

    def with_pasid(self, pasid: int) -> Dma:
        """The same device's DMA with a PASID (0 to 2**20 - 1)."""
        if not 0 <= pasid < 1 << 20:
            raise ValueError(f"a PASID has 20 bits, {pasid:#x} more")
        other = Dma.__new__(type(self))
        other._line, other._requester, other._pasid = self._line, self._requester, pasid
        self._line.makers.add(other)
        return other

    def become(self, kind: type[Dma], points: Points | None) -> None:
        """All of the device's accesses, with whichever PASID, are made by `kind`, which tells `points`.

        The class is what changes, so that nothing is asked of accesses while nobody listens, and models may keep
        what they have.
        """
        self._line.points = points
        for dma in list(self._line.makers):
            dma.__class__ = kind

    @property
    def requester(self) -> _shim.Requester:
        """For the IOMMU, which attaches domains to it."""
        return self._requester

    @property
    def courier(self) -> Courier | None:
        """Set by the server while a client is connected."""
        return self._line.courier

    @courier.setter
    def courier(self, courier: Courier | None) -> None:
        self._line.courier = courier

    @property
    def endpoint(self) -> Endpoint | None:
        """The device as the machine's IOMMUs see it; None: there are none."""
        return self._line.endpoint

    @endpoint.setter
    def endpoint(self, endpoint: Endpoint | None) -> None:
        self._line.endpoint = endpoint

    def _mended(self, fault: DmaFault, *, ask: bool = True) -> bool:
        """Tells the IOMMU of a fault; whether to try again."""
        endpoint = self._line.endpoint
        mended = endpoint is not None and endpoint.faulted(fault, ask=ask)
        self._line.mended += mended
        return mended

    @property
    def bus_master(self) -> bool:
        """Command.BusMaster; the config space sets it."""
        return self._line.bus_master

    @bus_master.setter
    def bus_master(self, on: bool) -> None:
        self._line.bus_master = on
        self._requester.enable(on)

    def read(self, iova: int, size: int) -> bytes:
        """`size` bytes from `iova` on."""
        try:
            return self._requester.read(iova, size, self._pasid)
        except _shim.ByMessage:
            pass
        except DmaFault as fault:
            if not self._mended(fault):
                raise
        buffer = bytearray(size)
        self._go_on(iova, memoryview(buffer), Access.READ)
        return bytes(buffer)

    def readinto(self, iova: int, buffer: bytearray | memoryview) -> None:
        """Fills `buffer` (writable, contiguous) from `iova` on."""
        try:
            self._requester.readinto(iova, buffer, self._pasid)
            return
        except _shim.ByMessage:
            pass
        except DmaFault as fault:
            if not self._mended(fault):
                raise
        self._go_on(iova, memoryview(buffer).cast("B"), Access.READ)

    def write(self, iova: int, data: Buffer) -> None:
        """Writes all of `data` (contiguous) to `iova`."""
        try:
            self._requester.write(iova, data, self._pasid)
            return
        except _shim.ByMessage:
            pass
        except DmaFault as fault:
            if not self._mended(fault):
                raise
        self._go_on(iova, memoryview(data).cast("B"), Access.WRITE)

    def _go_on(self, iova: int, view: memoryview, access: Access) -> None:
        """A transfer anew, piece by piece: by message where there is no file, and after what the IOMMU mended."""
        done = 0
        tries = 0
        while done < len(view):
            rest = view[done:]
            try:
                if access is Access.READ:
                    self._requester.readinto(iova + done, rest, self._pasid)
                else:
                    self._requester.write(iova + done, rest, self._pasid)
                return
            except _shim.ByMessage as piece:
                done += piece.done
                self._message(piece.gpa, view[done : done + piece.size], access, iova, done)
                done += piece.size
                tries = 0
            except DmaFault as fault:
                tries = 0 if fault.done else tries + 1
                done += fault.done
                if self._mended(fault, ask=tries < _TRIES):
                    continue
                fault.done = done
                raise

    def _message(self, gpa: int, view: memoryview, access: Access, iova: int, done: int) -> None:
        # No exception stays in a variable here: in a cycle with a memoryview it would crash CPython 3.11's collector.
        courier = self._line.courier
        if courier is None:
            raise self._told(Reason.CLIENT, iova + done, access, done, gpa)
        try:
            if access is Access.READ:
                view[:] = courier.read(gpa, len(view))
            else:
                courier.write(gpa, view)
        except DmaFault as fault:
            raise self._told(fault.reason, iova + done, access, done, gpa) from fault
        self._line.message_bytes[access is Access.WRITE] += len(view)

    def _told(self, reason: Reason, iova: int, access: Access, done: int, gpa: int) -> DmaFault:
        """A fault that was not the shim's, once the IOMMU knows of it."""
        fault = DmaFault(reason, iova, access, done, self._pasid_or_none, gpa=gpa)
        self._mended(fault, ask=False)
        return fault

    @property
    def _pasid_or_none(self) -> int | None:
        return None if self._pasid == _shim.NO_PASID else self._pasid

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
        self._move_pieces(pieces, view, Access.READ)

    def scatter(self, pieces: Sequence[tuple[int, int]], data: Buffer) -> None:
        """Writes `data` to (iova, size) pieces; ValueError when their sizes do not add up to its length."""
        view = memoryview(data).cast("B")
        if sum(size for _, size in pieces) != len(view):
            raise ValueError("the pieces and the data differ in size")
        self._move_pieces(pieces, view, Access.WRITE)

    def _move_pieces(self, pieces: Sequence[tuple[int, int]], view: memoryview, access: Access) -> None:
        try:
            self._requester.gather(pieces, view, _shim.DMA_WRITE if access is Access.WRITE else 0, self._pasid)
            return
        except _shim.ByMessage:
            pass
        except DmaFault as fault:
            if not self._mended(fault):
                raise
        # Once more, each by itself: which of them had been moved does not matter.
        at = 0
        for iova, size in pieces:
            part = view[at : at + size]
            try:
                if access is Access.READ:
                    self.readinto(iova, part)
                else:
                    self.write(iova, part)
            except DmaFault as fault:
                fault.done += at
                raise
            at += size

    @contextmanager
    def view(self, iova: int, size: int, *, writable: bool = False) -> Iterator[memoryview]:
        """[iova, iova+size) itself, no copy; it must lie in one piece in one window with a file.

        Slices must not outlive the `with` block.  Memory without a file, or in two pieces, is NO_FILE or
        NO_WINDOW: use read/write there.  Bytes of a file that the client truncates meanwhile read as zeros.
        """
        access = Access.READ | Access.WRITE if writable else Access.READ
        flags = _shim.DMA_WRITE if writable else 0
        pin = self._whole(lambda: self._requester.pin(iova, size, flags, self._pasid), iova, access)
        try:
            yield pin.view
        finally:
            pin.close()

    def fetch_add(self, iova: int, size: int, operand: int) -> int:
        """PCIe FetchAdd on 4 or 8 bytes, naturally aligned; the value before."""
        return self._atomic(iova, _shim.ATOMIC_FETCH_ADD, size, operand, 0)

    def swap(self, iova: int, size: int, operand: int) -> int:
        """PCIe Swap; the value before."""
        return self._atomic(iova, _shim.ATOMIC_SWAP, size, operand, 0)

    def compare_swap(self, iova: int, size: int, expected: int, operand: int) -> int:
        """PCIe CAS: stores `operand` if the value is `expected`; the value before."""
        return self._atomic(iova, _shim.ATOMIC_CAS, size, operand, expected)

    def _atomic(self, iova: int, op: int, size: int, operand: int, compare: int) -> int:
        mask = (1 << 8 * size) - 1
        operands = operand & mask, compare & mask
        access = Access.READ | Access.WRITE
        return self._whole(lambda: self._requester.atomic(iova, op, size, *operands, self._pasid), iova, access)

    def _whole(self, call: Callable[[], _T], iova: int, access: Access) -> _T:
        """An access that cannot be made in pieces, nor by message: the protocol has none for it."""
        for n in range(_TRIES):
            try:
                return call()
            except _shim.ByMessage as piece:
                raise self._told(Reason.NO_FILE, iova, access, piece.done, piece.gpa) from None
            except DmaFault as fault:
                if not self._mended(fault, ask=n < _TRIES - 1):
                    raise
        raise AssertionError("unreachable")

    @property
    def stats(self) -> DmaStats:
        """Counters; message transfers included."""
        read_ops, read_bytes, write_ops, write_bytes, faults, hits, misses, stale = self._requester.stats()
        by_read, by_write = self._line.message_bytes
        # What was mended, such as a table entry not read before, is none to whoever looks.
        refused = faults - self._line.mended
        return DmaStats(read_ops, read_bytes + by_read, write_ops, write_bytes + by_write, refused, hits, misses, stale)

    def close(self) -> None:
        """Forgets the client; accesses fail from now on."""
        self.courier = None
        self.bus_master = False
