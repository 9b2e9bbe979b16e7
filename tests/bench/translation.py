"""Rows 5 to 10 of scripts/bench: DMA and mappings through a paging domain, and how they grow."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from measure import Program, Row, timed

from vmodel.dma import Dma
from vmodel.iommu import Coverage, Iommu, System, dma_domain_alloc
from vmodel.iommu.capabilities import Capabilities
from vmodel.iommu.domain import PagingDomain
from vmodel.iommu.drivers import KINDS
from vmodel.memory import GuestMemory
from vmodel.pci.topology import Bdf, Function, Topology
from vmodel.span import PAGE, GiB, KiB, MiB, Span

_MILLION = 1_000_000
#: What libvfio-user took for row 10 where the targets were set, in microseconds.
_PEER_DIRTY_REPORT = 331
Say = Callable[[str], None]


def _device(fd: int) -> tuple[Dma, PagingDomain]:
    """A device with 64 MiB of memory, and the strict domain that it is behind."""
    memory = GuestMemory()
    memory.map(0, 64 * MiB, fd=fd)
    dma = Dma(memory)
    dma.bus_master = True
    topology = Topology()
    topology.add_root()
    function = topology.add(Function(Bdf(0, 0, 3, 0)))
    system = System(topology)
    system.add_iommu(Iommu("iommu0", KINDS["vt-d"](), [Coverage.segment(0)], Capabilities(strict=True)))
    dma.endpoint = endpoint = system.add(function, dma.requester)
    domain = dma_domain_alloc(endpoint)
    assert endpoint.group is not None
    endpoint.group.set_default(domain)
    return dma, domain


def translated(peer: Program, domains: Program, say: Say) -> Iterator[Row]:
    """Rows 5 to 10."""
    say("DMA through a paging domain")
    fd = os.memfd_create("bench")
    os.ftruncate(fd, 64 * MiB)
    os.pwrite(fd, b"\1" * (64 * MiB), 0)
    dma, domain = _device(fd)
    at = GiB
    for page in range(256):  # side by side for the device, scattered in memory
        domain.map(at + page * PAGE, (page * 167 % 256) * 2 * PAGE, PAGE)
    yield Row(5, "dma.read of 4 B", timed(lambda: dma.read(at, 4), 50000) / 1000, 0.8, "us")
    yield Row(5, "dma.read of 4 KiB", timed(lambda: dma.read(at, 4 * KiB), 50000) / 1000, 1.2, "us")
    buffer = bytearray(1 * MiB)
    copied = timed(lambda: dma.readinto(at, buffer), 500)
    bare = peer("memcpy", count=500)
    yield Row(6, "dma.readinto of 1 MiB, 256 scattered pages", bare / copied, 0.85, "of memcpy", more_is_better=True)

    say("translation with a million mappings")
    count = 64 * 1024
    yield Row(7, "translate, IOTLB hit", domains("hit", _MILLION, count=count), 10, "ns")
    yield Row(7, "translate, IOTLB miss, 1 M mappings", domains("miss", _MILLION, count=count), 120, "ns")
    say("map and unmap with a million mappings")
    for n in range(_MILLION):  # every other page
        domain.map(2 * GiB + 2 * n * PAGE, n % 4096 * PAGE, PAGE)
    places = iter(range(1, 1 << 40, 2 * 7919))

    def map_unmap() -> None:
        iova = 2 * GiB + next(places) % (2 * _MILLION) * PAGE
        domain.map(iova | PAGE, 0, PAGE)
        domain.unmap(iova | PAGE, PAGE)

    yield Row(8, "map + unmap of 4 KiB, 1 M mappings, Python", timed(map_unmap, 20000) / 1000, 1.5, "us")
    yield Row(8, "map + unmap of 4 KiB, 1 M mappings, shim", domains("map", _MILLION, count=count), 300, "ns")
    yield Row(9, "memory of 1 M mappings of 4 KiB", domains.lines("bytes", 1, 64, _MILLION)[0] / MiB, 64, "MiB")

    say("dirty report")
    domain.set_dirty_tracking(True)
    report = Span.sized(0, 8 * GiB)

    def dirty() -> None:
        dma.write(at, b"x" * 64)
        domain.read_dirty(report)

    yield Row(10, "dirty report of 8 GiB, over the peer's", timed(dirty, 100) / 1000 / _PEER_DIRTY_REPORT, 0.5, "")
    os.close(fd)


def growth(domains: Program, say: Say) -> dict[str, list[tuple[int, float]]]:
    """Nanoseconds of each operation, and bytes a mapping, at 1 to 1 M mappings."""
    found: dict[str, list[tuple[int, float]]] = {"hit": [], "miss": [], "map": [], "bytes": []}
    for exponent in range(7):
        n = 10**exponent
        say(f"{n} mappings")
        for what in ("hit", "miss", "map"):
            found[what].append((n, domains(what, n, count=64 * 1024)))
        found["bytes"].append((n, domains.lines("bytes", 1, 64, n)[0] / n))
    return found


def plot(found: dict[str, list[tuple[int, float]]], file: Path) -> None:
    """Draws `growth`."""
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "vmodel"  # the same figures give the same file
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    names = {"hit": "translate, IOTLB hit", "miss": "translate, random page", "map": "map + unmap, random page"}
    for what, name in names.items():
        axes.plot(*zip(*found[what], strict=True), marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="mappings of 4 KiB in the domain", ylabel="ns for one, in the shim")
    axes.grid(which="both", alpha=0.2)
    axes.legend(loc="upper left")
    right = axes.twinx()
    right.plot(*zip(*found["bytes"], strict=True), color="grey", linestyle=":", marker=".")
    right.set(yscale="log", ylabel="bytes of memory for one mapping (dotted)")
    figure.savefig(file, metadata={"Date": None})
