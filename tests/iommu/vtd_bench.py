"""A VT-d unit without a guest: its registers by hand, two devices behind it, and memory that they share."""

from __future__ import annotations

import mmap
import os
import struct
import threading
from pathlib import Path

import pytest

from vmodel.devices.vtd.unit import VtdDevice
from vmodel.dma import Buffer
from vmodel.errors import Access, DmaFault, Reason
from vmodel.machine import Machine, parse
from vmodel.span import GiB, MiB
from vmodel.vfio_user.wire import Region

RAM = 16 * MiB
VER, CAP, ECAP, GCMD, GSTS, RTADDR, CCMD = 0x00, 0x08, 0x10, 0x18, 0x1C, 0x20, 0x28
FSTS, FECTL, FEDATA, FEADDR, FEUADDR = 0x34, 0x38, 0x3C, 0x40, 0x44
PMEN, PLMBASE, PLMLIMIT, PHMBASE, PHMLIMIT = 0x64, 0x68, 0x6C, 0x70, 0x78
IQH, IQT, IQA, ICS, IECTL, IEDATA, IEADDR, IQER = 0x80, 0x88, 0x90, 0x9C, 0xA0, 0xA4, 0xA8, 0xB0
PQH, PQT, PQA, PRS, PECTL, PEDATA, PEADDR = 0xC0, 0xC8, 0xD0, 0xDC, 0xE0, 0xE4, 0xE8
IVA, IOTLB, RECORDS = 0x100, 0x108, 0x200
TE, SRTP, QIE = 1 << 31, 1 << 30, 1 << 26
PFO, PPF, IQE = 1, 2, 16
#: Where things are in guest memory.
ROOT, CONTEXT, QUEUE, STATUS, TABLES, DATA = 0x1000, 0x2000, 0x4000, 0x8000, 0x10_0000, 0x80_0000
OUTSIDE = 1 * GiB
MACHINE = """
[machine]
name = "m"
[[iommu]]
name = "vtd0"
kind = "vt-d"
address = "0000:00:02.0"
capabilities = { %s }
params = { %s }
[[device]]
name = "edu0"
model = "%s"
address = "0000:00:03.0"
[[device]]
name = "edu1"
model = "%s"
address = "0000:00:04.0"
"""
SID = {"edu0": 0x18, "edu1": 0x20}


class Line:
    """A courier that keeps what is written by message."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, bytes]] = []
        self.broken = False

    def read(self, gpa: int, size: int) -> bytes:
        raise AssertionError("nothing is read by message")

    def write(self, gpa: int, data: Buffer) -> None:
        if self.broken:
            raise DmaFault(Reason.CLIENT, gpa, Access.WRITE)
        self.sent.append((gpa, bytes(data)))

    def wait(self, event: threading.Event, seconds: float) -> bool:
        return event.wait(seconds)


class Bench:
    """A unit, two devices behind it, and 16 MiB that they share."""

    #: Where edu1 is.
    second = "0000:00:04.0"

    def __init__(self, capabilities: str = "", params: str = "", model: str = "edu") -> None:
        self.text = (MACHINE % (capabilities, params, model, model)).replace("0000:00:04.0", self.second)
        self.machine: Machine = parse(self.text, Path("m.toml"))
        self.system = self.machine.system
        unit = self.machine.devices["vtd0"]
        assert isinstance(unit, VtdDevice) and unit.contexts is not None
        self.unit, self.contexts = unit, unit.contexts
        fd = os.memfd_create("ram")
        os.ftruncate(fd, RAM)
        self.ram = mmap.mmap(fd, RAM)
        for device in self.machine.devices.values():
            device.memory.map(0, RAM, fd=fd)
        os.close(fd)
        self.lines = {}
        for name in SID:
            device = self.machine.devices[name]
            device.dma.bus_master = True
            device.dma.courier = self.lines[name] = Line()
        self.place(unit.base)
        self._next_table = TABLES

    def place(self, address: int) -> None:
        self.unit.backend.region_write(Region.CONFIG, 0x10, 4, address)
        self.unit.backend.region_write(Region.CONFIG, 0x04, 2, 2)

    def close(self) -> None:
        assert self.unit.errors == 0  # no hook has failed
        self.machine.close()

    # ---- registers -------------------------------------------------------------------------

    def get(self, at: int, size: int = 4) -> int:
        value = self.unit.backend.region_read(0, at, size)
        assert isinstance(value, int)
        return value

    def put(self, at: int, value: int, size: int = 4) -> None:
        self.post(at, value, size)
        self.run_unit()

    def post(self, at: int, value: int, size: int = 4) -> None:
        """Writes a register, and leaves what the unit defers."""
        self.unit.backend.region_write(0, at, size, value)

    def run_unit(self) -> None:
        """Runs what the unit's thread has deferred, until nothing but timers is left."""
        for _ in range(10_000):
            if self.unit.backend.run_due(0) != 0:  # at once; later there may be timers
                return
        raise AssertionError("the unit always defers more")

    def run(self) -> None:
        """Runs the deferred work of all threads."""
        for _ in range(4):
            for device in self.machine.devices.values():
                device.backend.run_due(0)

    def on(self, root: int = ROOT) -> None:
        self.put(RTADDR, root, 8)
        self.put(GCMD, SRTP)
        assert self.get(GSTS) & SRTP
        self.put(GCMD, TE)
        assert self.get(GSTS) & TE

    # ---- memory ----------------------------------------------------------------------------

    def words(self, at: int, *values: int) -> None:
        struct.pack_into(f"<{len(values)}Q", self.ram, at, *values)

    def context(self, name: str, low: int, high: int) -> None:
        self.words(ROOT, CONTEXT | 1, 0)
        self.words(CONTEXT + 16 * SID[name], low, high)

    def slot(self, root: int, iova: int, levels: int, flags: int = 3) -> int:
        """Where the entry of 4 KiB for `iova` is; makes tables on the way, whose entries have `flags`."""
        table = root
        for level in range(levels, 1, -1):
            at = table + 8 * (iova >> 3 + 9 * level & 511)
            (entry,) = struct.unpack_from("<Q", self.ram, at)
            if not entry:
                entry = self.new_table() | flags
                self.words(at, entry)
            table = entry & ~0xFFF
        return table + 8 * (iova >> 12 & 511)

    def new_table(self) -> int:
        self._next_table += 4096
        return self._next_table

    def translate(self, name: str, domain_id: int = 7, levels: int = 4, root: int | None = None) -> int:
        """A context entry; the table's root."""
        root = self.new_table() if root is None else root
        self.context(name, root | 1, domain_id << 8 | levels - 2)
        return root

    def map(self, root: int, iova: int, gpa: int, flags: int = 3, levels: int = 4) -> None:
        self.words(self.slot(root, iova, levels), gpa | flags)

    # ---- DMA -------------------------------------------------------------------------------

    def read(self, name: str, iova: int, size: int = 4) -> bytes:
        return self.machine.devices[name].dma.read(iova, size)

    def refused(self, name: str, iova: int, *, write: bool = False) -> Reason:
        dma = self.machine.devices[name].dma
        with pytest.raises(DmaFault) as caught:
            if write:
                dma.write(iova, b"x")
            else:
                dma.read(iova, 1)
        self.run()
        return caught.value.reason

    def record(self, n: int = 0) -> tuple[int, int, int, bool] | None:
        """(page, reason, source-id, a read) of a fault; None: F is clear."""
        page, info = self.get(RECORDS + 16 * n, 8), self.get(RECORDS + 16 * n + 8, 8)
        if not info >> 63:
            return None
        return page, info >> 32 & 0xFF, info & 0xFFFF, bool(info >> 62 & 1)

    def clear(self, n: int = 0) -> None:
        self.put(RECORDS + 16 * n + 12, 1 << 31)

    # ---- queue -----------------------------------------------------------------------------

    def queue(self, *descriptors: tuple[int, int]) -> None:
        """Queued invalidation, on if it is not."""
        if not self.get(GSTS) & QIE:
            self.put(IQT, 0, 8)
            self.put(IQA, QUEUE, 8)
            self.put(GCMD, self.get(GSTS) & TE | QIE)
        tail = self.get(IQT, 8)
        for low, high in descriptors:
            self.words(QUEUE + tail, low, high)
            tail = (tail + 16) % 4096
        self.put(IQT, tail, 8)


#: Scalable mode: TTM, descriptors of 256 bits; P, PASIDE; a page for everything in a first-stage table.
SCALABLE, WIDE, PRESENT, PASIDE, USER = 1 << 10, 1 << 11, 1, 8, 7
FIRST, SECOND, NESTED, THROUGH = 1 << 6, 2 << 6, 3 << 6, 4 << 6
SM_SID = {"edu0": 0x18, "edu1": 0xA0}


class ScalableBench(Bench):
    """The same in scalable mode; edu1 is one of the upper half of devices."""

    second = "0000:00:14.0"

    def __init__(self, capabilities: str = "", params: str = "", model: str = "edu") -> None:
        super().__init__(capabilities, f"scalable = true{', ' if params else ''}{params}", model)
        self.pasid_tables: dict[str, int] = {}

    def on(self, root: int = ROOT | SCALABLE) -> None:
        super().on(root)

    def device(self, name: str, flags: int = PRESENT | PASIDE, rid_pasid: int = 0) -> None:
        """A context entry, with a directory of one table."""
        directory, table = self.new_table(), self.new_table()
        self.words(directory, table | PRESENT)
        self.pasid_tables[name] = table
        self.words(ROOT, CONTEXT | PRESENT, CONTEXT + 0x1000 | PRESENT)
        self.words(self.context_at(name), directory | flags, rid_pasid, 0, 0)

    def context_at(self, name: str) -> int:
        return CONTEXT + 0x1000 * (SM_SID[name] >> 7) + 32 * (SM_SID[name] & 0x7F)

    def entry(self, name: str, pasid: int, *words: int) -> None:
        """A PASID table entry."""
        if name not in self.pasid_tables:
            self.device(name)
        self.words(self.pasid_tables[name] + 64 * pasid, *words, *[0] * (8 - len(words)))

    def first(self, name: str, pasid: int = 0, domain_id: int = 7, levels: int = 4) -> int:
        """A first-stage entry; the table's root."""
        root = self.new_table()
        self.entry(name, pasid, FIRST | PRESENT, domain_id, root | (levels - 4) << 2)
        return root

    def second_stage(self, name: str, pasid: int = 0, domain_id: int = 7, levels: int = 4, flags: int = 0) -> int:
        """A second-stage entry; the table's root."""
        root = self.new_table()
        self.entry(name, pasid, root | SECOND | levels - 2 << 2 | PRESENT | flags, domain_id)
        return root

    def nested(self, name: str, pasid: int = 0, domain_id: int = 7) -> tuple[int, int]:
        """A nested entry; the roots of first and second stage.  The first's is its own IOVA."""
        first, second = self.new_table(), self.new_table()
        self.entry(name, pasid, second | NESTED | 2 << 2 | PRESENT, domain_id, first)
        self.map(second, first, first)
        return first, second

    def map_first(self, root: int, iova: int, gpa: int, flags: int = USER, levels: int = 4) -> None:
        self.words(self.slot(root, iova, levels, USER), gpa | flags)

    def queue(self, *descriptors: tuple[int, ...]) -> None:
        """Queued invalidation with wide descriptors, on if it is not."""
        if not self.get(GSTS) & QIE:
            self.put(IQT, 0, 8)
            self.put(IQA, QUEUE | WIDE, 8)
            self.put(GCMD, self.get(GSTS) & TE | QIE)
        tail = self.get(IQT, 8)
        for descriptor in descriptors:
            self.words(QUEUE + tail, *descriptor, *[0] * (4 - len(descriptor)))
            tail = (tail + 32) % 4096
        self.put(IQT, tail, 8)
        self.run()


def read(bench: Bench, name: str, iova: int, pasid: int | None = None, size: int = 4) -> bytes:
    dma = bench.machine.devices[name].dma
    return (dma if pasid is None else dma.with_pasid(pasid)).read(iova, size)


def refused(bench: Bench, name: str, iova: int, pasid: int | None = None, write: bool = False) -> Reason:
    dma = bench.machine.devices[name].dma
    dma = dma if pasid is None else dma.with_pasid(pasid)
    with pytest.raises(DmaFault) as caught:
        if write:
            dma.write(iova, b"x")
        else:
            dma.read(iova, 1)
    bench.run()
    return caught.value.reason


def code(bench: Bench, n: int = 0) -> int | None:
    found = bench.record(n)
    return None if found is None else found[1]


# ---- invalidations, in legacy mode by registers or queued, and descriptors -----------------------------

QUEUED = "queued"
BY = pytest.mark.parametrize("by", ["registers", QUEUED])


def flush(bench: Bench, by: str, kind: int, domain_id: int = 0, page: int = 0, mask: int = 0) -> None:
    """An IOTLB invalidation of granularity `kind`, of 2**`mask` pages."""
    if by == QUEUED:
        bench.queue((2 | kind << 4 | domain_id << 16, page | mask))
        assert bench.get(IQH, 8) == bench.get(IQT, 8)
    else:
        bench.put(IVA, page | mask, 8)
        bench.put(IOTLB, 1 << 63 | kind << 60 | domain_id << 32, 8)
        assert bench.get(IOTLB, 8) >> 57 & 3 == kind and not bench.get(IOTLB, 8) >> 63


def invalidate(bench: Bench, by: str, kind: int, domain_id: int = 0, source: int = 0, mask: int = 0) -> None:
    """A context-cache invalidation of granularity `kind`; `mask` is FM."""
    if by == QUEUED:
        bench.queue((1 | kind << 4 | domain_id << 16 | source << 32 | mask << 48, 0))
        assert bench.get(IQH, 8) == bench.get(IQT, 8)
    else:
        bench.put(CCMD, 1 << 63 | kind << 61 | mask << 32 | source << 16 | domain_id, 8)
        assert bench.get(CCMD, 8) >> 59 & 3 == kind and not bench.get(CCMD, 8) >> 63


def iotlb(granularity: int, domain_id: int = 0, page: int = 0) -> tuple[int, int]:
    return 2 | granularity << 4 | domain_id << 16, page


def pasid_iotlb(granularity: int, domain_id: int, pasid: int, page: int = 0) -> tuple[int, int]:
    return 6 | granularity << 4 | domain_id << 16 | pasid << 32, page


def pasid_cache(granularity: int, domain_id: int = 0, pasid: int = 0) -> tuple[int, int]:
    return 7 | granularity << 4 | domain_id << 16 | pasid << 32, 0


def context(granularity: int, source: int = 0) -> tuple[int, int]:
    return 1 | granularity << 4 | source << 32, 0
