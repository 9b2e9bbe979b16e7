"""`Dma`: how a device reads and writes the guest's memory."""

from __future__ import annotations

import errno
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import NoReturn, Protocol, TypeVar

from vmodel import _shim
from vmodel.dma_pieces import counting, read_each, read_large
from vmodel.errors import Access, DmaFault, Reason
from vmodel.iommu.endpoint import Endpoint
from vmodel.memory import GuestMemory

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
    """Accesses and bytes since the device was created.  `faults` does not count those that the IOMMU resolved."""

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
    """What a device's accesses have in common, with or without a PASID."""

    def __init__(self, memory: GuestMemory) -> None:
        self.requester = _shim.Requester(memory.shim)
        self.bus_master = False
        self.courier: Courier | None = None
        self.endpoint: Endpoint | None = None
        self.refused: Callable[[Reason], None] | None = None
        #: Whether Enable No Snoop is set in Device Control; None: the device has none.
        self.no_snoop_enabled: Callable[[], bool] | None = None
        self.message_bytes = [0, 0]
        self.resolved = 0
        #: Where accesses begin that are not tapped: the requester, or a cache in front of it.
        self.base: _shim.Requester | _Interceptor = self.requester
        self.port = _Port(self.requester)


class Tap(Protocol):
    """Intercepts a device's accesses: the methods of Dma, with the same device's untapped `dma` to carry them out."""

    def read(self, dma: Dma, iova: int, size: int) -> bytes: ...
    def readinto(self, dma: Dma, iova: int, buffer: bytearray | memoryview) -> None: ...
    def write(self, dma: Dma, iova: int, data: Buffer) -> None: ...
    def gather_into(self, dma: Dma, pieces: Sequence[tuple[int, int]], buffer: memoryview) -> None: ...
    def scatter(self, dma: Dma, pieces: Sequence[tuple[int, int]], data: memoryview) -> None: ...
    def view(self, dma: Dma, iova: int, size: int, *, writable: bool) -> AbstractContextManager[memoryview]: ...
    def atomic(self, dma: Dma, iova: int, op: int, size: int, operand: int, compare: int) -> int: ...


class _Intercepted(Exception):
    """The device is tapped: `by.tap` carries out the access."""

    def __init__(self, by: _Interceptor) -> None:
        self.by = by


class _Interceptor:
    """Stands in for a requester while its device is tapped.  So an untapped access has no check to make.

    `below`: by what the tap carries out accesses.
    """

    def __init__(self, tap: Tap, below: _shim.Requester | _Interceptor) -> None:
        self.tap, self.below = tap, below

    def read(self, iova: int, size: int, pasid: int) -> NoReturn:
        raise _Intercepted(self)

    def readinto(self, iova: int, buffer: object, pasid: int) -> NoReturn:
        raise _Intercepted(self)

    def write(self, iova: int, data: object, pasid: int) -> NoReturn:
        raise _Intercepted(self)

    def gather(self, pieces: object, buffer: object, flags: int, pasid: int) -> NoReturn:
        raise _Intercepted(self)

    def pin(self, iova: int, size: int, flags: int, pasid: int) -> NoReturn:
        raise _Intercepted(self)

    def atomic(self, iova: int, op: int, size: int, operand: int, compare: int, pasid: int) -> NoReturn:
        raise _Intercepted(self)


class _Port:
    """Where a device's accesses begin, with or without a PASID: at its requester, or at a tap in front of it."""

    __slots__ = ("requester",)

    def __init__(self, requester: _shim.Requester | _Interceptor) -> None:
        self.requester = requester


class Dma:
    """DMA by one requester, with or without a PASID.

    Addresses are IOVAs, sizes are in bytes.  All methods raise DmaFault; its `done` is the number of bytes moved before
    the fault.  What is no address, below 0 or beyond 2**64 - 1, is DmaFault(WRAP); a size below 0 is ValueError.  Reads
    take memory only for what is there, and more than 16 MiB are read in pieces.  With bus mastering off each access
    fails with Reason.BUS_MASTER_OFF, as an unsupported request does on PCIe.  Where an IOMMU covers the device, a fault
    is reported to it first; if it resolves the fault, the access continues.
    """

    __slots__ = ("_line", "_no_snoop", "_pasid", "_port")

    def __init__(self, memory: GuestMemory) -> None:
        self._line = _Line(memory)
        self._port = self._line.port
        self._pasid = _shim.NO_PASID
        self._no_snoop = False

    def with_pasid(self, pasid: int) -> Dma:
        """The same device's DMA with a PASID (0 to 2**20 - 1)."""
        if not 0 <= pasid < 1 << 20:
            raise ValueError(f"a PASID has 20 bits, {pasid:#x} more")
        return self._twin(self._port, pasid, self._no_snoop)

    def no_snoop(self) -> Dma:
        """The same device's DMA with the attribute No Snoop (PCIe 5.0, 2.2.6.5).

        It counts only while Enable No Snoop is set in Device Control (7.5.3.4), so never without a PCI Express
        capability; and only a `vmodel.cpu_cache.CpuCache` shows it.
        """
        return self._twin(self._port, self._pasid, True)

    def _twin(self, port: _Port, pasid: int, no_snoop: bool) -> Dma:
        other = Dma.__new__(Dma)
        other._line, other._port, other._pasid, other._no_snoop = self._line, port, pasid, no_snoop
        return other

    def tap(self, tap: Tap | None) -> None:
        """Passes each access of the device, with or without a PASID, to `tap`; None ends that.  Any thread."""
        self._line.port.requester = self._line.base if tap is None else _Interceptor(tap, self._line.base)

    def set_cache(self, cache: Tap | None) -> None:
        """Passes each access to `cache` as well, behind any other tap; None ends that.  Not while the device is tapped.

        RuntimeError: it is tapped.
        """
        line = self._line
        if line.port.requester is not line.base:
            raise RuntimeError("the device is tapped")
        line.base = line.requester if cache is None else _Interceptor(cache, line.requester)
        line.port.requester = line.base

    @property
    def untapped(self) -> Dma:
        """The same DMA without a tap in front of it."""
        return self._twin(_Port(self._line.base), self._pasid, self._no_snoop)

    def _below(self, by: _Interceptor) -> Dma:
        """What the tap of an interceptor carries accesses out by."""
        return self._twin(_Port(by.below), self._pasid, self._no_snoop)

    @property
    def requester(self) -> _shim.Requester:
        """The shim's requester, to which the IOMMU attaches domains."""
        return self._line.requester

    @property
    def pasid(self) -> int | None:
        """The PASID of the accesses; None: they have none."""
        return None if self._pasid == _shim.NO_PASID else self._pasid

    @property
    def courier(self) -> Courier | None:
        """Carries DMA by message.  The server sets it while a client is connected."""
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
        if endpoint is not None:
            endpoint.bus_master = self._line.bus_master

    def _resolved(self, fault: DmaFault, *, ask: bool = True) -> bool:
        """Reports a fault to the IOMMU; returns whether it resolved the fault, so that the access is to be repeated."""
        endpoint = self._line.endpoint
        resolved = endpoint is not None and endpoint.faulted(fault, ask=ask)
        self._line.resolved += resolved
        if not resolved:
            self.refused(fault.reason, fault.access)
        return resolved

    def refused(self, reason: Reason, access: Access) -> None:
        """Reports that a request has failed for good.  Only reads count: a write is posted, without completion."""
        if self._line.refused is not None and access & Access.READ:
            self._line.refused(reason)

    def translate(self, iova: int, access: Access) -> int:
        """The GPA of `iova`, without an access to memory.  DmaFault, after the IOMMU had a chance to resolve it."""
        requester, pasid = self._line.requester, self._pasid
        self._check(iova, 1, access)
        return self.whole(lambda: requester.translate([iova], access, pasid)[0], iova, access)

    def snoops(self, iova: int) -> bool:
        """Whether an access at `iova` snoops the CPU's caches: by its attribute, Device Control, and the IOMMU.

        DmaFault(WRAP): no address.
        """
        self._check(iova, 1, Access.READ)
        line = self._line
        no_snoop = self._no_snoop and line.no_snoop_enabled is not None and line.no_snoop_enabled()
        if line.endpoint is None:
            return not no_snoop
        return line.endpoint.snoops(iova, self.pasid, no_snoop=no_snoop)

    def walk_snoops(self) -> bool:
        """Whether the IOMMU walks tables in memory for an access, and the walk snoops the CPU's caches."""
        return self._line.endpoint is not None and self._line.endpoint.walk_snoops(self.pasid)

    def set_no_snoop_enable(self, enabled: Callable[[], bool]) -> None:
        """Asks `enabled` for Enable No Snoop of Device Control; without it, no request has the attribute."""
        self._line.no_snoop_enabled = enabled

    def on_refused(self, call: Callable[[Reason], None]) -> None:
        """Calls `call` whenever a request that gets a completion fails: config space's Status register records it."""
        self._line.refused = call

    @property
    def bus_master(self) -> bool:
        """Bus Master Enable of the Command register; config space sets it."""
        return self._line.bus_master

    @bus_master.setter
    def bus_master(self, on: bool) -> None:
        self._line.bus_master = on
        self._line.requester.enable(on)
        if self._line.endpoint is not None:
            self._line.endpoint.bus_master = on

    def read(self, iova: int, size: int) -> bytes:
        """Reads `size` bytes from `iova` on."""
        by: _Interceptor | None = None
        try:
            return self._port.requester.read(iova, size, self._pasid)
        except _Intercepted as intercepted:
            by = intercepted.by
        except _shim.ByMessage:
            pass
        except _shim.TooLarge:
            return read_large(self.read, iova, size)
        except OverflowError:
            self._check(iova, size, Access.READ)
            raise
        except DmaFault as fault:
            if not self._resolved(fault):
                raise
        if by is not None:
            self._check(iova, size, Access.READ)
            return by.tap.read(self._below(by), iova, size)
        buffer = bytearray(size)
        self._go_on(iova, memoryview(buffer), Access.READ)
        return bytes(buffer)

    def _check(self, iova: int, size: int, access: Access) -> None:
        """ValueError or DmaFault(WRAP) for what is no size or no address.  No request can have it: no IOMMU sees it."""
        if size < 0:
            raise ValueError(f"an access of {size} bytes")
        if not 0 <= iova < 1 << 64 or size >= 1 << 64:
            raise DmaFault(Reason.WRAP, iova, access, 0, self.pasid)

    def readinto(self, iova: int, buffer: bytearray | memoryview) -> None:
        """Fills `buffer` (writable, contiguous) from `iova` on."""
        by: _Interceptor | None = None
        try:
            return self._port.requester.readinto(iova, buffer, self._pasid)
        except _Intercepted as intercepted:
            by = intercepted.by
        except _shim.ByMessage:
            pass
        except OverflowError:
            self._check(iova, 0, Access.READ)
            raise
        except DmaFault as fault:
            if not self._resolved(fault):
                raise
        if by is not None:
            self._check(iova, 0, Access.READ)
            return by.tap.readinto(self._below(by), iova, buffer)
        return self._go_on(iova, memoryview(buffer).cast("B"), Access.READ)

    def write(self, iova: int, data: Buffer) -> None:
        """Writes all of `data` (contiguous) to `iova`."""
        by: _Interceptor | None = None
        try:
            return self._port.requester.write(iova, data, self._pasid)
        except _Intercepted as intercepted:
            by = intercepted.by
        except _shim.ByMessage:
            pass
        except OverflowError:
            self._check(iova, 0, Access.WRITE)
            raise
        except DmaFault as fault:
            if not self._resolved(fault):
                raise
        if by is not None:
            self._check(iova, 0, Access.WRITE)
            return by.tap.write(self._below(by), iova, data)
        return self._go_on(iova, memoryview(data).cast("B"), Access.WRITE)

    def _go_on(self, iova: int, view: memoryview, access: Access) -> None:
        """Repeats a transfer in pieces: by message where there is no file, again where the IOMMU resolved a fault."""
        # By the requester itself: a tap that is armed meanwhile applies to later accesses.
        requester = self._line.requester
        done = 0
        tries = 0
        while done < len(view):
            rest = view[done:]
            try:
                if access is Access.READ:
                    requester.readinto(iova + done, rest, self._pasid)
                else:
                    requester.write(iova + done, rest, self._pasid)
                return
            except _shim.ByMessage as piece:
                done += piece.done
                self._message(piece.gpa, view[done : done + piece.size], access, iova, done)
                done += piece.size
                tries = 0
            except DmaFault as fault:
                tries = 0 if fault.done else tries + 1
                done += fault.done
                if self._resolved(fault, ask=tries < _TRIES):
                    continue
                fault.done = done
                raise

    def _message(self, gpa: int, view: memoryview, access: Access, iova: int, done: int) -> None:
        # No exception stays in a variable here: in a cycle with a memoryview it would crash CPython 3.11's collector.
        courier = self._line.courier
        if courier is None:
            raise self._reported(Reason.CLIENT, iova + done, access, done, gpa)
        try:
            if access is Access.READ:
                view[:] = courier.read(gpa, len(view))
            else:
                courier.write(gpa, view)
        except DmaFault as fault:
            raise self._reported(fault.reason, iova + done, access, done, gpa) from fault
        self._line.message_bytes[access is Access.WRITE] += len(view)

    def _reported(self, reason: Reason, iova: int, access: Access, done: int, gpa: int) -> DmaFault:
        """A fault that was not the shim's, reported to the IOMMU."""
        fault = DmaFault(reason, iova, access, done, self.pasid, gpa=gpa)
        self._resolved(fault, ask=False)
        return fault

    def gather(self, pieces: Sequence[tuple[int, int]]) -> bytes:
        """Reads all (iova, size) pieces; returns their bytes in that order."""
        total = sum(size for _, size in pieces)
        if not 0 <= total <= _shim.MOST_BYTES:
            self._check_pieces(pieces, Access.READ)
            return read_each(self.read, pieces)
        buffer = bytearray(total)
        self.gather_into(pieces, buffer)
        return bytes(buffer)

    def _check_pieces(self, pieces: Sequence[tuple[int, int]], access: Access) -> None:
        for iova, size in pieces:
            self._check(iova, size, access)

    def gather_into(self, pieces: Sequence[tuple[int, int]], buffer: bytearray | memoryview) -> None:
        """Fills `buffer` from (iova, size) pieces; ValueError when their sizes do not add up to its length."""
        with memoryview(buffer) as whole, whole.cast("B") as view:
            if sum(size for _, size in pieces) != len(view):
                raise ValueError("the pieces and the buffer differ in size")
            self._move_pieces(pieces, view, Access.READ)

    def scatter(self, pieces: Sequence[tuple[int, int]], data: Buffer) -> None:
        """Writes `data` to (iova, size) pieces; ValueError when their sizes do not add up to its length."""
        with memoryview(data) as whole, whole.cast("B") as view:
            if sum(size for _, size in pieces) != len(view):
                raise ValueError("the pieces and the data differ in size")
            self._move_pieces(pieces, view, Access.WRITE)

    def _move_pieces(self, pieces: Sequence[tuple[int, int]], view: memoryview, access: Access) -> None:
        by: _Interceptor | None = None
        try:
            self._port.requester.gather(pieces, view, _shim.DMA_WRITE if access is Access.WRITE else 0, self._pasid)
            return
        except _Intercepted as intercepted:
            by = intercepted.by
        except _shim.ByMessage:
            pass
        except OverflowError:
            self._check_pieces(pieces, access)
            raise
        except DmaFault as fault:
            if not self._resolved(fault):
                raise
        if by is not None:
            self._check_pieces(pieces, access)
            move = by.tap.gather_into if access is Access.READ else by.tap.scatter
            move(self._below(by), pieces, view)
            return
        # Repeats all pieces one by one, those that were moved already, too.
        at = 0
        for iova, size in pieces:
            part = view[at : at + size]
            with counting(at):
                if access is Access.READ:
                    self.readinto(iova, part)
                else:
                    self.write(iova, part)
            at += size

    @contextmanager
    def view(self, iova: int, size: int, *, writable: bool = False) -> Iterator[memoryview]:
        """Yields the memory [iova, iova+size) itself, not a copy; it must be contiguous, in one window with a file.

        Slices must not outlive the `with` block, and an unmap does not wait for its end.  DmaFault: NO_FILE or
        NO_WINDOW for memory without a file or in several pieces, which needs `read` and `write`.  Bytes of a file that
        the client truncates meanwhile read as 0.
        """
        access = Access.READ | Access.WRITE if writable else Access.READ
        flags = _shim.DMA_WRITE if writable else 0
        by: _Interceptor | None = None
        try:
            pin = self.whole(lambda: self._port.requester.pin(iova, size, flags, self._pasid), iova, access)
        except _Intercepted as intercepted:
            by = intercepted.by
        except OverflowError:
            self._check(iova, size, access)
            raise
        if by is not None:
            self._check(iova, size, access)
            with by.tap.view(self._below(by), iova, size, writable=writable) as copy:
                yield copy
            return
        try:
            yield pin.view
        finally:
            pin.close()

    def fetch_add(self, iova: int, size: int, operand: int) -> int:
        """Adds `operand`: PCIe FetchAdd on 4 or 8 bytes, naturally aligned.  Returns the value before."""
        return self.atomic(iova, _shim.ATOMIC_FETCH_ADD, size, operand, 0)

    def swap(self, iova: int, size: int, operand: int) -> int:
        """Stores `operand`: PCIe Swap on 4 or 8 bytes, naturally aligned.  Returns the value before."""
        return self.atomic(iova, _shim.ATOMIC_SWAP, size, operand, 0)

    def compare_swap(self, iova: int, size: int, expected: int, operand: int) -> int:
        """Stores `operand` if the value is `expected`: PCIe CAS on 4 or 8 bytes.  Returns the value before."""
        return self.atomic(iova, _shim.ATOMIC_CAS, size, operand, expected)

    def atomic(self, iova: int, op: int, size: int, operand: int, compare: int) -> int:
        """Carries out the atomic operation `op`, a number _shim.ATOMIC_*.  Returns the value before.

        OSError(EINVAL): no such operation, or not 4 or 8 bytes.
        """
        if size not in (4, 8) or not 0 <= op <= _shim.ATOMIC_CAS:
            raise OSError(errno.EINVAL, f"no atomic operation {op} on {size} bytes")
        self._check(iova, size, Access.READ | Access.WRITE)
        mask = (1 << 8 * size) - 1
        numbers = iova, op, size, operand & mask, compare & mask
        try:
            call = functools.partial(self._port.requester.atomic, *numbers, self._pasid)
            return self.whole(call, iova, Access.READ | Access.WRITE)
        except _Intercepted as intercepted:
            by = intercepted.by
        return by.tap.atomic(self._below(by), *numbers)

    def whole(self, call: Callable[[], _T], iova: int, access: Access) -> _T:
        """Carries out `call`, an access that cannot be split and for which the protocol has no message.

        After a fault that the IOMMU resolves, it is called again; whoever calls this must hold no lock that the answer
        to a page request may need.
        """
        for n in range(_TRIES):
            try:
                return call()
            except _shim.ByMessage as piece:
                raise self._reported(Reason.NO_FILE, iova, access, piece.done, piece.gpa) from None
            except DmaFault as fault:
                if not self._resolved(fault, ask=n < _TRIES - 1):
                    raise
        raise AssertionError("unreachable")

    @property
    def stats(self) -> DmaStats:
        """The counters, transfers by message included."""
        read_ops, read_bytes, write_ops, write_bytes, faults, hits, misses, stale = self._line.requester.stats()
        by_read, by_write = self._line.message_bytes
        # A fault that the IOMMU resolved, such as a table entry that was not read before, is invisible to the model.
        refused = faults - self._line.resolved
        return DmaStats(read_ops, read_bytes + by_read, write_ops, write_bytes + by_write, refused, hits, misses, stale)

    def close(self) -> None:
        """Releases the client; accesses fail from now on."""
        self.courier = None
        self.bus_master = False
