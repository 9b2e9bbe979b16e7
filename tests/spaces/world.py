"""A machine with every kind of IOMMU, and devices that really read and write its memory."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from vmodel.dma import Dma
from vmodel.errors import Access, DmaFault, IommuError
from vmodel.iommu import Coverage, Endpoint, Iommu, System
from vmodel.iommu.capabilities import Capabilities, ReservedRegion
from vmodel.iommu.driver import PlatformDevice
from vmodel.iommu.drivers import KINDS
from vmodel.iommu.drivers.pamu import Pamu
from vmodel.iommu.drivers.smmu_v3 import SmmuV3
from vmodel.iommu.group import Group
from vmodel.memory import GuestMemory
from vmodel.pci.topology import Bdf, Function, Topology
from vmodel.span import KiB, MiB

RW = Access.READ | Access.WRITE
RAM = 4 * MiB
#: Where a peek at an IOVA puts its mark.
_MARK = b"device was here!"


@contextmanager
def refused(code: int) -> Iterator[None]:
    """The block must raise IommuError with this errno."""
    with pytest.raises(IommuError) as caught:
        yield
    assert caught.value.errno == code, f"{errno.errorcode[code]} expected: {caught.value}"


class World:
    """RAM at GPA 0; `add` makes devices, each behind an IOMMU of the kind that is asked for."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("guest-ram")
        os.ftruncate(self.fd, RAM)
        self.ram = mmap.mmap(self.fd, RAM)
        self.memory = GuestMemory()
        self.memory.map(0, RAM, RW, self.fd)
        self.topology = Topology()
        self.system = System(self.topology, group_mf=True)
        self.iommus = 0
        self.devices = 0

    def close(self) -> None:
        self.system.close()
        self.memory.close()
        self.ram.close()
        os.close(self.fd)

    def iommu(self, kind: str = "vt-d", **changes: object) -> Iommu:
        """A new one, with its own PCI segment, or with the platform devices p0 to p9 of its number."""
        number, self.iommus = self.iommus, self.iommus + 1
        names = [f"platform{number}.{n}" for n in range(10)]
        driver = KINDS[kind]
        params: dict[str, object] = {}
        if driver is Pamu:
            params = {"liodns": {name: n + 1 for n, name in enumerate(names)}}
        elif driver is SmmuV3:
            params = {"platform": {name: n + 1 for n, name in enumerate(names)}}
        can: Capabilities = replace(driver.default, **{"isolated_msi": True, **changes})
        covers = [Coverage.segment(number), Coverage.platform(*names)]
        self.topology.add_root(number)
        iommu = Iommu(f"{kind}{number}", driver(params), covers, can)
        iommu.number = number  # type: ignore[attr-defined]
        return self.system.add_iommu(iommu)

    def add(self, iommu: Iommu, slot: int = 0, function: int = 0, reserved: Iterable[ReservedRegion] = ()) -> Device:
        """A device behind it: a PCI function, or for PAMU a platform device.  Functions of one slot are one group."""
        number = iommu.number  # type: ignore[attr-defined]
        if isinstance(iommu.driver, Pamu):
            return self.platform(iommu, slot)
        source = self.topology.add(Function(Bdf(number, 0, slot, function), name=f"pci{number}.{slot}.{function}"))
        return self._endpoint(source, reserved)

    def platform(self, iommu: Iommu, slot: int = 0) -> Device:
        return self._endpoint(PlatformDevice(f"platform{iommu.number}.{slot}"))  # type: ignore[attr-defined]

    def _endpoint(self, source: Function | PlatformDevice, reserved: Iterable[ReservedRegion] = ()) -> Device:
        dma = Dma(self.memory)
        dma.bus_master = True
        endpoint = self.system.add(source, dma.requester, reserved=reserved)
        dma.endpoint = endpoint
        return Device(self, endpoint, dma)


class Device:
    """An endpoint and its DMA."""

    def __init__(self, world: World, endpoint: Endpoint, dma: Dma) -> None:
        self.world = world
        self.endpoint = endpoint
        self.dma = dma

    @property
    def group(self) -> Group:
        assert self.endpoint.group is not None
        return self.endpoint.group

    def reads(self, iova: int, pasid: int | None = None) -> int | None:
        """The GPA that a read at an IOVA gets to; None: it faults."""
        dma = self.dma if pasid is None else self.dma.with_pasid(pasid)
        ram = self.world.ram
        for gpa in range(0, RAM, 4 * KiB):
            ram[gpa : gpa + 8] = gpa.to_bytes(8, "little")
        try:
            return int.from_bytes(dma.read(iova, 8), "little")
        except DmaFault:
            return None

    def writes(self, iova: int, pasid: int | None = None) -> int | None:
        """The GPA that a write at an IOVA gets to; None: it faults."""
        dma = self.dma if pasid is None else self.dma.with_pasid(pasid)
        ram = self.world.ram
        try:
            dma.write(iova, _MARK)
        except DmaFault:
            assert ram.find(_MARK) < 0, "a write that failed has got through"
            return None
        gpa = ram.find(_MARK)
        ram[gpa : gpa + len(_MARK)] = bytes(len(_MARK))
        assert ram.find(_MARK) < 0
        return gpa
