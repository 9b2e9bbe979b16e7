"""virtio-iommu (VIRTIO 1.3, 5.13): the guest maps by requests, and hears of faults by events."""

from __future__ import annotations

import enum
import errno
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vmodel._shim.viommu import RequestQueue
from vmodel.device import Msix, ResetKind, on_write
from vmodel.devices.iommu import IommuDevice
from vmodel.errors import Access, IommuError, Reason
from vmodel.iommu.core import Endpoint, Iommu, System, paging_domain_alloc
from vmodel.iommu.domain import Domain, PagingDomain
from vmodel.iommu.fault import FaultRecord
from vmodel.iommu.group import Group
from vmodel.pci.topology import Function, dma_aliases
from vmodel.points import Point
from vmodel.regs import RO, Reg8, Reg32, Reg64, RegisterBank
from vmodel.span import PAGE, Span
from vmodel.virtio.pci import DEVICE_CONFIG, VENDOR, VirtioDevice
from vmodel.virtio.queue import Chain, QueueError, Virtqueue

# Feature bits (5.13.3).
F_INPUT_RANGE, F_DOMAIN_RANGE, F_MAP_UNMAP, F_PROBE, F_MMIO, F_BYPASS_CONFIG = (1 << n for n in (0, 1, 2, 4, 5, 6))

#: Domain ids that the driver may use.
LAST_DOMAIN = 0xFFFF
#: Room for the properties of one endpoint.
PROBE_SIZE = 512
#: Events that wait for buffers of the driver's; later ones are lost.
MAX_EVENTS = 64

_REQUEST_QUEUE, _EVENT_QUEUE = 0, 1
_ATTACH_BYPASS = 1
_PROPERTY_RESV_MEM, _RESV_RESERVED, _RESV_MSI = 1, 0, 1


class Status(enum.IntEnum):
    """How a request ended (5.13.6)."""

    OK = 0
    IOERR = 1
    UNSUPP = 2
    DEVERR = 3
    INVAL = 4
    RANGE = 5
    NOENT = 6
    FAULT = 7
    NOMEM = 8


class MapFlags(enum.IntFlag):
    """Flags of MAP (5.13.6.5)."""

    READ = 1
    WRITE = 2
    MMIO = 4


class IommuRegs(RegisterBank, size=0x28):
    """Device configuration (5.13.4)."""

    PAGE_SIZE_MASK = Reg64(0x00, RO)
    INPUT_START = Reg64(0x08, RO)
    INPUT_END = Reg64(0x10, RO)
    DOMAIN_START = Reg32(0x18, RO)
    DOMAIN_END = Reg32(0x1C, RO)
    PROBE_SIZE = Reg32(0x20, RO)
    BYPASS = Reg8(0x24, reset=1, sticky=True, doc="whether endpoints without a domain reach memory")


class _Refused(Exception):
    """A request ends with a status other than OK."""

    def __init__(self, status: Status) -> None:
        super().__init__(status.name)
        self.status = status


@dataclass
class _Domain:
    """A domain of the guest's."""

    domain: Domain
    bypass: bool
    endpoints: set[int] = field(default_factory=set)

    @property
    def paging(self) -> PagingDomain:
        if not isinstance(self.domain, PagingDomain):
            raise _Refused(Status.INVAL)  # a bypass domain has no mappings
        return self.domain


class VirtioIommuDevice(IommuDevice, VirtioDevice):
    """virtio-iommu: the guest translates DMA of the devices behind it.

    State outlives a reset by the driver, as the guest may reset this device before those behind it are quiet; it goes
    at a reset of the function, and when a driver says DRIVER_OK anew.
    """

    vendor_id, device_id, class_code = VENDOR, 0x1057, 0x00FF00
    queue_sizes = (256, 64)
    offered = F_INPUT_RANGE | F_DOMAIN_RANGE | F_MAP_UNMAP | F_PROBE | F_MMIO | F_BYPASS_CONFIG
    #: Off: each request is carried out by Python, with the same results.
    fast_path = True
    config_regs = VirtioDevice.bar0.bank(IommuRegs, at=DEVICE_CONFIG)
    msix = Msix(vectors=3, own_bar=2)

    def serve(self, iommu: Iommu, system: System) -> None:
        super().serve(iommu, system)
        self._plain = RequestQueue(self.dma.requester)
        #: Endpoints by id; a bridge puts ids of its own in place of a device's.
        self._endpoints: dict[int, Endpoint] = {}
        for endpoint in self.covered():
            for number in self._ids(endpoint):
                self._endpoints.setdefault(number, endpoint)
        iommu.on_fault(lambda record: self.defer(lambda: self._report(record)))
        self._show_config()
        self._clear()

    def _show_config(self) -> None:
        can, regs = self.iommu.capabilities, self.config_regs
        regs.PAGE_SIZE_MASK = sum(can.page_sizes)
        regs.INPUT_START, regs.INPUT_END = can.usable.start, can.usable.last
        regs.DOMAIN_END = LAST_DOMAIN
        regs.PROBE_SIZE = PROBE_SIZE
        regs.BYPASS = 1

    def _ids(self, endpoint: Endpoint) -> set[int]:
        ids = set() if endpoint.requester_id is None else {endpoint.requester_id}
        if isinstance(endpoint.source, Function):
            first = int(self.iommu.driver.params.first_endpoint)
            ids |= {first + (a.bdf.segment << 16 | a.bdf.rid) for a in dma_aliases(endpoint.source)}
        return ids

    # ---- state -----------------------------------------------------------------------------

    def on_reset(self, kind: ResetKind) -> None:
        super().on_reset(kind)
        if hasattr(self, "iommu"):  # not yet when the model is made
            self._show_config()
            self._clear()

    def on_driver_ok(self) -> None:
        self._clear()

    def _clear(self) -> None:
        """No domains; all endpoints bypass, or are blocked."""
        self._domains: dict[int, _Domain] = {}
        self._domains_changed = True
        self._attached: dict[int, int] = {}
        self._faults: list[bytes] = []
        self._lost_faults = 0
        self._show_bypass()

    def _show_bypass(self) -> None:
        """What endpoints without a domain go through (5.13.6.1)."""
        default = self.iommu.identity if self.config_regs.BYPASS else self.iommu.blocked
        for group in self._groups():
            group.set_default(default)
            if not any(number in self._attached for number in self._members(group)):
                group.attach(default)

    def _groups(self) -> list[Group]:
        return [group for group in self.system.groups if group.iommu is self.iommu]

    def _members(self, group: Group) -> list[int]:
        return [number for number, endpoint in self._endpoints.items() if endpoint.group is group]

    @on_write(IommuRegs.BYPASS)
    def _bypass(self, new: int) -> int:
        if not self.features & F_BYPASS_CONFIG or new > 1:
            return self.config_regs.BYPASS
        self.config_regs.BYPASS = new
        self._show_bypass()
        return new

    # ---- requests --------------------------------------------------------------------------

    def on_queue(self, queue: Virtqueue) -> None:
        if queue.index == _EVENT_QUEUE:
            self._send_events()
            return
        while True:
            if self._may_be_fast():
                self._run_plain(queue)
            chain = queue.pop()
            if chain is None:
                return
            queue.answer(chain, self._request(queue, chain))

    def _may_be_fast(self) -> bool:
        """Whether the shim may carry plain requests out: not if somebody wants to hear of them."""
        wants = self.points.wants
        told = self.points.detailed or any(map(wants, (Point.IOMMU_MAP, Point.IOMMU_UNMAP, Point.INVALIDATE)))
        return self.fast_path and not told

    def _run_plain(self, queue: Virtqueue) -> None:
        """Has the shim take MAP and UNMAP requests, up to one that is not plain."""
        plain, state = self._plain, self._plain.state
        if self._domains_changed:
            plain.set_domains({n: d.paging.shim for n, d in self._domains.items() if not d.bypass})
            self._domains_changed = False
        state.descriptors, state.driver, state.device = queue.descriptors, queue.driver, queue.device
        state.size, state.indirect = queue.size, queue.indirect
        state.next_avail, state.next_used = queue.progress
        try:
            taken = plain.run()
        except OSError as error:
            raise QueueError(f"queue {queue.index}: the used ring: {error.strerror}") from error
        if taken:
            queue.progress = state.next_avail, state.next_used

    def _request(self, queue: Virtqueue, chain: Chain) -> bytes:
        """The bytes to write: properties of a PROBE, then the tail with the status."""
        data = queue.read(chain, 256)
        room = chain.write_size
        if room < 4:
            return b""  # no room for a tail: there is no way to answer
        kind = data[0] if data else 0
        handle, size, tail = self._HANDLERS.get(kind, (None, 0, 4))
        properties = b""
        if handle is None:
            status = Status.UNSUPP
        elif len(data) < size or room < tail:
            status = Status.INVAL
        else:
            try:
                properties = handle(self, data)
                status = Status.OK
            except _Refused as refused:
                status = refused.status
        end = struct.pack("<B3x", status)
        if kind == _PROBE and room >= PROBE_SIZE + 4:
            return properties.ljust(PROBE_SIZE, b"\0") + end
        return end

    def _endpoint(self, number: int) -> tuple[Endpoint, Group]:
        endpoint = self._endpoints.get(number)
        if endpoint is None or endpoint.group is None:
            raise _Refused(Status.NOENT)
        return endpoint, endpoint.group

    def _attach(self, data: bytes) -> bytes:
        number, endpoint_id, flags, reserved = struct.unpack_from("<III4s", data, 4)
        if flags & ~_ATTACH_BYPASS or any(reserved):
            raise _Refused(Status.INVAL)
        if number > LAST_DOMAIN:
            raise _Refused(Status.RANGE)
        bypass = bool(flags & _ATTACH_BYPASS)
        if bypass and not self.features & F_BYPASS_CONFIG:
            raise _Refused(Status.INVAL)
        endpoint, group = self._endpoint(endpoint_id)
        wanted = self._domains.get(number)
        if wanted is not None and wanted.bypass != bypass:
            raise _Refused(Status.INVAL)
        if wanted is None:
            wanted = _Domain(self.iommu.identity if bypass else paging_domain_alloc(endpoint), bypass)
        try:
            group.attach(wanted.domain)
        except IommuError:
            raise _Refused(Status.UNSUPP) from None
        self._leave(endpoint_id)
        self._domains[number] = wanted
        self._domains_changed = True
        wanted.endpoints.add(endpoint_id)
        self._attached[endpoint_id] = number
        return b""

    def _leave(self, endpoint_id: int) -> None:
        """Out of the domain that it is in; that one goes with its last endpoint (5.13.6.3)."""
        number = self._attached.pop(endpoint_id, None)
        if number is not None:
            domain = self._domains[number]
            domain.endpoints.discard(endpoint_id)
            if not domain.endpoints:
                del self._domains[number]
                self._domains_changed = True

    def _detach(self, data: bytes) -> bytes:
        number, endpoint_id, reserved = struct.unpack_from("<II8s", data, 4)
        if any(reserved):
            raise _Refused(Status.INVAL)
        _, group = self._endpoint(endpoint_id)
        if self._attached.get(endpoint_id) != number:
            raise _Refused(Status.INVAL)
        self._leave(endpoint_id)
        # Endpoints that cannot be told apart go together: the last one decides.
        if not any(other in self._attached for other in self._members(group)):
            group.attach(group.default_domain)
        return b""

    def _domain(self, number: int) -> _Domain:
        domain = self._domains.get(number)
        if domain is None:
            raise _Refused(Status.NOENT)
        return domain

    def _map(self, data: bytes) -> bytes:
        number, first, last, gpa, flags = struct.unpack_from("<IQQQI", data, 4)
        if flags >= 1 << 3 or last < first:
            raise _Refused(Status.INVAL)
        if flags & MapFlags.MMIO and not self.features & F_MMIO:
            raise _Refused(Status.INVAL)
        domain = self._domain(number).paging
        page = self.iommu.capabilities.smallest_page
        size = last - first + 1
        if (first | gpa | size) & (page - 1):
            raise _Refused(Status.RANGE)
        access = Access(flags & (MapFlags.READ | MapFlags.WRITE))
        if not access:
            return b""  # nothing may be done there, as if it were not mapped
        try:
            if self.points.wants(Point.IOMMU_MAP):
                about = self._about(number, domain, Span(first, last))
                self.points.at(Point.IOMMU_MAP, lambda _: domain.map(first, gpa, size, access), **about)
            else:
                domain.map(first, gpa, size, access)
        except IommuError as error:
            refused = {errno.EEXIST: Status.INVAL, errno.ERANGE: Status.RANGE, errno.EINVAL: Status.INVAL}
            raise _Refused(refused.get(error.errno or 0, Status.NOMEM)) from None
        return b""

    def _unmap(self, data: bytes) -> bytes:
        number, first, last, _ = struct.unpack_from("<IQQ4s", data, 4)
        domain = self._domain(number).paging
        if last < first:
            raise _Refused(Status.INVAL)
        page = self.iommu.capabilities.smallest_page
        if (first | last + 1) & (page - 1):
            raise _Refused(Status.RANGE)
        try:
            if self.points.wants(Point.IOMMU_UNMAP) or self.points.wants(Point.INVALIDATE):
                self._unmap_in_steps(number, domain, Span(first, last))
            else:
                domain.clear(Span(first, last))
        except IommuError:
            raise _Refused(Status.RANGE) from None
        return b""

    def _unmap_in_steps(self, number: int, domain: PagingDomain, span: Span) -> None:
        """The mapping goes, and then what IOTLBs have of it."""
        about = self._about(number, domain, span)

        def unmap(_: object) -> None:
            if domain.clear(span, flush=False):
                self.points.at(Point.INVALIDATE, lambda _: domain.flush_span(span), kind="iotlb", **about)

        self.points.at(Point.IOMMU_UNMAP, unmap, **about)

    def _about(self, number: int, domain: PagingDomain, span: Span) -> dict[str, Any]:
        """What an event at a fault point is about."""
        others = tuple(self._endpoints[n].name for n in sorted(self._domains[number].endpoints))
        return {"others": others, "domain": domain.name, "address": span.start, "size": span.size}

    def _probe(self, data: bytes) -> bytes:
        endpoint, _ = self._endpoint(struct.unpack_from("<I", data, 4)[0])
        found = b""
        for region in endpoint.reserved:
            kind = _RESV_MSI if region.type.value == "msi" else _RESV_RESERVED
            found += struct.pack("<HHB3xQQ", _PROPERTY_RESV_MEM, 20, kind, region.span.start, region.span.last)
        return found[: PROBE_SIZE // 24 * 24]

    #: By type: who answers, bytes to be read, bytes to be written.
    _HANDLERS: dict[int, tuple[Callable[[VirtioIommuDevice, bytes], bytes], int, int]]

    # ---- events ----------------------------------------------------------------------------

    def _report(self, record: FaultRecord) -> None:
        """A fault as an event (5.13.6.9), when there is a driver to hear of it."""
        if not self.driver_ok:
            return
        reason = 2 if record.reason in (Reason.NOT_MAPPED, Reason.PERMISSION, Reason.INPUT_WIDTH) else 0
        if record.reason is Reason.BLOCKED:
            reason = 1  # no domain
        flags = 0x100 | (1 if Access.READ in record.access else 0) | (2 if Access.WRITE in record.access else 0)
        if len(self._faults) < MAX_EVENTS:
            self._faults.append(struct.pack("<B3xIIIQ", reason, flags, record.requester_id, 0, record.iova & -PAGE))
        else:
            self._lost_faults += 1
        self._notified(_EVENT_QUEUE)

    def _send_events(self) -> None:
        queue = self.queues[_EVENT_QUEUE]
        while self._faults and (chain := queue.pop()) is not None:
            queue.answer(chain, self._faults.pop(0))


_ATTACH, _DETACH, _MAP, _UNMAP, _PROBE = 1, 2, 3, 4, 5
VirtioIommuDevice._HANDLERS = {
    _ATTACH: (VirtioIommuDevice._attach, 20, 4),
    _DETACH: (VirtioIommuDevice._detach, 20, 4),
    _MAP: (VirtioIommuDevice._map, 36, 4),
    _UNMAP: (VirtioIommuDevice._unmap, 28, 4),
    _PROBE: (VirtioIommuDevice._probe, 72, PROBE_SIZE + 4),
}
