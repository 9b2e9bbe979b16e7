"""A machine in miniature: guest memory in a memfd, functions with real DMA, IOMMUs that cover them."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterable
from typing import Any

import pytest

from vmodel._shim import Requester
from vmodel.dma import Dma
from vmodel.errors import Access
from vmodel.iommu import Coverage, Endpoint, Iommu, System
from vmodel.iommu.capabilities import Capabilities, ReservedRegion
from vmodel.iommu.driver import PlatformDevice
from vmodel.iommu.drivers import KINDS
from vmodel.iommu.group import Group
from vmodel.memory import GuestMemory
from vmodel.pci.topology import ISOLATION, AcsFlags, Bdf, Function, PortType, Topology
from vmodel.span import MiB

RAM = 8 * MiB
RW = Access.READ | Access.WRITE


def iommu(kind: str = "vt-d", name: str = "iommu0", params: Any = None, **capabilities: Any) -> Iommu:
    """One that covers segment 0, with capabilities other than the kind's own where they are given."""
    driver = KINDS[kind](params)
    names = {f: getattr(driver.default, f) for f in Capabilities.__dataclass_fields__}
    return Iommu(name, driver, [Coverage.segment(0)], Capabilities(**{**names, **capabilities}))


class World:
    """`system` with its topology; `ram` is what is behind all DMA."""

    def __init__(self, *iommus: Iommu, group_mf: bool = False) -> None:
        self.topology = Topology()
        self.topology.add_root()
        self.system = System(self.topology, group_mf=group_mf)
        for one in iommus:
            self.system.add_iommu(one)
        self.fd = os.memfd_create("guest-ram")
        os.ftruncate(self.fd, RAM)
        self.ram = mmap.mmap(self.fd, RAM)
        self.memory = GuestMemory()
        self.memory.map(0, RAM, RW, self.fd, 0)
        self.dmas: dict[str, Dma] = {}

    def function(
        self, bdf: str, kind: PortType = PortType.INTEGRATED, secondary: int | None = None, **more: Any
    ) -> Function:
        """Puts a function into the topology; segment 0 may be left out."""
        whole = bdf if bdf.count(":") == 2 else f"0000:{bdf}"
        return self.topology.add(Function(Bdf.parse(whole), kind, name=bdf, **more), secondary)

    def port(self, bdf: str, secondary: int, *, acs: bool = True, kind: PortType = PortType.ROOT_PORT) -> Function:
        """A root port, or another bridge."""
        return self.function(bdf, kind, secondary, acs=ISOLATION if acs else None)

    def plug(self, source: Function | PlatformDevice, **more: Any) -> Endpoint:
        """Makes the system see a device, with DMA that works."""
        dma = Dma(self.memory)
        dma.bus_master = True
        endpoint = self.system.add(source, dma.requester, **more)
        dma.endpoint = endpoint
        self.dmas[endpoint.name] = dma
        return endpoint

    def device(
        self,
        bdf: str,
        kind: PortType = PortType.INTEGRATED,
        *,
        reserved: Iterable[ReservedRegion] = (),
        acs: AcsFlags | None = None,
    ) -> tuple[Endpoint, Dma]:
        """A function that is plugged in."""
        endpoint = self.plug(self.function(bdf, kind, acs=acs), reserved=reserved)
        return endpoint, self.dmas[endpoint.name]

    def numbers(self) -> dict[str, int | None]:
        """The group number of each endpoint."""
        return {e.name: None if e.group is None else e.group.number for e in self.system.endpoints}

    def put(self, gpa: int, *words: int) -> None:
        """Words of 8 bytes."""
        for n, word in enumerate(words):
            self.ram[gpa + 8 * n : gpa + 8 * n + 8] = word.to_bytes(8, "little")

    def close(self) -> None:
        self.system.close()
        self.memory.close()
        self.ram.close()
        os.close(self.fd)


def group_of(endpoint: Endpoint) -> Group:
    """There must be one."""
    assert endpoint.group is not None, endpoint.why
    return endpoint.group


class failing_attach:
    """The n-th attachment of a domain fails, as if there were no memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
        self._patch, self._nth = monkeypatch, nth

    def __enter__(self) -> None:
        plain = Requester.attach

        def attach(requester: Requester, domain: Any, *pasid: int) -> None:
            if domain is not None:
                self._nth -= 1
                if self._nth == 0:
                    raise OSError(errno.ENOMEM, "no memory")
            plain(requester, domain, *pasid)

        self._patch.setattr(Requester, "attach", attach)

    def __exit__(self, *_: object) -> None:
        self._patch.undo()
