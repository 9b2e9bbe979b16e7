"""scripts/bench --iommu: what mapping costs a guest, by our IOMMUs and by QEMU's own in the same run; IOTLB hit rates.

Unlike the other rows these are not pinned: a guest's vCPU and the server each want a CPU.
"""

from __future__ import annotations

import os
import random
import statistics
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from tests.virtio.driver import NEXT, WRITE, Driver, Queue
from vmodel.device import PciDevice
from vmodel.devices.virtio_iommu import VirtioIommuDevice
from vmodel.guest.artifacts import find_kernel
from vmodel.guest.running import GuestSpec, run_guest
from vmodel.iommu import dma_domain_alloc
from vmodel.machine import load, parse
from vmodel.qemu import memory_args
from vmodel.span import PAGE

Say = Callable[[str], None]
ROOT = Path(__file__).parents[2]
KERNEL = "stable"
#: Boots of each guest, in turn; repetitions in each, and 4 KiB pages of a repetition.
ROUNDS, REPEAT, PAGES = 3, 7, 500
#: How often edu copies each of 8 mapped pages, in both directions.
TRANSFERS = 2

OURS = {"virtio-iommu": "edu-viommu.toml", "VT-d": "edu-vtd.toml"}
QEMUS = {
    "virtio-iommu": ["-device", "virtio-iommu-pci,addr=2.0", "-device", "edu,addr=3.0"],
    "VT-d": ["-device", "intel-iommu", "-device", "edu,addr=3.0"],
}
_ATTACH, _MAP, _UNMAP = 1, 3, 4
_EDU = 0x18


@dataclass
class Measured:
    """Nanoseconds of one map and of one unmap; a hit rate from 0 to 1 where there is one."""

    whose: str
    what: str
    map: float
    unmap: float
    hits: float | None = None

    @property
    def pair(self) -> float:
        return self.map + self.unmap

    @property
    def per_second(self) -> float:
        """Requests: maps and unmaps."""
        return 2e9 / self.pair


# ---- from a guest ------------------------------------------------------------------------------------


def _spec(program: Path, what: str, qemu_args: list[str], *more: object) -> GuestSpec:
    return GuestSpec(
        command=["./vfio_map", "0000:00:03.0", str(REPEAT), str(PAGES), *map(str, more)],
        kernel=find_kernel(KERNEL),
        modules=[*(["virtio_iommu"] if what == "virtio-iommu" else []), "vfio_iommu_type1", "vfio-pci"],
        files=[program],
        append="intel_iommu=on",
        qemu_args=qemu_args,
        timeout=180,
    )


def _samples(spec: GuestSpec) -> list[tuple[float, float]]:
    result = run_guest(spec)
    lines = [line.split() for line in result.output.decode(errors="replace").splitlines()]
    if result.status or len(lines) != REPEAT:
        raise RuntimeError(f"the guest's program failed: {result.output.decode(errors='replace')}\n{result.console}")
    return [(float(a), float(b)) for a, b in lines]


def _rate(device: PciDevice) -> float:
    stats = device.dma.stats
    return stats.iotlb_hits / (stats.iotlb_hits + stats.iotlb_misses)


def _ours(program: Path, folder: Path, what: str, samples: list[tuple[float, float]]) -> float:
    """The hit rate of edu's DMA."""
    machine = load(ROOT / "examples" / OURS[what])
    try:
        with machine.serve(folder):
            samples += _samples(_spec(program, what, machine.qemu_args(folder), TRANSFERS))
            return _rate(machine.devices["edu0"])
    finally:
        machine.remove_acpi(folder)
        machine.close()


def from_guests(folder: Path, say: Say) -> list[Measured]:
    """Ours and QEMU's own, in turn."""
    program = folder / "vfio_map"
    source = Path(__file__).parent / "vfio_map.c"
    subprocess.run(["cc", "-std=gnu11", "-O2", "-static", "-o", program, source], check=True)
    samples: dict[tuple[str, str], list[tuple[float, float]]] = {(w, k): [] for k in OURS for w in ("vmodel", "QEMU")}
    rates: dict[str, float] = {}
    for number in range(ROUNDS):
        for what in OURS:
            say(f"guests with {what}, {number + 1} of {ROUNDS}")
            rates[what] = _ours(program, folder, what, samples["vmodel", what])
            args = [*memory_args("512M"), "-nic", "none", *QEMUS[what]]
            samples["QEMU", what] += _samples(_spec(program, what, args))
    return [
        Measured(
            whose,
            what,
            *(statistics.median(column) for column in zip(*found, strict=True)),
            hits=rates[what] if whose == "vmodel" else None,
        )
        for (whose, what), found in samples.items()
    ]


# ---- in process --------------------------------------------------------------------------------------


class _Batch:
    """Requests that are put into a queue before the clock starts."""

    def __init__(self, queue: Queue, count: int) -> None:
        self.queue, self.count = queue, count

    def run(self, requests: list[bytes]) -> float:
        """Nanoseconds of each, from the doorbell until all are answered."""
        queue, memory = self.queue, self.queue.memory
        for n, data in enumerate(requests):
            at, answer = queue.data + 64 * n, queue.data + 0x4000 + 64 * n
            memory.write(at, data)
            memory.write(answer, b"\xff" * 4)
            queue.describe(2 * n, at, len(data), NEXT, 2 * n + 1)
            queue.describe(2 * n + 1, answer, 4, WRITE)
            queue.offer(2 * n)
        start = time.perf_counter_ns()
        queue.notify()
        spent = time.perf_counter_ns() - start
        if len(queue.used_now()) != len(requests) or any(
            memory.read(queue.data + 0x4000 + 64 * n, 4) != bytes(4) for n in range(len(requests))
        ):
            raise RuntimeError("a request failed")
        return spent / len(requests)


def in_process(say: Say) -> Iterator[Measured]:
    """MAP and UNMAP through the virtio-iommu's queue, a doorbell each, and a doorbell for many."""
    say("requests in process")
    machine = load(ROOT / "examples" / OURS["virtio-iommu"])
    device = machine.devices["viommu0"]
    assert isinstance(device, VirtioIommuDevice)
    driver = Driver(device)
    queue = driver.start([0, 1])[0]
    attach = struct.pack("<B3xIII4s", _ATTACH, 1, _EDU, 0, bytes(4))
    if queue.ask(attach) != bytes(4):
        raise RuntimeError("ATTACH failed")
    for many in (1, min(32, queue.size // 2)):
        batch = _Batch(queue, many)
        maps, unmaps = [], []
        for _ in range(4000 // many):
            pages = [0x1_0000_0000 + n * PAGE for n in range(many)]
            maps.append(batch.run([struct.pack("<B3xIQQQI", _MAP, 1, at, at + PAGE - 1, 0, 3) for at in pages]))
            unmaps.append(batch.run([struct.pack("<B3xIQQ4s", _UNMAP, 1, at, at + PAGE - 1, bytes(4)) for at in pages]))
        what = f"virtio-iommu, {many} request{'s' if many > 1 else ''} a doorbell"
        yield Measured("in process", what, statistics.median(maps), statistics.median(unmaps))
    driver.close()
    machine.close()


def hit_rates(say: Say) -> Iterator[tuple[int, float]]:
    """Of 4 KiB reads at random among so many mapped pages, each of them read before."""
    say("IOTLB hit rates")
    fd = os.memfd_create("bench")
    os.ftruncate(fd, 1 << 20)
    chance = random.Random(1)
    for count in (64, 256, 1024, 4096, 16384):
        machine = parse(
            '[machine]\nname = "m"\n[[iommu]]\nname = "i"\nkind = "virtio-iommu"\n'
            '[[device]]\nname = "a"\nmodel = "edu"\naddress = "0000:00:03.0"\n',
            Path("m.toml"),
        )
        device = machine.devices["a"]
        device.memory.map(0, 1 << 20, fd=fd)
        device.config.write(4, b"\x06\x00")
        endpoint = device.dma.endpoint
        assert endpoint is not None and endpoint.group is not None
        domain = dma_domain_alloc(endpoint)
        endpoint.group.set_default(domain)
        for n in range(count):
            domain.map(0x1_0000_0000 + n * PAGE, n % 256 * PAGE, PAGE)
        for n in range(count):
            device.dma.read(0x1_0000_0000 + n * PAGE, 4096)
        before = device.dma.stats
        for _ in range(20000):
            device.dma.read(0x1_0000_0000 + chance.randrange(count) * PAGE, 4096)
        after = device.dma.stats
        hits, misses = after.iotlb_hits - before.iotlb_hits, after.iotlb_misses - before.iotlb_misses
        yield count, hits / (hits + misses)
        machine.close()
    os.close(fd)


# ---- the table ---------------------------------------------------------------------------------------


def tables(measured: list[Measured], rates: list[tuple[int, float]], title: str) -> Iterator[Table]:
    """Mapping, and IOTLB hit rates."""
    theirs = {row.what: row for row in measured if row.whose == "QEMU"}
    table = Table(
        "IOMMU", "map", "unmap", "pair", "requests/s", "pair over QEMU's", "edu's IOTLB hits", title=title, box=None
    )
    for row in measured:
        over = f"{row.pair / theirs[row.what].pair:.2f}" if row.whose == "vmodel" else ""
        hits = "" if row.hits is None else f"{100 * row.hits:.0f} %"
        times = (f"{value / 1000:.1f} us" for value in (row.map, row.unmap, row.pair))
        table.add_row(f"{row.whose}: {row.what}", *times, f"{row.per_second:,.0f}", over, hits)
    yield table
    table = Table("mapped pages, read at random", "IOTLB hits", box=None)
    for count, rate in rates:
        table.add_row(f"{count:,}", f"{100 * rate:.1f} %")
    yield table
