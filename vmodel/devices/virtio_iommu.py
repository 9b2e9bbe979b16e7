"""virtio-iommu (VIRTIO 1.3, 5.13): the guest maps by requests on one queue, and gets faults as events on another."""

from __future__ import annotations

import enum
import errno
import struct
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from vmodel._shim.viommu import RequestQueue
from vmodel.device import Msix, ResetKind, on_write
from vmodel.devices.iommu import IommuDevice
from vmodel.errors import Access, ConfigError, IommuError, Reason
from vmodel.iommu.allocate import paging_domain_alloc
from vmodel.iommu.capabilities import RegionType, ReservedRegion
from vmodel.iommu.domain import Domain, PagingDomain
from vmodel.iommu.endpoint import Endpoint
from vmodel.iommu.fault import FaultRecord
from vmodel.iommu.group import Group
from vmodel.iommu.iommu import Iommu
from vmodel.iommu.system import System
from vmodel.pci.topology import Function, dma_aliases
from vmodel.points import InvalidationEvent, MappingEvent, Point
from vmodel.regs import RO, Reg8, Reg32, Reg64, RegisterBank
from vmodel.span import Span
from vmodel.virtio.pci import DEVICE_CONFIG, VENDOR, VirtioDevice
from vmodel.virtio.queue import Chain, QueueError, Virtqueue

# Feature bits (5.13.3).
F_INPUT_RANGE, F_DOMAIN_RANGE, F_MAP_UNMAP, F_PROBE, F_MMIO, F_BYPASS_CONFIG = (1 << n for n in (0, 1, 2, 4, 5, 6))

#: The largest domain id that the driver may use.
LAST_DOMAIN = 0xFFFF
#: Bytes for the properties of one endpoint.
PROBE_SIZE = 512
#: Most faults that wait for a buffer in the event queue; further ones are dropped (5.13.6.9).
MAX_EVENTS = 64

_REQUEST_QUEUE, _EVENT_QUEUE = 0, 1
_ATTACH_BYPASS = 1
_PROPERTY_RESV_MEM, _RESV_RESERVED, _RESV_MSI = 1, 0, 1
_RESV_SIZE = 24
_FAULT = struct.Struct("<B3xIIIQ")


class RequestStatus(enum.IntEnum):
    """Status of a request (5.13.6)."""

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


class _Unknown(Exception):
    """A request of unknown type: its buffers are returned unchanged."""


class _Refused(Exception):
    """A request that ends with a status other than OK."""

    def __init__(self, status: RequestStatus) -> None:
        super().__init__(status.name)
        self.status = status


@dataclass
class _Domain:
    """A domain that the guest has made."""

    domain: Domain
    bypass: bool
    endpoints: set[int] = field(default_factory=set)
    #: IOVAs that must not be mapped: the reserved regions of its endpoints.
    reserved: list[Span] = field(default_factory=list)

    @property
    def paging(self) -> PagingDomain:
        if not isinstance(self.domain, PagingDomain):
            raise _Refused(RequestStatus.INVAL)  # a bypass domain has no mappings
        return self.domain


class VirtioIommuDevice(IommuDevice, VirtioDevice):
    """virtio-iommu: the guest controls the translation of DMA of the devices behind it.

    Domains and mappings survive a reset by the driver, as the guest may reset this device before the devices behind it
    have stopped DMA.  A reset of the function clears them, and so does a driver that sets DRIVER_OK again.
    """

    vendor_id, device_id, class_code = VENDOR, 0x1057, 0x00FF00
    queue_sizes = (256, 64)
    offered = F_INPUT_RANGE | F_DOMAIN_RANGE | F_MAP_UNMAP | F_PROBE | F_MMIO | F_BYPASS_CONFIG
    #: Whether the shim carries out plain MAP and UNMAP requests.  If not, Python does, with the same results.
    fast_path = True
    config_regs = VirtioDevice.bar0.bank(IommuRegs, at=DEVICE_CONFIG)
    msix = Msix(vectors=3, own_bar=2)

    def serve(self, iommu: Iommu, system: System) -> None:
        super().serve(iommu, system)
        if iommu.driver.params.mmio:
            raise ConfigError(
                "params.mmio: a guest drives this IOMMU, which then covers PCI functions only: leave it out"
            )
        self._plain = RequestQueue(self.dma.requester)
        #: Endpoints by id, including the ids of bridges that replace a device's own (aliases).
        self._endpoints: dict[int, Endpoint] = {}
        for endpoint in self.covered():
            for number in self._ids(endpoint):
                self._endpoints.setdefault(number, endpoint)
        for endpoint in self._endpoints.values():
            if len(regions := _regions(endpoint)) > PROBE_SIZE // _RESV_SIZE:
                raise ConfigError(
                    f"{endpoint.name} has {len(regions)} reserved regions: "
                    f"a virtio-iommu can report {PROBE_SIZE // _RESV_SIZE}"
                )
        #: Faults not reported to the driver yet: any thread adds them, the device's thread sends them.
        self._faults: deque[FaultRecord] = deque()
        self._faults_lock = threading.Lock()
        #: Faults dropped without a report to the driver, since the device was made.
        self.dropped_faults = 0
        iommu.on_fault(self._report)
        self._store_config()
        self._clear()

    def _store_config(self) -> None:
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
        if hasattr(self, "iommu"):  # not set yet in the reset when the model is made
            self._store_config()
            self._clear()

    def on_driver_ok(self) -> None:
        self._clear()

    def _clear(self) -> None:
        """Removes all domains: each endpoint bypasses translation or is blocked, by BYPASS."""
        self._domains: dict[int, _Domain] = {}
        self._domains_changed = True
        self._attached: dict[int, int] = {}
        self._discard_faults()
        self._apply_bypass()

    def _apply_bypass(self) -> None:
        """Sets the domain of endpoints that the driver has not attached: identity or blocked (5.13.6.1)."""
        default = self.iommu.identity if self.config_regs.BYPASS else self.iommu.blocked
        for group in self._groups():
            group.set_default(default, forced=True)
            self._attach_group(group)

    def _attach_group(self, group: Group) -> None:
        """Attaches a group to the domain of the member that was attached last, else to its default domain."""
        members = set(self._members(group))
        number = next((self._attached[n] for n in reversed(self._attached) if n in members), None)
        group.replace(group.default_domain if number is None else self._domains[number].domain)

    def _groups(self) -> list[Group]:
        return [group for group in self.system.groups if group.iommu is self.iommu]

    def _members(self, group: Group) -> list[int]:
        return [number for number, endpoint in self._endpoints.items() if endpoint.group is group]

    @on_write(IommuRegs.BYPASS)
    def _bypass(self, new: int) -> int:
        if not self.features & F_BYPASS_CONFIG or new > 1:
            return self.config_regs.BYPASS
        self.config_regs.BYPASS = new
        self._apply_bypass()
        return new

    # ---- requests --------------------------------------------------------------------------

    def on_queue(self, queue: Virtqueue) -> None:
        if queue.index == _EVENT_QUEUE:
            self._send_events()
            return
        while not queue.spent:
            if self._may_run_plain():
                self._run_plain(queue)
            chain = queue.pop()
            if chain is None:
                return
            queue.answer(chain, self._request(queue, chain))

    def _may_run_plain(self) -> bool:
        """Whether the shim may carry out MAP and UNMAP requests: they are negotiated, and no point of them is armed."""
        if not self.features & F_MAP_UNMAP:
            return False
        own = Point.IOMMU_MAP, Point.IOMMU_UNMAP, Point.INVALIDATE
        armed = self.points.detailed or any(self.points.armed(point) for point in own)
        return self.fast_path and not armed

    def _run_plain(self, queue: Virtqueue) -> None:
        """Lets the shim carry out MAP and UNMAP requests, up to the first request that it leaves to Python."""
        plain, state = self._plain, self._plain.state
        if self._domains_changed:
            plain.set_domains(
                (number, domain.paging.shim, [(span.start, span.last) for span in domain.reserved])
                for number, domain in self._domains.items()
                if not domain.bypass
            )
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
            queue.charge(taken)

    def _request(self, queue: Virtqueue, chain: Chain) -> bytes:
        """Carries out a request; returns the answer: properties of a PROBE, then the tail with the status.

        An empty answer leaves the driver's buffer unchanged.
        """
        data = queue.read(chain, _LONGEST)
        room = chain.write_size
        if room < _TAIL:
            return b""  # the buffer has no room for the tail
        properties = bytes(min(PROBE_SIZE, room - _TAIL)) if data[:1] == bytes([_PROBE]) else b""
        status = RequestStatus.OK
        try:
            found = self._carry_out(data, room)
            properties = found.ljust(len(properties), b"\0")
        except _Unknown:
            return b""
        except _Refused as refused:
            status = refused.status
        return properties + struct.pack("<B3x", status)

    def _carry_out(self, data: bytes, room: int) -> bytes:
        """Carries out a request; returns the properties of a PROBE, else b"".  _Unknown, _Refused."""
        kind = data[0] if data else 0
        handle, size, tail, feature = self._HANDLERS.get(kind, (None, 0, 0, 0))
        if handle is None or feature & ~self.features:
            raise _Unknown
        if len(data) < size or room < tail:
            raise _Refused(RequestStatus.INVAL)
        return handle(self, data)

    def _endpoint(self, number: int) -> tuple[Endpoint, Group]:
        endpoint = self._endpoints.get(number)
        if endpoint is None or endpoint.group is None:
            raise _Refused(RequestStatus.NOENT)
        return endpoint, endpoint.group

    def _attach(self, data: bytes) -> bytes:
        number, endpoint_id, flags, reserved = struct.unpack_from("<III4s", data, 4)
        if flags & ~_ATTACH_BYPASS or any(reserved):
            raise _Refused(RequestStatus.INVAL)
        if number > LAST_DOMAIN:
            raise _Refused(RequestStatus.RANGE)
        bypass = bool(flags & _ATTACH_BYPASS)
        if bypass and not self.features & F_BYPASS_CONFIG:
            raise _Refused(RequestStatus.INVAL)
        endpoint, group = self._endpoint(endpoint_id)
        wanted = self._domains.get(number)
        if wanted is not None and wanted.bypass != bypass:
            raise _Refused(RequestStatus.INVAL)
        if wanted is None:
            wanted = _Domain(self.iommu.identity if bypass else paging_domain_alloc(endpoint), bypass)
        if not bypass and any(wanted.paging.is_mapped(region.span) for region in _regions(endpoint)):
            raise _Refused(RequestStatus.UNSUPP)  # the domain maps IOVAs that this endpoint has reserved
        try:
            group.replace(wanted.domain)
        except OSError as error:  # IommuError is one
            raise _Refused(RequestStatus.NOMEM if error.errno == errno.ENOMEM else RequestStatus.UNSUPP) from None
        self._remove_endpoint(endpoint_id)
        self._domains[number] = wanted
        wanted.endpoints.add(endpoint_id)
        self._changed(wanted)
        self._attached[endpoint_id] = number
        return b""

    def _remove_endpoint(self, endpoint_id: int) -> None:
        """Removes an endpoint from its domain, and the domain with its last endpoint (5.13.6.4)."""
        number = self._attached.pop(endpoint_id, None)
        if number is not None:
            domain = self._domains[number]
            domain.endpoints.discard(endpoint_id)
            if not domain.endpoints:
                del self._domains[number]
            self._changed(domain)

    def _changed(self, domain: _Domain) -> None:
        """Updates a domain's reserved IOVAs after a change of its endpoints: those of any of them."""
        domain.reserved = [*{region.span: None for n in domain.endpoints for region in _regions(self._endpoints[n])}]
        self._domains_changed = True

    def _detach(self, data: bytes) -> bytes:
        number, endpoint_id = struct.unpack_from("<II", data, 4)
        _, group = self._endpoint(endpoint_id)
        if self._attached.get(endpoint_id) != number:
            raise _Refused(RequestStatus.INVAL)
        self._remove_endpoint(endpoint_id)
        self._attach_group(group)  # all endpoints of a group have one domain
        return b""

    def _domain(self, number: int) -> _Domain:
        domain = self._domains.get(number)
        if domain is None:
            raise _Refused(RequestStatus.NOENT)
        return domain

    def _map(self, data: bytes) -> bytes:
        number, first, last, gpa, flags = struct.unpack_from("<IQQQI", data, 4)
        if flags >= 1 << 3 or last < first:
            raise _Refused(RequestStatus.INVAL)
        if flags & MapFlags.MMIO and not self.features & F_MMIO:
            raise _Refused(RequestStatus.INVAL)
        known = self._domain(number)
        domain = known.paging
        page = self.iommu.capabilities.smallest_page
        size = last - first + 1
        if (first | gpa | size) & (page - 1):
            raise _Refused(RequestStatus.RANGE)
        span = Span(first, last)
        if not domain.aperture.covers(span):
            raise _Refused(RequestStatus.RANGE)
        if any(reserved.overlaps(span) for reserved in known.reserved):
            raise _Refused(RequestStatus.INVAL)
        access = Access(flags & (MapFlags.READ | MapFlags.WRITE))

        def carry_out(_: object = None) -> None:
            if access:
                domain.map(first, gpa, size, access)
            else:
                domain.map_inaccessible(first, gpa, size)

        try:
            if self.points.armed(Point.IOMMU_MAP):
                self.points.at(self._mapping(Point.IOMMU_MAP, number, domain, span), carry_out)
            else:
                carry_out()
        except IommuError as error:
            refused = {
                errno.EEXIST: RequestStatus.INVAL,
                errno.ERANGE: RequestStatus.RANGE,
                errno.EINVAL: RequestStatus.INVAL,
            }
            raise _Refused(refused.get(error.errno or 0, RequestStatus.NOMEM)) from None
        return b""

    def _unmap(self, data: bytes) -> bytes:
        number, first, last = struct.unpack_from("<IQQ", data, 4)
        domain = self._domain(number).paging
        if last < first:
            raise _Refused(RequestStatus.INVAL)
        try:
            if self.points.armed(Point.IOMMU_UNMAP) or self.points.armed(Point.INVALIDATE):
                self._unmap_in_steps(number, domain, Span(first, last))
            else:
                domain.clear(Span(first, last))
        except IommuError:
            raise _Refused(RequestStatus.RANGE) from None
        return b""

    def _unmap_in_steps(self, number: int, domain: PagingDomain, span: Span) -> None:
        """Removes the mappings, then invalidates the IOTLBs: each is a fault point of its own."""
        event = self._mapping(Point.IOMMU_UNMAP, number, domain, span)

        def unmap(_: object) -> None:
            if domain.clear(span, flush=False):
                gone = InvalidationEvent(
                    Point.INVALIDATE,
                    others=event.others,
                    kind="iotlb",
                    domain=domain.name,
                    address=span.start,
                    size=span.size,
                )
                self.points.at(gone, lambda _: domain.flush_span(span))

        self.points.at(event, unmap)

    def _mapping(self, point: Point, number: int, domain: PagingDomain, span: Span) -> MappingEvent:
        """The event of a request."""
        others = tuple(self._endpoints[n].name for n in sorted(self._domains[number].endpoints))
        return MappingEvent(point, others=others, domain=domain.name, address=span.start, size=span.size)

    def _probe(self, data: bytes) -> bytes:
        endpoint, _ = self._endpoint(struct.unpack_from("<I", data, 4)[0])
        found = b""
        for region in _regions(endpoint):
            kind = _RESV_MSI if region.type is RegionType.MSI else _RESV_RESERVED
            found += struct.pack("<HHB3xQQ", _PROPERTY_RESV_MEM, 20, kind, region.span.start, region.span.last)
        return found

    #: By request type: (handler, bytes of the request, bytes of the answer, feature bit that it needs or 0).
    _HANDLERS: dict[int, tuple[Callable[[VirtioIommuDevice, bytes], bytes], int, int, int]]

    # ---- events ----------------------------------------------------------------------------

    def _report(self, record: FaultRecord) -> None:
        """Queues a fault as an event for the driver, if there is one.  Called on the thread of the failed access."""
        if not self.driver_ok:
            return
        with self._faults_lock:
            full = len(self._faults) >= MAX_EVENTS
            if full:
                self.dropped_faults += 1
            else:
                self._faults.append(record)
        if full:
            self.log.warning("%s: a fault is dropped: no buffers in the event queue", self.name)
        elif not self.queues[_EVENT_QUEUE].due:
            self.queues[_EVENT_QUEUE].due = True
            self.defer(lambda: self._turn(self.queues[_EVENT_QUEUE]))

    def _discard_faults(self) -> None:
        with self._faults_lock:
            self._faults.clear()

    def _send_events(self) -> None:
        queue = self.queues[_EVENT_QUEUE]
        while self._faults and (chain := queue.pop()) is not None:
            # An event must fit into one buffer: a smaller buffer is returned unused.
            if chain.write_size < _FAULT.size:
                queue.answer(chain, b"")
                continue
            with self._faults_lock:
                record = self._faults.popleft()
            queue.answer(chain, _event(record))


def _event(record: FaultRecord) -> bytes:
    """struct virtio_iommu_fault (5.13.6.9)."""
    reason = 2 if record.reason in (Reason.NOT_MAPPED, Reason.PERMISSION, Reason.INPUT_WIDTH) else 0
    if record.reason is Reason.BLOCKED:
        reason = 1  # no domain
    flags = 0x100 | (1 if Access.READ in record.access else 0) | (2 if Access.WRITE in record.access else 0)
    return _FAULT.pack(reason, flags, record.requester_id, 0, record.iova)


def _regions(endpoint: Endpoint) -> list[ReservedRegion]:
    """The reserved regions that PROBE reports for an endpoint.

    They must not overlap (5.13.6.8.1): overlapping ones are merged, with the first one's type.  SW_MSI regions are left
    out, as they are the guest's own choice.
    """
    found: list[ReservedRegion] = []
    closed = [region for region in endpoint.reserved if region.type is not RegionType.SW_MSI]
    for region in sorted(closed, key=lambda region: region.span.start):
        if found and found[-1].span.overlaps(region.span):
            last = max(found[-1].span.last, region.span.last)
            found[-1] = ReservedRegion(Span(found[-1].span.start, last), found[-1].type)
        else:
            found.append(region)
    return found


_ATTACH, _DETACH, _MAP, _UNMAP, _PROBE = 1, 2, 3, 4, 5
#: Bytes of a request's tail, and of the longest request.
_TAIL, _LONGEST = 4, 72
VirtioIommuDevice._HANDLERS = {
    _ATTACH: (VirtioIommuDevice._attach, 20, _TAIL, 0),
    _DETACH: (VirtioIommuDevice._detach, 20, _TAIL, 0),
    _MAP: (VirtioIommuDevice._map, 36, _TAIL, F_MAP_UNMAP),
    _UNMAP: (VirtioIommuDevice._unmap, 28, _TAIL, F_MAP_UNMAP),
    _PROBE: (VirtioIommuDevice._probe, 72, PROBE_SIZE + _TAIL, 0),
}
