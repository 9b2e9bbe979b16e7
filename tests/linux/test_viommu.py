"""vIOMMUs answer as the cases of Linux's iommufd selftest check them."""

from __future__ import annotations

import errno
import threading

import pytest

from tests.linux.mock import Row, Stacked, by_variant, check, name
from tests.linux.viommu import CACHED, EVENTS, ROWS, SELFTEST, UNMAPPED, CacheRequest, WithViommu, find
from tests.spaces.world import World, refused
from tests.waiting import until
from vmodel.errors import IommuError
from vmodel.iommu.domain import AllocFlags
from vmodel.iommu.fault import PageRequest, PageResponse
from vmodel.iommu.iommufd import FaultObject, InvalidationError
from vmodel.iommu.iommufd.viommu_types import VIOMMUS


@pytest.fixture(autouse=True)
def selftest_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kind of Mock's IOMMU has the vIOMMU of Linux's mock driver."""
    monkeypatch.setitem(VIOMMUS, "vt-d", find)


@pytest.mark.parametrize(("row", "variant"), by_variant(ROWS), ids=name)
def test_viommu(world: World, row: Row, variant: str) -> None:
    check(row, WithViommu(world))


def test_page_requests(world: World) -> None:
    """viommu_alloc_nested_iopf."""
    mock = WithViommu(world)
    fault, gone = FaultObject(mock.context), FaultObject(mock.context)
    gone.destroy()
    with refused(errno.ENOENT):
        mock.nest(fault=gone)
    hwpt = mock.nest(fault=fault)
    with refused(errno.ENOENT):
        mock.device.replace(hwpt)
    mock.vdevice()
    mock.device.replace(hwpt)
    with refused(errno.EBUSY):
        hwpt.destroy()
    thread = threading.Thread(target=lambda: mock.devices[0].reads(UNMAPPED))
    thread.start()
    found: list[PageRequest] = until(lambda: fault.read(0.01), "the page request")
    fault.respond(found[0], PageResponse.INVALID)
    thread.join()
    mock.device.replace(mock.ioas)
    hwpt.destroy()
    fault.destroy()


def test_events(world: World) -> None:
    """vdevice_alloc: the id is that of the vDEVICE when the HWPT was attached; lost events are reported once."""
    mock = WithViommu(world)
    queue = mock.viommu.veventq_alloc(EVENTS, 2)
    for size in (0, 7):
        with refused(errno.EINVAL):
            queue.read(size)
    vdevice = mock.vdevice(0x99)
    mock.device.replace(mock.nested)
    mock.fault()
    for size in (0, 7, 8, 11):
        with refused(errno.EINVAL):
            queue.read(size)
    assert [event.pack() for event in queue.read(12)] == [bytes(8) + b"\x99\0\0\0"]
    mock.device.replace(mock.ioas)
    vdevice.destroy()
    vdevice = mock.vdevice(0x88)
    mock.device.replace(mock.nested)
    for _ in range(3):
        mock.fault()
    events = queue.read(3 * 12)
    assert [(event.sequence, event.lost, event.data) for event in events] == [
        (1, False, b"\x88\0\0\0"),
        (2, False, b"\x88\0\0\0"),
        (3, True, b""),
    ]
    mock.fault()
    assert [(event.sequence, event.lost) for event in queue.read(12)] == [(4, False)]
    assert queue.read(12) == []
    mock.device.replace(mock.ioas)
    mock.fault()
    assert len(queue) == 0, "only faults of HWPTs of the vIOMMU are reported"
    vdevice.destroy()
    queue.destroy()


def test_sequence_numbers_begin_again(world: World) -> None:
    """struct iommufd_vevent_header: INT_MAX is followed by 0."""
    mock = WithViommu(world)
    queue = mock.viommu.veventq_alloc(EVENTS, 4)
    queue._sequence = (1 << 31) - 2
    for data in (b"one", b"two", b"three"):
        mock.viommu.report_event(EVENTS, data)
    assert [event.sequence for event in queue.read(100)] == [(1 << 31) - 2, (1 << 31) - 1, 0]


def test_lost_events(world: World) -> None:
    """iommufd_vevent_handler: the mark is only at the end, moves there, and takes no event's place."""
    mock = WithViommu(world)
    queue = mock.viommu.veventq_alloc(EVENTS, 2)
    for n in range(4):
        mock.viommu.report_event(EVENTS, bytes([n]))
    assert len(queue) == 3
    assert [(event.sequence, event.lost) for event in queue.read(9)] == [(0, False)]
    mock.viommu.report_event(EVENTS, b"x")
    assert [(event.sequence, event.data) for event in queue.read(100)] == [(1, b"\x01"), (4, b"x")]
    for n in range(3):
        mock.viommu.report_event(EVENTS, bytes([n]))
    assert [event.lost for event in queue.read(100)] == [False, False, True]
    for n in range(3):
        mock.viommu.report_event(EVENTS, bytes([n]))
    assert [(event.sequence, event.lost) for event in queue.read(100)] == [(8, False), (9, False), (10, True)]
    with refused(errno.EINVAL):
        mock.viommu.report_event(EVENTS, b"")
    with refused(errno.EOPNOTSUPP):
        mock.viommu.report_event(1, b"x")


@pytest.mark.parametrize(
    ("second", "code"),
    [(CacheRequest(flags=0xFFFF_FFFF, cache_id=1), errno.EOPNOTSUPP), (CacheRequest(cache_id=4), errno.EINVAL)],
)
def test_an_invalidation_that_is_refused(world: World, second: CacheRequest, code: int) -> None:
    """vdevice_cache: those before it have been done, those after it have not."""
    mock = WithViommu(world)
    mock.vdevice()
    with pytest.raises(InvalidationError) as caught:
        mock.viommu.invalidate([CacheRequest(), second, CacheRequest(cache_id=2)])
    assert (caught.value.errno, caught.value.done) == (code, 1)
    assert mock.viommu.cache(mock.device) == [0, CACHED, CACHED, CACHED]


def test_tombstone(world: World) -> None:
    """vdevice_tombstone: a vDEVICE goes with its device, and its id is not used again."""
    mock = WithViommu(world)
    vdevice = mock.vdevice()
    users = mock.viommu.users
    mock.device.detach()
    mock.device.destroy()
    with refused(errno.ENOENT):
        vdevice.destroy()
    assert mock.viommu.users == users - 1
    other = mock.add()
    assert mock.viommu.vdevice_alloc(other, 0x99).id > vdevice.id


def test_pasids(world: World) -> None:
    """iommufd_device_pasid.pasid_attach: a HWPT of a vIOMMU, which needs no vDEVICE for a PASID."""
    mock = Stacked(world, 1)
    viommu = mock.device.viommu_alloc(mock.parent, SELFTEST)
    nested = mock.device.hwpt_alloc(viommu, AllocFlags.PASID, **mock.tables())
    mock.device.replace(mock.special)
    assert mock.device.attach(nested, 100) is nested and mock.domain(100) is nested.domain
    mock.device.detach(100)
    nested.destroy()


def test_replace_that_fails(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """iommufd_device_pasid.pasid_attach, PASID 1024: the driver has no memory, and the old HWPT stays."""
    mock = Stacked(world, 1)
    mock.device.replace(mock.special)
    mock.device.attach(mock.special, 1024)
    attach = mock.devices[0].endpoint.attach

    def fails(domain: object, pasid: int | None = None) -> None:
        if domain is mock.nested[0].domain:
            raise IommuError(errno.ENOMEM, "no memory")
        attach(domain, pasid)  # type: ignore[arg-type]

    monkeypatch.setattr(mock.devices[0].endpoint, "attach", fails)
    with refused(errno.ENOMEM):
        mock.device.replace(mock.nested[0], 1024)
    assert mock.domain(1024) is mock.special.domain and mock.device.attached[1024] is mock.special
