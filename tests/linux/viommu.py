"""vIOMMUs, from the cases of Linux's iommufd selftest, with the vIOMMU of its mock driver (iommufd/selftest.c)."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.linux.mock import APERTURE, BUFFER, MOCK_PAGE, PAGE, PASID_BITS, TABLE, Mock, Row
from tests.spaces.world import World
from vmodel.errors import IommuError
from vmodel.iommu.allocate import nested_domain_alloc
from vmodel.iommu.domain import AllocFlags, Domain
from vmodel.iommu.fault import FaultRecord
from vmodel.iommu.iommu import Iommu
from vmodel.iommu.iommufd import Device, Hwpt, HwQueue, NestedData, Stage1, Vdevice, Viommu
from vmodel.iommu.pgtable import Table
from vmodel.memory import GuestMemory

#: The types of vIOMMUs, vEVENTQs and HW_QUEUEs of the mock driver, and its limits (iommufd_test.h).
SELFTEST, EVENTS, QUEUES = 0xDEADBEEF, 0xBEEFBEEF, 0xDEADBEEF
MOST_QUEUES, CACHES, CACHED, ALL = 2, 4, 0xBADDAD, 1
CASE = "iommufd_viommu."
VARIANTS = ("mock_viommu",)
#: An IOVA that no table of a user maps.
UNMAPPED = 64 << 20


@dataclass(frozen=True)
class CacheRequest:
    """struct iommu_viommu_invalidate_selftest."""

    flags: int = 0
    vdev_id: int = 0x99
    cache_id: int = 0


class SelftestNested(Stage1):
    """mock_viommu_alloc_domain_nested: to attach it, each device needs a vDEVICE (mock_domain_nop_attach)."""

    needs_vdevice = True

    def __init__(self, domain: Domain) -> None:
        self._domain = domain

    def read(self) -> Domain:
        return self._domain


class SelftestViommu(Viommu):
    """mock_viommu_ops."""

    entry = CacheRequest

    def __init__(self, device: Device, hwpt: Hwpt, kind: int) -> None:
        super().__init__(device, hwpt, kind)
        self.caches: dict[str, list[int]] = {}

    def stage1(
        self, device: Device, flags: AllocFlags, data: NestedData | Table, memory: GuestMemory
    ) -> SelftestNested:
        assert isinstance(data, Table)
        return SelftestNested(nested_domain_alloc(device.endpoint, self.hwpt.paging, memory, data))

    def cache(self, device: Device) -> list[int]:
        return self.caches.setdefault(device.endpoint.name, [CACHED] * CACHES)

    def invalidate_one(self, entry: CacheRequest) -> None:
        if entry.flags & ~ALL:
            raise IommuError(errno.EOPNOTSUPP, "flags")
        if entry.cache_id >= CACHES or entry.vdev_id not in self.vdevices:
            raise IommuError(errno.EINVAL, "no such cache")
        cache = self.cache(self.vdevices[entry.vdev_id].device)
        for n in range(CACHES) if entry.flags else (entry.cache_id,):
            cache[n] = 0

    def event_of(self, hwpt: Hwpt, virt_id: int, record: FaultRecord) -> tuple[int, bytes]:
        return EVENTS, virt_id.to_bytes(4, "little")

    def hw_queue_type(self, kind: int) -> bool:
        return kind == QUEUES

    def hw_queue_init(self, index: int, gpa: int, length: int) -> None:
        """mock_hw_queue_init_phys."""
        if index >= MOST_QUEUES:
            raise IommuError(errno.EINVAL, "index")
        if index in self.hw_queues:
            raise IommuError(errno.EEXIST, "index")
        if index and index - 1 not in self.hw_queues:
            raise IommuError(errno.EIO, "order")


def find(iommu: Iommu, kind: int) -> type[Viommu] | None:
    """mock_get_viommu_size."""
    return SelftestViommu if kind == SELFTEST else None


class WithViommu(Mock):
    """The fixture iommufd_viommu: a nesting parent, a vIOMMU of it, and a nested HWPT by way of that."""

    def __init__(self, world: World) -> None:
        super().__init__(world, 1)
        self.device = self.bound[0]
        self.devices[0].endpoint.max_pasids = 1 << PASID_BITS
        self.parent = self.device.hwpt_alloc(self.ioas, AllocFlags.NEST_PARENT)
        self.viommu = self.alloc()
        self.nested = self.nest()

    def alloc(self, parent: Hwpt | None = None, kind: int = SELFTEST) -> SelftestViommu:
        made = self.device.viommu_alloc(parent or self.parent, kind)
        assert isinstance(made, SelftestViommu)
        return made

    def nest(self, flags: AllocFlags = AllocFlags.NONE, **more: Any) -> Hwpt:
        return self.device.hwpt_alloc(self.viommu, flags, table=TABLE, memory=self.world.memory, **more)

    def vdevice(self, virt_id: int = 0x99) -> Vdevice:
        return self.viommu.vdevice_alloc(self.device, virt_id)

    def queue(self, index: int = 0, iova: int = APERTURE.start, length: int = PAGE, kind: int = QUEUES) -> HwQueue:
        return self.viommu.hw_queue_alloc(kind, index, iova, length)

    def fault(self) -> None:
        """IOMMU_TEST_OP_TRIGGER_VEVENT, by an access that no table maps."""
        assert self.devices[0].reads(UNMAPPED) is None


def closed(mock: WithViommu) -> list[int]:
    """The end of the process: its devices and all objects."""
    mock.vdevice()
    mock.device.replace(mock.nested)
    mock.context.close()
    return [mock.parent.users, mock.viommu.users, mock.nested.users]


def no_longer(mock: WithViommu) -> Hwpt:
    gone = mock.device.hwpt_alloc(mock.ioas, AllocFlags.NEST_PARENT)
    gone.destroy()
    return gone


def mapped(mock: WithViommu) -> None:
    """Two pages of the buffer, each a mapping."""
    for n in range(2):
        mock.ioas.map(BUFFER + n * PAGE, PAGE, iova=APERTURE.start + n * PAGE)


def queued(mock: WithViommu) -> None:
    mapped(mock)
    mock.queue()


def two_queues(mock: WithViommu) -> list[HwQueue]:
    queued(mock)
    return [mock.viommu.hw_queues[0], mock.queue(1, APERTURE.start + MOCK_PAGE, MOCK_PAGE)]


def given_back(mock: WithViommu) -> int:
    for queue in two_queues(mock)[::-1]:
        queue.destroy()
    return mock.unmap(0)


def asked(*requests: CacheRequest) -> Callable[[WithViommu], Any]:
    """What the cache has after an invalidation, and how many requests were done."""

    def call(mock: WithViommu) -> tuple[int, list[int]]:
        return mock.viommu.invalidate(requests), mock.viommu.cache(mock.device)

    return call


def nothing(mock: WithViommu) -> None:
    """Before nothing else."""


ROWS = [
    Row(CASE + case, says, call, expect, before=before, variants=VARIANTS)
    for case, says, before, call, expect in (
        ("viommu_auto_destroy", "with the process", nothing, closed, [0, 0, 0]),
        ("viommu_negative_tests", "no HWPT", nothing, lambda mock: mock.alloc(no_longer(mock)), "ENOENT"),
        ("viommu_negative_tests", "a nested HWPT", nothing, lambda mock: mock.alloc(mock.nested), "ENOENT"),
        (
            "viommu_negative_tests",
            "no nesting parent",
            nothing,
            lambda mock: mock.alloc(mock.device.hwpt_alloc(mock.ioas)),
            "EINVAL",
        ),
        ("viommu_negative_tests", "no such type", nothing, lambda mock: mock.alloc(kind=0xDEAD), "EOPNOTSUPP"),
        ("viommu_negative_tests", "the default type", nothing, lambda mock: mock.alloc(kind=0), "EOPNOTSUPP"),
        ("viommu_negative_tests", "the parent is in use", nothing, lambda mock: mock.parent.destroy(), "EBUSY"),
        ("viommu_negative_tests", "the vIOMMU is in use", nothing, lambda mock: mock.viommu.destroy(), "EBUSY"),
        (
            "viommu_negative_tests",
            "no device",
            lambda mock: mock.device.detach() or mock.device.destroy(),
            lambda mock: mock.alloc(),
            "ENOENT",
        ),
        (
            "viommu_alloc_nested_iopf",
            "unknown flags",
            nothing,
            lambda mock: mock.nest(AllocFlags.ENFORCE_SNOOP),
            "EOPNOTSUPP",
        ),
        ("viommu_alloc_with_data", "two of one parent", nothing, lambda mock: mock.alloc() and mock.parent.users, 2),
        (
            "vdevice_alloc",
            "no vDEVICE of the device",
            nothing,
            lambda mock: mock.device.replace(mock.nested),
            "ENOENT",
        ),
        ("vdevice_alloc", "no depth", nothing, lambda mock: mock.viommu.veventq_alloc(EVENTS, 0), "EINVAL"),
        ("vdevice_alloc", "too deep", nothing, lambda mock: mock.viommu.veventq_alloc(EVENTS, (1 << 19) + 1), "EINVAL"),
        (
            "vdevice_alloc",
            "the deepest",
            nothing,
            lambda mock: mock.viommu.veventq_alloc(EVENTS, 1 << 19).destroy(),
            None,
        ),
        (
            "vdevice_alloc",
            "the type again",
            lambda mock: mock.viommu.veventq_alloc(EVENTS, 2),
            lambda mock: mock.viommu.veventq_alloc(EVENTS, 2),
            "EEXIST",
        ),
        (
            "vdevice_alloc",
            "the default type",
            nothing,
            lambda mock: mock.viommu.veventq_alloc(0, 2),
            "EOPNOTSUPP",
        ),
        ("vdevice_alloc", "the same again", WithViommu.vdevice, WithViommu.vdevice, "EEXIST"),
        ("vdevice_alloc", "another id", WithViommu.vdevice, lambda mock: mock.vdevice(0x88), "EEXIST"),
        (
            "vdevice_alloc",
            "another vIOMMU",
            WithViommu.vdevice,
            lambda mock: mock.alloc().vdevice_alloc(mock.device, 0x99),
            "EEXIST",
        ),
        (
            "vdevice_alloc",
            "another device with the same id",
            WithViommu.vdevice,
            lambda mock: mock.viommu.vdevice_alloc(mock.add(), 0x99),
            "EEXIST",
        ),
        (
            "vdevice_alloc",
            "a device of another IOMMU",
            nothing,
            lambda mock: mock.viommu.vdevice_alloc(mock.add(mock.make_iommu()), 0x99),
            "EINVAL",
        ),
        ("vdevice_alloc", "too wide an id", nothing, lambda mock: mock.vdevice(1 << 64), "EINVAL"),
        ("vdevice_cache", "no requests", WithViommu.vdevice, asked(), (0, [CACHED] * 4)),
        (
            "vdevice_cache",
            "another type",
            WithViommu.vdevice,
            lambda mock: mock.viommu.invalidate([b"request"]),
            "EINVAL",
        ),
        ("vdevice_cache", "unknown flags", WithViommu.vdevice, asked(CacheRequest(flags=0xFFFF_FFFF)), "EOPNOTSUPP"),
        ("vdevice_cache", "no such cache", WithViommu.vdevice, asked(CacheRequest(cache_id=CACHES)), "EINVAL"),
        ("vdevice_cache", "no such vDEVICE", WithViommu.vdevice, asked(CacheRequest(vdev_id=9)), "EINVAL"),
        ("vdevice_cache", "one", WithViommu.vdevice, asked(CacheRequest(cache_id=1)), (1, [CACHED, 0, CACHED, CACHED])),
        (
            "vdevice_cache",
            "two",
            WithViommu.vdevice,
            asked(CacheRequest(cache_id=2), CacheRequest(cache_id=3)),
            (2, [CACHED, CACHED, 0, 0]),
        ),
        ("vdevice_cache", "all", WithViommu.vdevice, asked(CacheRequest(flags=ALL)), (1, [0] * 4)),
        ("hw_queue", "the default type", mapped, lambda mock: mock.queue(kind=0), "EOPNOTSUPP"),
        ("hw_queue", "no such type", mapped, lambda mock: mock.queue(kind=1), "EOPNOTSUPP"),
        ("hw_queue", "no length", mapped, lambda mock: mock.queue(length=0), "EINVAL"),
        ("hw_queue", "past the end", mapped, lambda mock: mock.queue(iova=(1 << 64) - 1), "EOVERFLOW"),
        ("hw_queue", "not mapped", nothing, WithViommu.queue, "ENOENT"),
        ("hw_queue", "not in order", mapped, lambda mock: mock.queue(1), "EIO"),
        ("hw_queue", "too many", mapped, lambda mock: mock.queue(MOST_QUEUES), "EINVAL"),
        ("hw_queue", "the index again", queued, WithViommu.queue, "EEXIST"),
        ("hw_queue", "a page of a queue", queued, lambda mock: mock.unmap(0), "EBUSY"),
        ("hw_queue", "everything, with a page of a queue", queued, lambda mock: mock.ioas.unmap_all(), "EBUSY"),
        ("hw_queue", "the page beside it", queued, lambda mock: mock.unmap(1), PAGE),
        ("hw_queue", "the first before the second", nothing, lambda mock: two_queues(mock)[0].destroy(), "EBUSY"),
        ("hw_queue", "in descending order, then unmap", nothing, given_back, PAGE),
    )
]
DIFFERENCES: list[Row] = []
#: Cases of functions of test_viommu.py.
WHOLE = [CASE + name for name in ("viommu_alloc_nested_iopf", "vdevice_alloc", "vdevice_cache", "vdevice_tombstone")]
