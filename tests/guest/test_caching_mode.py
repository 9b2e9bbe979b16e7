"""VT-d's caching mode by stock kernels: whoever observes invalidations knows each mapping before it is used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vmodel.device.taps import tap
from vmodel.devices.vtd.unit import VtdDevice
from vmodel.guest.artifacts import find_kernel
from vmodel.guest.running import GuestSpec, run_guest
from vmodel.iommu.domain import TableDomain
from vmodel.machine import Machine, parse
from vmodel.points import DmaEvent, Event, InvalidationEvent, Point, Proceed, TapStage
from vmodel.span import PAGE

pytestmark = pytest.mark.guest
DISK = Path(__file__).parents[2] / "examples" / "campaign" / "disk.sh"

MACHINE = """
[machine]
name = "m"
memory = "512M"
[[iommu]]
name = "vtd0"
kind = "vt-d"
address = "0000:00:02.0"
params = { caching_mode = true%s }
[[device]]
name = "edu0"
model = "edu"
address = "0000:00:03.0"
params = { dma_mask = 0xffff_ffff_ffff }
[[device]]
name = "nvme0"
model = "nvme"
address = "0000:00:04.0"
params = { queues = 1, namespaces = [ { memory = "4M", lba = 512 } ] }
"""


class Observer:
    """Knows what is mapped from page-selective IOTLB invalidations alone, at which it looks into the tables."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        #: By domain: the pages that were mapped when they were last invalidated.
        self.mapped: dict[str, set[int]] = {}
        #: Accesses that went through, since the kernel has translation on (the firmware reads the disk before that):
        #: whether the device was attached to tables by then, and whether each page was known.
        self.accesses: dict[str, list[tuple[bool, bool]]] = {"edu0": [], "nvme0": []}

    def domain_of(self, name: str) -> TableDomain | None:
        group = self.machine.system[name].group
        return group.domain if group is not None and isinstance(group.domain, TableDomain) else None

    def invalidated(self, event: Event, proceed: Proceed) -> bytes:
        assert isinstance(event, InvalidationEvent)
        for name in self.accesses:
            domain = self.domain_of(name)
            if event.kind != "iotlb" or event.domain is None or domain is None or domain.name != event.domain:
                continue
            mapped, size = self.mapped.setdefault(domain.name, set()), event.size or 0
            if event.address is None or size > 512 * PAGE:
                continue
            for page in range(event.address, event.address + size, PAGE):
                (mapped.discard if domain.iova_to_phys(page) is None else mapped.add)(page)
        return proceed(event)

    def accessed(self, event: Event, proceed: Proceed) -> bytes:
        assert isinstance(event, DmaEvent)
        domain, unit = self.domain_of(event.device), self.machine.devices["vtd0"]
        mapped = set() if domain is None else self.mapped.get(domain.name, set())
        pages = range(event.address // PAGE * PAGE, event.address + event.size, PAGE)
        known = all(page in mapped for page in pages)
        data = proceed(event)
        if isinstance(unit, VtdDevice) and unit.contexts is not None and unit.contexts.enabled:
            self.accesses[event.device].append((domain is not None, known))
        return data


@pytest.mark.parametrize("scalable", [False, True], ids=["legacy", "scalable"])
def test_maps_are_invalidated(kernel: str, compiled: Callable[[str], Path], tmp_path: Path, scalable: bool) -> None:
    """Drivers of the DMA API and VFIO work, and the IOTLB is invalidated for each map before the device uses it.

    In scalable mode devices are attached as early, but the kernel need not invalidate maps of first-stage tables (6.1).
    """
    machine = parse(MACHINE % (", scalable = true" if scalable else ""), tmp_path / "m.toml")
    unit = machine.devices["vtd0"]
    assert isinstance(unit, VtdDevice)
    seen = Observer(machine)
    spec = GuestSpec(
        command="sh disk.sh && ./vfio_edu && cat /sys/bus/pci/devices/0000:00:04.0/iommu_group/type && dmesg",
        kernel=find_kernel(kernel),
        modules=["nvme", "vfio_iommu_type1", "vfio-pci"],
        files=[compiled("examples/vfio_edu.c"), DISK],
        append="intel_iommu=on,sm_on" if scalable else "",
    )
    try:
        tap(unit.backend, {Point.INVALIDATE}, seen.invalidated, TapStage.LOG)
        for name in seen.accesses:
            tap(machine.devices[name].backend, {Point.DMA_READ, Point.DMA_WRITE}, seen.accessed, TapStage.LOG)
        with machine.serve(tmp_path):
            spec.qemu_args = machine.qemu_args(tmp_path)
            result = run_guest(spec)
        assert unit.errors == 0 and machine.devices["nvme0"].errors == 0
        faults = machine.system.iommus[0].faults.total
    finally:
        machine.close()
    text = result.output.decode(errors="replace")
    assert result.status == 0 and "all is well" in text, text
    assert faults == 3  # what vfio_edu provokes
    assert ("DMAR: IOMMU batching disallowed due to virtualization" in text) is not scalable
    assert ("\nDMA\n" in text) is not scalable and ("\nDMA-FQ\n" in text) is scalable
    for name, accesses in seen.accesses.items():
        assert len(accesses) > 5, name
        assert all(attached for attached, _ in accesses), name
        assert scalable or all(known for _, known in accesses), name
