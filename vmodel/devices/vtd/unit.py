"""`VtdDevice`: an Intel VT-d remapping unit for stock guests.

It is a PCI function whose BAR0 contains the unit's registers, at the address that DMAR gives.  A guest that uses the
unit must not see the function: Linux reserves the registers' addresses as "dmar0", would then find a conflict with the
BAR, and move it.  So once CAP has been read the function disappears from config space (vendor id ffff), while its BAR
stays decoded.  After a reset, when the firmware enumerates functions again, it is back.  It needs a slot of its own: a
guest does not probe other functions of a device without function 0.

Tables are read from shared memory (QEMU's memory-backend with share=on, as in vmodel's own arguments).  Memory that
only messages reach is treated as unreadable.

Scalable mode, and ATS with page requests (PRI), are optional parameters of the machine file.  A device with ATS enabled
keeps translations until a device-TLB invalidation.  If it has no translation for an access, it tries again with an
untranslated request, for which the unit reports the fault.

Not implemented: interrupt remapping.
"""

from __future__ import annotations

import errno
import struct
import time
from collections import deque
from collections.abc import Iterator
from functools import cached_property

from vmodel.device import MmioBar, PciDevice, ResetKind, on_read, on_write
from vmodel.devices.iommu import IommuDevice
from vmodel.devices.vtd.codes import FaultCode
from vmodel.devices.vtd.contexts import Contexts
from vmodel.devices.vtd.events import EventRegisters
from vmodel.devices.vtd.pages import PageRequests
from vmodel.devices.vtd.queue import (
    TURN,
    TURN_NS,
    QueueFault,
    QueueStopped,
    carry_out,
    check_mode,
    check_offsets,
    invalidate_contexts,
    invalidate_iotlb,
)
from vmodel.devices.vtd.regs import (
    PROTECTED_BITS,
    CompletionStatus,
    ContextCommand,
    FaultInfo,
    FaultStatus,
    Global,
    InvalidateAddress,
    IotlbInvalidate,
    ProtectedEnable,
    QueueAddress,
    QueueOffset,
    RecordRegs,
    RootAddress,
    VtdRegs,
    check,
)
from vmodel.errors import Access, DmaFault, PeerError, Reason
from vmodel.iommu.drivers.vtd_capability import (
    RECORDS_AT,
    Ecap,
    record_count,
    vtd_capability,
    vtd_extended_capability,
)
from vmodel.iommu.endpoint import Endpoint
from vmodel.iommu.fault import FaultRecord, PageRequest, PageResponse
from vmodel.iommu.iommu import Iommu
from vmodel.iommu.system import System
from vmodel.pci.caps import Capability
from vmodel.pci.extcaps import Ats, Pri, PriSta
from vmodel.points import InterruptEvent, Point
from vmodel.span import PAGE, MiB, Span

_STATE = struct.Struct("<QBB")
#: Most faults that wait to be recorded; the fault recording registers overflow long before.
_MOST_ARRIVED = 64
#: The stored bits of FSTS; PPF and FRI are computed from the records.
_KEPT = FaultStatus.PFO.mask | FaultStatus.IQE.mask
_NOBODY = 0xFFFF
_ALL = (1 << 64) - 1


class VtdDevice(IommuDevice):
    """Intel VT-d remapping unit."""

    # Nobody's ids: no driver is to bind.  Class: a system peripheral without a kind.
    vendor_id, device_id, class_code = 0x1234, 0x56D0, 0x088000
    subsystem_vendor_id, subsystem_id = vendor_id, device_id
    # SeaBIOS puts the largest BAR first, and all of them as far up below the I/O APIC (0xfec0_0000) as its alignment
    # allows.  One of 256 MiB is at 0xe000_0000 whatever the others are, as long as they and the windows of bridges take
    # no more than 236 MiB; one of 16 MiB moves when there are some root ports.
    base = 0xE000_0000

    bar0 = MmioBar(0, size=256 * MiB, fill=0)
    regs = bar0.bank(VtdRegs, at=0)
    records = bar0.bank(RecordRegs, at=RECORDS_AT)

    contexts: Contexts | None = None
    pages: PageRequests
    _cap = _ecap = 0
    _misplaced = False
    _misplacement_logged = False
    #: Whether a turn of the invalidation queue has been deferred.
    _turn_due = False

    # ---- life -------------------------------------------------------------------------------

    def serve(self, iommu: Iommu, system: System) -> None:
        super().serve(iommu, system)
        can, params = iommu.capabilities, iommu.driver.params
        check(can, params)
        self._cap = vtd_capability(can, scalable=params.scalable, caching_mode=params.caching_mode)
        self._ecap = vtd_extended_capability(can, scalable=params.scalable, ats=params.ats)
        self._record_count = record_count(can)
        self.contexts = Contexts(
            iommu,
            self.covered,
            self.memory,
            self._cap,
            self._ecap,
            self._ats,
            self._ask if Ecap(self._ecap).PRS else None,
            self.points,
        )
        self.pages = PageRequests(self.regs, self.contexts.dma, self._page_event, self.defer)
        for endpoint in self.covered():
            endpoint.max_pasids = None  # the unit translates by the guest's tables whatever PASID a request carries
        iommu.resolver = self._resolve
        iommu.on_fault(self._on_fault)
        self.on_reset(ResetKind.DEVICE)

    def on_reset(self, kind: ResetKind) -> None:
        self._misplaced = self._misplacement_logged = self._turn_due = False
        self._arrived: deque[tuple[FaultRecord, FaultCode]] = deque()
        self._next_record = 0
        if self.contexts is not None:
            self.regs.CAP, self.regs.ECAP = self._cap, self._ecap
            self.pages.cancel()
            self.contexts.tables.root = 0
            self.contexts.enabled = False
            self.contexts.protect(())

    def save_extra(self) -> bytes:
        contexts = self.contexts
        return _STATE.pack(
            contexts.tables.root if contexts else 0, self._next_record, bool(contexts and contexts.enabled)
        )

    def restore_extra(self, data: bytes) -> None:
        try:
            root, next_record, enabled = _STATE.unpack(data)
        except struct.error:
            raise PeerError(errno.EINVAL, f"{self.name}: {len(data)} bytes of state, not {_STATE.size}") from None
        if (contexts := self.contexts) is not None:
            self._next_record = next_record % self._record_count
            # The caches are not migrated: they start empty.  Protected memory is set once the registers are loaded.
            contexts.tables.root = self._root_of(root)
            contexts.enable(bool(enabled))
            self.defer(self._protect)
            self.defer(self._run_queue)  # descriptors may have been left

    # ---- where the registers are ------------------------------------------------------------

    def on_enables(self) -> None:
        address = self.config.bar_address(0)
        wrong = bool(self.config.command.MEMORY) and address != self.base
        if wrong and not self._misplacement_logged:
            self._misplacement_logged = True
            self.log.error(
                "%s: the firmware has placed the registers at %#x, DMAR says %#x: the guest cannot use the unit",
                self.name,
                address,
                self.base,
            )
        self._misplaced = wrong

    # At DMAR's address QEMU then answers zeros; Linux reports "No supported address widths" and does not use the unit.
    # A read of the misplaced registers themselves gives all ones, which Linux takes for an absent unit.
    @on_read(VtdRegs.CAP)
    def _read_cap(self, stored: int) -> int:
        if self._misplaced:
            return _ALL
        header = self.config.header
        header.VENDOR_ID = header.DEVICE_ID = _NOBODY
        return stored

    @on_read(VtdRegs.ECAP)
    def _read_ecap(self, stored: int) -> int:
        return _ALL if self._misplaced else stored

    # ---- commands ---------------------------------------------------------------------------

    @on_write(VtdRegs.GCMD)
    def _global_command(self, new: int) -> None:
        asked, contexts = Global(new), self.contexts
        if contexts is None:
            return
        if asked.ROOT:
            contexts.tables.root = self.regs.RTADDR
            self._set_status(Global.ROOT.mask, True)
        before = Global(self.regs.GSTS)
        if asked.QI != before.QI:
            self.regs.IQH = 0
            self._set_status(Global.QI.mask, bool(asked.QI))
            self._run_queue()
        if asked.TRANSLATION != before.TRANSLATION:
            contexts.enable(bool(asked.TRANSLATION))
            self._set_status(Global.TRANSLATION.mask, bool(asked.TRANSLATION))

    def _root_of(self, value: int) -> int:
        """The implemented bits of a value for RTADDR."""
        scalable = RootAddress.TTM.mask if Ecap(self._ecap).SMTS else 0
        return value & (RootAddress.RTA.mask | scalable)

    @on_write(VtdRegs.RTADDR)
    def _root_address(self, new: int) -> int:
        return self._root_of(new)

    def _set_status(self, mask: int, on: bool) -> None:
        self.regs.GSTS = self.regs.GSTS | mask if on else self.regs.GSTS & ~mask

    @on_write(VtdRegs.CCMD)
    def _context_command(self, new: int) -> int:
        asked = ContextCommand(new)
        if not asked.ICC or self.contexts is None:
            return new
        done = invalidate_contexts(self.contexts, asked.CIRG, asked.DID, asked.SID, asked.FM)
        new = ContextCommand.CAIG.put(new, asked.CIRG if done else 0)
        return ContextCommand.ICC.put(new, 0)

    @on_write(VtdRegs.IOTLB)
    def _iotlb(self, new: int) -> int:
        asked, where = IotlbInvalidate(new), InvalidateAddress(self.regs.IVA)
        if not asked.IVT or self.contexts is None:
            return new
        done = invalidate_iotlb(self.contexts, asked.IIRG, asked.DID, where.ADDR, where.AM)
        new = IotlbInvalidate.IAIG.put(new, asked.IIRG if done else 0)
        return IotlbInvalidate.IVT.put(new, 0)

    # ---- protected memory -------------------------------------------------------------------

    @on_write(VtdRegs.PMEN)
    def _protected_enable(self, new: int) -> int:
        on = ProtectedEnable(new).EPM
        self.regs.PMEN = ProtectedEnable.PRS.put(new, on)
        self._protect()
        return self.regs.PMEN

    def _protect(self) -> None:
        if self.contexts is not None:
            self.contexts.protect(self._protected() if ProtectedEnable(self.regs.PMEN).EPM else ())

    def _protected(self) -> Iterator[Span]:
        regs = self.regs
        for start, limit in ((regs.PLMBASE, regs.PLMLIMIT), (regs.PHMBASE, regs.PHMLIMIT)):
            if start <= limit and limit:  # a guess: base above limit, and the reset value 0, mean no region
                yield Span(start, limit | (1 << PROTECTED_BITS) - 1)

    # ---- invalidation queue -----------------------------------------------------------------

    @on_write(VtdRegs.IQA)
    def _queue_address(self, new: int) -> int:
        return new if Ecap(self._ecap).SMTS else QueueAddress.DW.put(new, 0)

    @on_write(VtdRegs.IQT)
    def _tail(self, new: int) -> None:
        self._run_queue()

    def _run_queue(self) -> None:
        """Has the queue served until it is empty, in turns: other accesses and a stop of the server come in between."""
        if not self._turn_due:
            self._turn_due = True
            self.defer(self._turn)

    def _turn(self) -> None:
        self._turn_due = False
        try:
            if self._serve_queue():
                self._run_queue()
        except QueueStopped as stopped:
            self.log.info("%s: the invalidation queue stops at %#x: %s", self.name, self.regs.IQH, stopped)
            self.regs.IQER = stopped.why
            self._raise_status(FaultStatus.IQE.mask)

    def _serve_queue(self) -> bool:
        """Carries out descriptors up to a turn's limits; returns whether there are more.  QueueStopped."""
        regs, contexts = self.regs, self.contexts
        if contexts is None or not Global(regs.GSTS).QI or FaultStatus(regs.FSTS).IQE:
            return False
        queue = QueueAddress(regs.IQA)
        size, width = PAGE << queue.QS, 32 if queue.DW else 16
        table = regs.IQA & QueueAddress.IQA.mask
        tail = regs.IQT & QueueOffset.OFFSET.mask
        check_offsets(regs.IQH, tail, size, width)
        until = time.monotonic_ns() + TURN_NS
        for _ in range(TURN):
            if tail == regs.IQH or time.monotonic_ns() >= until:
                break
            check_mode(contexts.tables.root, bool(queue.DW))
            try:
                data = contexts.dma.read((table + regs.IQH) & _ALL, width)
            except DmaFault:
                raise QueueStopped(QueueFault.FETCH) from None
            carry_out(contexts, struct.unpack(f"<{width // 8}Q", data), self)
            regs.IQH = (regs.IQH + width) % size
        return tail != regs.IQH

    def wait(self, address: int | None, data: int, interrupt: bool) -> None:
        """Carries out an invalidation wait descriptor; earlier descriptors are complete.  QueueStopped."""
        if address is not None and self.contexts is not None:
            try:
                self.contexts.dma.write(address, data.to_bytes(4, "little"))
            except DmaFault as fault:
                self.log.info("%s: the status of an invalidation cannot be written: %s", self.name, fault)
                raise QueueStopped(QueueFault.UNKNOWN) from None
        if interrupt and not CompletionStatus(self.regs.ICS).IWC:
            self.regs.ICS |= CompletionStatus.IWC.mask
            self._completion_event.happen()

    def answer(self, source: int, pasid: int | None, index: int, response: PageResponse) -> None:
        """Carries out a page group response descriptor."""
        self.pages.answer(source, pasid, index, response)

    @on_read(VtdRegs.IECTL)
    def _read_completion_control(self, stored: int) -> int:
        return self._completion_event.read_control(stored)

    @on_write(VtdRegs.IECTL)
    def _completion_control(self, new: int) -> int:
        return self._completion_event.write_control(new)

    # ---- devices' own TLBs, and page requests -----------------------------------------------

    def _capability(self, name: str, kind: type[Capability]) -> Capability | None:
        device = self.peers.get(name)
        if device is None:
            return None
        return next((c for c in device.config.capabilities if isinstance(c, kind)), None)

    def _ats(self, endpoint: Endpoint) -> bool:
        ats = self._capability(endpoint.name, Ats) if Ecap(self._ecap).DT else None
        return isinstance(ats, Ats) and ats.enabled

    def _resolve(self, endpoint: Endpoint, fault: DmaFault) -> bool:
        assert self.contexts is not None
        pri = self._capability(endpoint.name, Pri)
        if isinstance(pri, Pri) and pri.enabled and not PriSta(pri.regs.STATUS).RESPONSE_FAILURE:
            endpoint.enable_page_requests()
        return self.contexts.resolve(endpoint, fault)

    def _ask(self, request: PageRequest) -> PageResponse:
        """Handles a page request, on the thread of the device, whose access waits."""
        assert self.contexts is not None
        endpoint, pri = self.system[request.requester], self._capability(request.requester, Pri)
        source = endpoint.requester_id
        if source is None or not isinstance(pri, Pri) or not pri.enabled or not self._ats(endpoint):
            return PageResponse.INVALID
        if not self.contexts.may_ask(source, request.pasid):
            return PageResponse.INVALID
        response = self.pages.ask(self.peers[request.requester], source, request)
        if response is PageResponse.FAILURE:
            pri.regs.STATUS |= PriSta.RESPONSE_FAILURE.mask
        return response

    @on_read(VtdRegs.PECTL)
    def _read_page_control(self, stored: int) -> int:
        return self._page_event.read_control(stored)

    @on_write(VtdRegs.PECTL)
    def _page_control(self, new: int) -> int:
        return self._page_event.write_control(new)

    # ---- faults -----------------------------------------------------------------------------

    def _on_fault(self, record: FaultRecord) -> None:
        """Queues a fault to be recorded; called on the thread of the device whose access has failed."""
        assert self.contexts is not None
        code = self.contexts.code_of(record)
        if code is not None and len(self._arrived) < _MOST_ARRIVED:
            self._arrived.append((record, code))
            self.defer(self._record)

    def _record(self) -> None:
        if not self._arrived:  # a reset has cleared it
            return
        record, code = self._arrived.popleft()
        if FaultStatus(self.regs.FSTS).PFO:  # 7.2.1: no faults are recorded while PFO is set
            return
        cells, at = self.records.cells[64], 2 * self._next_record
        if FaultInfo(cells[at + 1]).F:
            self._raise_status(FaultStatus.PFO.mask, record.requester)
            return
        info = FaultInfo.F.mask
        for field, value in (
            (FaultInfo.SID, record.requester_id & 0xFFFF),
            (FaultInfo.PP, int(record.pasid is not None)),
            (FaultInfo.PV, record.pasid or 0),
            (FaultInfo.FR, code),
            (FaultInfo.T, int(Access.WRITE not in record.access)),
        ):
            info = field.put(info, value)
        quiet = not self._status()
        cells[at], cells[at + 1] = record.iova // PAGE * PAGE, info
        self._next_record = (self._next_record + 1) % self._record_count
        if quiet:
            self._fault_event.happen(record.requester)

    def _oldest(self) -> int | None:
        """The index of the oldest record with F set; None: there is none."""
        for n in range(self._next_record, self._next_record + self._record_count):
            if FaultInfo(self.records.cells[64][2 * (n % self._record_count) + 1]).F:
                return n % self._record_count
        return None

    def _status(self) -> int:
        """The value of FSTS, with PPF and FRI."""
        stored, oldest = self.regs.FSTS, self._oldest()
        return stored if oldest is None else FaultStatus.FRI.put(stored | FaultStatus.PPF.mask, oldest)

    def _raise_status(self, mask: int, culprit: str = "") -> None:
        """Sets bits of FSTS; raises an interrupt only if no bit was set before (7.3)."""
        quiet = not self._status()
        self.regs.FSTS |= mask
        if quiet:
            self._fault_event.happen(culprit)

    @on_read(VtdRegs.FSTS)
    def _read_status(self, stored: int) -> int:
        return self._status()

    @on_write(VtdRegs.FSTS)
    def _write_status(self, new: int) -> int:
        stopped = FaultStatus(self.regs.FSTS).IQE
        self.regs.FSTS = new & _KEPT
        if stopped and not FaultStatus(new).IQE:
            self.regs.IQER = 0
            self._run_queue()  # the queue continues at the descriptor where it stopped
        return self.regs.FSTS

    @on_read(VtdRegs.FECTL)
    def _read_fault_control(self, stored: int) -> int:
        return self._fault_event.read_control(stored)

    @on_write(VtdRegs.FECTL)
    def _fault_control(self, new: int) -> int:
        return self._fault_event.write_control(new)

    # ---- interrupts -------------------------------------------------------------------------

    @cached_property
    def _fault_event(self) -> EventRegisters:
        return EventRegisters(self.regs, "FE", self._status, self._send)

    @cached_property
    def _completion_event(self) -> EventRegisters:
        return EventRegisters(self.regs, "IE", lambda: self.regs.ICS, self._send)

    @cached_property
    def _page_event(self) -> EventRegisters:
        return EventRegisters(self.regs, "PE", lambda: self.regs.PRS, self._send)

    def _send(self, address: int, data: int, culprit: str = "") -> None:
        """Sends an interrupt message: writes 4 bytes to `address`.

        QEMU carries out a DMA_WRITE only if the function of that socket has bus mastering enabled.  This function has
        not (see Contexts.dma), so a device behind the unit sends the message: preferably the one that caused the
        interrupt, as it was about to do DMA.
        """
        self.points.at(
            InterruptEvent(Point.IRQ, kind="msi", vector=0), lambda _: self._send_now(address, data, culprit)
        )

    def _send_now(self, address: int, data: int, culprit: str) -> None:
        devices: list[PciDevice] = [self]
        devices += [self.peers[e.name] for e in self.covered() if e.name in self.peers]
        devices = [device for device in devices if device.dma.bus_master and device.dma.courier is not None]
        devices.sort(key=lambda device: device.name != culprit)
        self._send_by(devices, address, data.to_bytes(4, "little"))

    def _send_by(self, devices: list[PciDevice], address: int, data: bytes) -> None:
        if not devices:
            self.log.error("%s: no device has bus mastering on: an interrupt is lost", self.name)
            return
        device, others = devices[0], devices[1:]

        # The unit's thread must not wait for the message: the client may answer it only after its own request is
        # answered.
        def send() -> None:
            courier = device.dma.courier
            try:
                if courier is None:
                    raise DmaFault(Reason.CLIENT, address, Access.WRITE)
                courier.write(address, data)
            except DmaFault as fault:
                self.log.info("%s: %s could not send an interrupt: %s", self.name, device.name, fault)
                self.defer(lambda: self._send_by(others, address, data))

        device.defer(send, by=self)
