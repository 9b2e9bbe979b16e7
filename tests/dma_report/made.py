"""A machine whose mappings the test makes."""

from __future__ import annotations

import os
from pathlib import Path

from vmodel.closing import Closing
from vmodel.dma_report import DmaReport
from vmodel.errors import Access
from vmodel.iommu.domain import PagingDomain
from vmodel.machine import parse
from vmodel.span import PAGE

RW = Access.READ | Access.WRITE
MACHINE = """
[machine]
name = "made"
memory = "64M"
[[iommu]]
name = "iommu0"
kind = "vt-d"
[[device]]
name = "edu0"
model = "edu"
address = "0000:00:03.0"
[[group]]
device = "edu0"
domain = "paging"
"""


class Made(Closing):
    """A watched machine; `domain` is the device's."""

    def __init__(self) -> None:
        self.machine = parse(MACHINE, Path("made.toml"))
        self.dma = self.machine.devices["edu0"].dma
        self.fd = os.memfd_create("ram")
        os.ftruncate(self.fd, 64 * PAGE)
        self.machine.devices["edu0"].memory.map(0, 64 * PAGE, fd=self.fd)
        group = self.machine.system["edu0"].group
        assert group is not None and isinstance(group.domain, PagingDomain)
        self.domain = group.domain
        self.watch = self.machine.watch_dma()
        self.dma.bus_master = True

    def unmap(self, iova: int, size: int) -> None:
        """As with a strict domain: no IOTLB has it any more."""
        self.domain.unmap(iova, size)
        self.domain.flush()

    def report(self) -> DmaReport:
        return self.machine.dma_report()

    def texts(self) -> dict[str, str]:
        return {finding.sign: finding.text for endpoint in self.report().endpoints for finding in endpoint.findings}

    def close(self) -> None:
        """Ends the watch and the machine."""
        self.watch.close()
        self.machine.close()
        os.close(self.fd)
