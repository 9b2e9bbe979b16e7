"""A VM with one device behind an IOMMU that nests: its memory, tables and descriptors, and what its device reaches.

Fields of entries, descriptors, commands and events: IHI 0070, chapters 4, 5 and 7.
"""

from __future__ import annotations

import struct

from tests.iommu.tables import TO_PAGE, TO_TABLE, index
from tests.spaces.world import World
from vmodel.errors import DmaFault
from vmodel.iommu import AllocFlags, Iommu, TableFormat
from vmodel.iommu.iommufd import (
    Context,
    Device,
    Hwpt,
    Ioas,
    SmmuV3Ste,
    Veventq,
    VeventqType,
    Viommu,
    ViommuType,
)
from vmodel.span import KiB, MiB

PAGE = 4 * KiB
#: Where the VM's memory is for stage 1 (intermediate addresses), and in vmodel's guest memory.
IPA, GPA = 256 * MiB, MiB
#: In the VM's memory: context descriptors, four tables, and pages that they map.
CD, TABLES, DATA = 0, 0x1000, 0x8000
#: The IOVA that the VM's tables map to DATA.
IOVA = 0x4030_2000
SID, VSID = 1, 0x99
V, S1, BYPASS, ABORT = 1, 5 << 1, 4 << 1, 0 << 1
NH_ALL, NH_ASID, NH_VA, NH_VAA, NSNH_ALL, ATC, CD_ONE, CD_ALL = 0x10, 0x11, 0x12, 0x13, 0x30, 0x40, 5, 6
ASID = 7


def command(word0: int, word1: int = 0) -> bytes:
    return struct.pack("<QQ", word0, word1)


class Guest:
    """A VM whose device is behind an IOMMU: a parent that maps all of its memory, and its vIOMMU."""

    def __init__(self, world: World, kind: str = "smmu-v3", what: int = ViommuType.ARM_SMMUV3) -> None:
        self.world = world
        self.context = Context()
        self.ioas = Ioas(self.context)
        self.ioas.map(GPA, MiB, iova=IPA)
        self.iommu = self.make_iommu(kind)
        self.device = world.add(self.iommu)
        self.bound = Device(self.context, self.device.endpoint)
        self.parent = self.bound.hwpt_alloc(self.ioas, AllocFlags.NEST_PARENT)
        self.viommu: Viommu = self.bound.viommu_alloc(self.parent, what)
        self.format = TableFormat.ARM_S1 if kind == "smmu-v3" else TableFormat.X86

    def make_iommu(self, kind: str = "smmu-v3") -> Iommu:
        iommu = self.world.iommu(kind)
        if kind == "smmu-v3":
            iommu.driver.params = iommu.driver.params.model_copy(update={"vcmdqs": 2})
        return iommu

    def put(self, at: int, *words: int) -> None:
        """Words in the VM's memory."""
        for n, word in enumerate(words):
            self.world.ram[GPA + at + 8 * n : GPA + at + 8 * n + 8] = word.to_bytes(8, "little")

    def tables(self, target: int = DATA, at: int = TABLES, pages: int = 1) -> None:
        """Four levels, by which pages from IOVA on lead to those from `target` on."""
        for level in (4, 3, 2):
            self.put(at + 8 * index(IOVA, level), TO_TABLE[self.format](0) | IPA + at + PAGE)
            at += PAGE
        for n in range(pages):
            entry = TO_PAGE[self.format](1) | IPA + target + n * PAGE
            self.put(at + 8 * index(IOVA + n * PAGE, 1), entry)

    def descriptor(self, *, clear: int = 0, more: int = 0, at: int = CD, root: int = TABLES) -> None:
        """A context descriptor: 48 bits, granules of 4 KiB, reports faults."""
        word = 16 | 1 << 31 | 5 << 32 | 1 << 41 | 1 << 45 | 1 << 46 | ASID << 48
        self.put(at, word & ~clear | more, IPA + root)

    def ste(self, word0: int = V | S1, word1: int = 0, **more: object) -> Hwpt:
        data = SmmuV3Ste(word0 | (IPA + CD if word0 & 0xE == S1 else 0), word1)
        return self.bound.hwpt_alloc(self.viommu, data=data, memory=self.world.memory, **more)  # type: ignore[arg-type]

    def attach(self, hwpt: Hwpt) -> None:
        (self.bound.replace if self.bound.attached else self.bound.attach)(hwpt)

    def translated(self, word1: int = 0) -> Hwpt:
        """The device uses the VM's tables."""
        self.tables()
        self.descriptor()
        hwpt = self.ste(V | S1, word1)
        self.viommu.vdevice_alloc(self.bound, VSID)
        self.attach(hwpt)
        return hwpt

    def events(self, depth: int = 8) -> Veventq:
        return self.viommu.veventq_alloc(VeventqType.ARM_SMMUV3, depth)

    def sees(self, iova: int = IOVA, pasid: int | None = None) -> int | None:
        """Where in the VM's memory a read gets to, without disturbing the tables; None: it faults."""
        dma = self.device.dma if pasid is None else self.device.dma.with_pasid(pasid)
        try:
            data = dma.read(iova, 8)
        except DmaFault:
            return None
        return int.from_bytes(data, "little")


def decode(queue: Veventq) -> list[tuple[int, int, int, int]]:
    """(event, StreamID, address, word 1) of what is read."""
    found = []
    for event in queue.read(1 << 12):
        words = struct.unpack("<4Q", event.data)
        found.append((words[0] & 0xFF, words[0] >> 32, words[2], words[1]))
    return found
