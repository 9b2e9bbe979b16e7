"""vIOMMUs of an SMMUv3 and of an AMD-Vi: a guest's tables, commands and events, with real DMA.

Linux 7.3: drivers/iommu/arm/arm-smmu-v3/{arm-smmu-v3-iommufd,tegra241-cmdqv}.c, drivers/iommu/amd/{iommufd,nested}.c.
Fields of entries, descriptors, commands and events: IHI 0070, chapters 4, 5 and 7; 48882, 2.2.2.1.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator, Sequence

import pytest

from tests.iommu.tables import TO_PAGE, TO_TABLE, index
from tests.spaces.world import World, refused
from vmodel.errors import Access, DmaFault
from vmodel.iommu import AllocFlags, Iommu, TableFormat
from vmodel.iommu.iommufd import (
    AmdGuestDte,
    Context,
    Device,
    FaultObject,
    Hwpt,
    HwQueueType,
    InvalidationError,
    Ioas,
    SmmuV3Ste,
    Veventq,
    VeventqType,
    Viommu,
    ViommuType,
    VtdStage1,
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


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


@pytest.fixture
def guest(world: World) -> Iterator[Guest]:
    made = Guest(world)
    for page in range(DATA, 16 * PAGE, PAGE):
        made.put(page, page)
    yield made
    made.context.close()


def decode(queue: Veventq) -> list[tuple[int, int, int, int]]:
    """(event, StreamID, address, word 1) of what is read."""
    found = []
    for event in queue.read(1 << 12):
        words = struct.unpack("<4Q", event.data)
        found.append((words[0] & 0xFF, words[0] >> 32, words[2], words[1]))
    return found


# ---- SMMUv3: stream table entries ------------------------------------------------------------


def test_only_by_a_viommu(guest: Guest) -> None:
    """arm_smmu_ops has no domain_alloc_nested: hw_pagetable.c, iommufd_hwpt_nested_alloc."""
    with refused(errno.EOPNOTSUPP):
        guest.bound.hwpt_alloc(guest.parent, data=SmmuV3Ste(V | S1), memory=guest.world.memory)


def test_a_guests_tables(guest: Guest) -> None:
    hwpt = guest.translated()
    assert guest.sees() == DATA and guest.sees(IOVA + PAGE) is None
    assert (hwpt.ioas, hwpt.paging, hwpt.nested) == (guest.ioas, guest.parent.paging, True)
    guest.bound.detach()
    assert guest.sees() is None


@pytest.mark.parametrize("word0", [V | ABORT, 0, (1 << 64) - 2])
def test_abort(guest: Guest, word0: int) -> None:
    """An STE that is not valid is taken as abort; neither needs a vDEVICE (arm_smmu_attach_prepare_vmaster)."""
    queue = guest.events()
    guest.attach(guest.ste(word0))
    assert guest.sees() is None and guest.sees(IPA + DATA) is None and decode(queue) == []


def test_bypass(guest: Guest) -> None:
    """Translated as by the parent; without a vDEVICE."""
    guest.attach(guest.ste(V | BYPASS))
    assert guest.sees(IPA + DATA) == DATA and guest.sees(0) is None


def test_translation_needs_a_vdevice(guest: Guest) -> None:
    hwpt = guest.ste()
    with refused(errno.ENOENT):
        guest.bound.attach(hwpt)
    assert guest.bound.attached == {} and guest.sees() is None
    guest.bound.attach(guest.parent)
    with refused(errno.ENOENT):
        guest.bound.replace(hwpt)
    assert guest.bound.attached == {None: guest.parent} and hwpt.users == 0


@pytest.mark.parametrize(
    ("word0", "word1"),
    [
        (V | 6 << 1, 0),  # stage 2
        (V | 7 << 1, 0),  # nested, which is the host's to ask for
        (V | S1 | 1 << 52, 0),
        (V | S1, 1 << 8),
        (V | S1, 1 << 30),  # STRW
        (V | S1, 2 << 28),  # EATS: split
        (V | S1, 3 << 28),
    ],
)
def test_an_illegal_ste(guest: Guest, word0: int, word1: int) -> None:
    """arm_smmu_validate_vste: EIO."""
    with refused(errno.EIO):
        guest.ste(word0, word1)
    assert guest.viommu.users == 0


def test_data_that_does_not_fit(guest: Guest) -> None:
    for data, flags, code in (
        (SmmuV3Ste(V | S1), AllocFlags.PASID, errno.EOPNOTSUPP),
        (VtdStage1(IPA), AllocFlags.NONE, errno.EINVAL),
        (None, AllocFlags.NONE, errno.EOPNOTSUPP),
    ):
        with refused(code):
            memory = None if data is None else guest.world.memory
            guest.bound.hwpt_alloc(guest.viommu, flags, data=data, memory=memory)
    for words in ((1 << 64, 0), (0, -1)):
        with refused(errno.EINVAL):
            SmmuV3Ste(*words)


def test_another_smmu(guest: Guest) -> None:
    """A HWPT is for devices of the vIOMMU's own SMMU (arm_smmu_attach_dev_nested)."""
    other = Device(guest.context, guest.world.add(guest.make_iommu()).endpoint)
    with refused(errno.EINVAL):
        other.hwpt_alloc(guest.viommu, data=SmmuV3Ste(V | BYPASS), memory=guest.world.memory)
    with refused(errno.EINVAL):
        other.attach(guest.ste(V | BYPASS))
    with refused(errno.EINVAL):
        other.attach(guest.ste(V | ABORT))
    with refused(errno.EINVAL):
        other.viommu_alloc(guest.parent, ViommuType.ARM_SMMUV3)


def test_two_levels_of_context_descriptors(guest: Guest) -> None:
    guest.tables()
    guest.put(0, IPA + 0x7000 | 1)
    guest.descriptor(at=0x7000)
    guest.viommu.vdevice_alloc(guest.bound, VSID)
    for dss, seen in ((2, DATA), (0, None)):
        guest.attach(guest.ste(V | S1 | 2 << 4 | 12 << 59, dss))
        assert guest.sees() == seen
    guest.attach(guest.ste(V | S1 | 2 << 4 | 12 << 59, 1))
    assert guest.sees(IPA + DATA) == DATA, "S1DSS: bypass"


@pytest.mark.parametrize("fmt", [0, 1, 2], ids=["linear", "leaves of 4 KiB", "leaves of 64 KiB"])
def test_substreams(guest: Guest, fmt: int) -> None:
    """Descriptor n is for PASID n: read at the first access, and again after CFGI_CD (5.3 for tables of two levels)."""
    wide = {0: 0, 1: 6, 2: 10}[fmt]
    pasid = 3 if not fmt else (1 << wide) + 3
    leaf = 0x4_0000 if fmt else CD
    guest.tables()
    guest.descriptor()
    if fmt:
        guest.put(CD + 8, IPA + leaf | 1)
    guest.descriptor(at=leaf + 64 * 3)
    guest.viommu.vdevice_alloc(guest.bound, VSID)
    guest.attach(guest.ste(V | S1 | fmt << 4 | 12 << 59, 1))
    queue = guest.events()
    assert guest.sees(pasid=pasid) == DATA and guest.sees(IPA + DATA) == DATA
    assert guest.sees(IOVA + PAGE, pasid) is None
    assert guest.sees(pasid=(1 << 12) + 3) is None, "beyond S1CDMAX"
    events = [struct.unpack("<4Q", event.data)[0] for event in queue.read(1 << 12)]
    assert [(word & 0xFF, word >> 11 & 1, word >> 12 & 0xF_FFFF, word >> 32) for word in events] == [
        (0x10, 1, pasid, VSID),
        (0x08, 1, (1 << 12) + 3, VSID),
    ]
    guest.tables(DATA + PAGE)
    assert guest.sees(pasid=pasid) == DATA
    guest.viommu.invalidate([command(NH_VA | ASID << 48, IOVA)])
    assert guest.sees(pasid=pasid) == DATA + PAGE
    guest.descriptor(at=leaf + 64 * 3, clear=1 << 31)
    assert guest.sees(pasid=pasid) == DATA + PAGE, "the old one is cached"
    guest.viommu.invalidate([command(CD_ONE | pasid << 12 | VSID << 32)])
    assert guest.sees(pasid=pasid) is None and [kind for kind, _, _, _ in decode(queue)] == [0x0A]
    guest.bound.replace(guest.parent)
    assert guest.sees(pasid=pasid) is None and guest.device.group.pasids == {}


def test_substreams_of_two_viommus(guest: Guest) -> None:
    """Each attaches the PASIDs of its own HWPTs, and detaches them."""
    guest.tables()
    guest.descriptor(at=CD + 64 * 3)
    second = guest.bound.viommu_alloc(guest.parent, ViommuType.ARM_SMMUV3)
    second.vdevice_alloc(guest.bound, VSID)
    data = SmmuV3Ste(V | S1 | IPA + CD | 4 << 59, 1)
    guest.attach(guest.bound.hwpt_alloc(second, data=data, memory=guest.world.memory))
    assert guest.sees(pasid=3) == DATA
    guest.bound.replace(guest.parent)
    assert guest.sees(pasid=3) is None


def test_many_substreams(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than a number of PASIDs stay attached; others are read again."""
    monkeypatch.setattr("vmodel.iommu.iommufd.viommu._MOST_PASIDS", 2)
    guest.tables()
    guest.viommu.vdevice_alloc(guest.bound, VSID)
    for n in range(1, 6):
        guest.descriptor(at=CD + 64 * n)
    guest.attach(guest.ste(V | S1 | 4 << 59, 1))
    for n in (1, 2, 3, 4, 5, 1):
        assert guest.sees(pasid=n) == DATA and len(guest.device.group.pasids) <= 2


def test_substreams_without_a_table(guest: Guest) -> None:
    """S1CDMAX 0: C_BAD_SUBSTREAMID (7.3.5)."""
    guest.translated()
    queue = guest.events()
    assert guest.sees(pasid=3) is None and [kind for kind, _, _, _ in decode(queue)] == [0x08]


def test_a_device_without_pasids(guest: Guest) -> None:
    guest.tables()
    guest.descriptor(at=CD + 64 * 3)
    guest.viommu.vdevice_alloc(guest.bound, VSID)
    guest.device.endpoint.max_pasids = 0
    guest.attach(guest.ste(V | S1 | 4 << 59, 1))
    assert guest.sees(pasid=3) is None
    guest.device.endpoint.max_pasids = 3
    assert guest.sees(pasid=3) is None
    guest.device.endpoint.max_pasids = 4
    assert guest.sees(pasid=3) == DATA


# ---- events ----------------------------------------------------------------------------------


def test_an_event(guest: Guest) -> None:
    """arm_vmaster_report_event: F_TRANSLATION with the VM's StreamID; RnW, CLASS and the address."""
    guest.translated()
    queue = guest.events()
    address = IOVA + PAGE + 8
    assert guest.sees(address) is None and guest.device.writes(address) is None
    assert decode(queue) == [(0x10, VSID, address, 1 << 35 | 2 << 40), (0x10, VSID, address, 2 << 40)]


@pytest.mark.parametrize(
    ("clear", "more", "event"),
    [
        (1 << 31, 0, 0x0A),  # V
        (1 << 41, 0, 0x0A),  # AA64
        (0, 1 << 15, 0x0A),  # ENDI
        (0, 1 << 6, 0x0A),  # granules of 64 KiB
        (0x3F, 10, 0x0A),  # 54 bits
        (0x3F, 40, 0x0A),  # 24 bits
        (0, 1 << 14, 0x10),  # EPD0: no walks
        (1 << 45, 1 << 14, None),  # and without R, no event
    ],
)
def test_a_bad_context_descriptor(guest: Guest, clear: int, more: int, event: int | None) -> None:
    hwpt = guest.translated()
    queue = guest.events()
    guest.descriptor(clear=clear, more=more)
    assert guest.sees() == DATA, "the old one is cached"
    assert guest.viommu.invalidate([command(CD_ONE | VSID << 32, 1)]) == 1
    assert guest.sees() is None
    assert [(kind, sid) for kind, sid, _, _ in decode(queue)] == ([] if event is None else [(event, VSID)])
    guest.descriptor()
    guest.viommu.invalidate([command(CD_ALL | VSID << 32)])
    assert guest.sees() == DATA and hwpt.users == 1


def test_no_events_of_stage_2(guest: Guest) -> None:
    """arm_smmu_handle_event: an event with S2 is the host's."""
    guest.translated()
    queue = guest.events()
    guest.put(TABLES + 3 * PAGE + 8 * index(IOVA, 1), TO_PAGE[guest.format](1) | IPA + 2 * MiB)
    guest.viommu.invalidate([command(NSNH_ALL)])
    assert guest.sees() is None and decode(queue) == []


def test_no_events_without_r_or_without_a_queue(guest: Guest) -> None:
    guest.translated()
    assert guest.sees(0) is None
    queue = guest.events()
    guest.descriptor(clear=1 << 45)
    guest.viommu.invalidate([command(CD_ONE | VSID << 32)])
    assert guest.sees(0) is None and decode(queue) == []


def test_no_events_after_detach(guest: Guest) -> None:
    guest.translated()
    queue = guest.events()
    guest.bound.replace(guest.parent)
    assert guest.sees(0) is None and decode(queue) == []


def test_events_keep_the_id_of_the_attachment(guest: Guest) -> None:
    """struct arm_smmu_vmaster: the StreamID is taken when the HWPT is attached."""
    guest.translated()
    queue = guest.events()
    for vdevice in list(guest.viommu.vdevices.values()):
        vdevice.destroy()
    guest.viommu.vdevice_alloc(guest.bound, 5)
    assert guest.sees(0) is None and [sid for _, sid, _, _ in decode(queue)] == [VSID]
    guest.bound.replace(guest.parent)
    guest.bound.replace(guest.ste())
    assert guest.sees(0) is None and [sid for _, sid, _, _ in decode(queue)] == [5]


def test_page_requests_are_no_events(guest: Guest) -> None:
    guest.tables()
    guest.descriptor()
    fault = FaultObject(guest.context, timeout=0.01)
    hwpt = guest.ste(fault=fault)
    guest.viommu.vdevice_alloc(guest.bound, VSID)
    guest.attach(hwpt)
    queue = guest.events()
    assert guest.sees(IOVA + PAGE) is None and decode(queue) == []


# ---- commands --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("commands", "seen"),
    [
        ([NH_ALL], [3, 4, 5, 6]),
        ([NH_ALL | 0xFFFF << 32], [3, 4, 5, 6]),  # whatever VMID
        ([NSNH_ALL], [3, 4, 5, 6]),
        ([NH_ASID | ASID << 48], [3, 4, 5, 6]),
        ([NH_ASID | ASID + 1 << 48], [0, 1, 2, 3]),
        ([(NH_VA | ASID << 48, IOVA + PAGE)], [0, 4, 2, 3]),
        ([(NH_VA | ASID + 1 << 48, IOVA + PAGE)], [0, 1, 2, 3]),
        ([(NH_VAA, IOVA + 2 * PAGE | 1)], [0, 1, 5, 3]),
        ([(NH_VAA | 1 << 12, IOVA + PAGE | 1 << 10)], [0, 4, 5, 3]),  # NUM 1: two pages
        ([(NH_VAA | 1 << 20, IOVA + 2 * PAGE | 1 << 10)], [0, 1, 5, 6]),  # SCALE 1: two pages
        ([(NH_VAA, IOVA), (NH_VAA, IOVA + 3 * PAGE)], [3, 1, 2, 6]),
        ([], [0, 1, 2, 3]),
    ],
)
def test_invalidation(guest: Guest, commands: Sequence[int | tuple[int, int]], seen: list[int]) -> None:
    """What is invalidated is walked again, and nothing else."""
    guest.translated()
    guest.tables(pages=4)
    guest.viommu.invalidate([command(NH_ALL)])
    before = [guest.sees(IOVA + n * PAGE) for n in range(4)]
    assert before == [DATA + n * PAGE for n in range(4)]
    guest.tables(DATA + 3 * PAGE, pages=4)
    words = [one if isinstance(one, tuple) else (one, 0) for one in commands]
    if words:
        assert guest.viommu.invalidate([command(*pair) for pair in words]) == len(words)
    assert [guest.sees(IOVA + n * PAGE) for n in range(4)] == [DATA + n * PAGE for n in seen]


@pytest.mark.parametrize("eats", [0, 1])
@pytest.mark.parametrize("has_ats", [False, True])
def test_a_devices_own_tlb(guest: Guest, eats: int, has_ats: bool) -> None:
    """With STE.EATS only ATC_INV invalidates it; IHI 0070 4.5.1: 2**Size pages, 52 for all."""
    guest.device.endpoint.has_ats = has_ats
    guest.translated(eats << 28)
    stale = DATA if eats and has_ats else DATA + PAGE
    assert guest.sees() == DATA
    guest.tables(DATA + PAGE)
    guest.viommu.invalidate([command(NSNH_ALL)])
    assert guest.sees() == stale
    guest.viommu.invalidate([command(ATC | VSID << 32, IOVA + 4 * PAGE & -4 * PAGE | 2)])
    assert guest.sees() == stale, "other pages"
    guest.viommu.invalidate([command(ATC | VSID << 32, IOVA & -4 * PAGE | 2)])
    assert guest.sees() == DATA + PAGE
    guest.tables(DATA)
    guest.viommu.invalidate([command(NSNH_ALL), command(ATC | 1 << 11 | 1 << 9 | VSID << 32, 52)])
    assert guest.sees() == DATA
    guest.bound.replace(guest.parent)
    assert guest.sees(IPA + DATA) == DATA
    guest.ioas.unmap(IPA, MiB)
    assert guest.sees(IPA + DATA) is None


@pytest.mark.parametrize(
    ("word0", "word1", "code"),
    [
        (3, 0, errno.EIO),  # CFGI_STE
        (4, 31, errno.EIO),  # CFGI_ALL
        (0x20, 0, errno.EIO),  # TLBI_EL2_ALL
        (0x28, 0, errno.EIO),  # TLBI_S12_VMALL: stage 2 is the host's
        (0x46, 0, errno.EIO),  # SYNC
        (NSNH_ALL | 1 << 32, 0, errno.EIO),
        (NH_ALL, 1, errno.EIO),
        (NH_ALL | 1 << 48, 0, errno.EIO),
        (NH_VA, 1 << 1, errno.EIO),
        (NH_VA | 1 << 12, IOVA, errno.EIO),  # NUM without TG
        (NH_VA, IOVA | 1 << 8, errno.EIO),  # TTL without TG
        (NH_VA, IOVA | 1 << 10, errno.EIO),  # TG alone
        (NH_VA | 1 << 12, IOVA | 2 << 10 | 1 << 8, errno.EIO),  # TTL 1 of 16 KiB
        (NH_VA | 1 << 25, IOVA | 1 << 10, errno.EIO),  # SCALE of 32
        (ATC | VSID << 32, 53, errno.EIO),
        (ATC | 5 << 32, 52, errno.EIO),  # no vDEVICE
        (ATC | 1 << 8 | VSID << 32, 52, errno.EIO),
        (CD_ONE | SID << 32, 0, errno.EIO),  # the physical StreamID
        (CD_ONE | 1 << 11 | VSID << 32, 0, errno.EIO),
        (CD_ALL | 1 << 12 | VSID << 32, 0, errno.EIO),
        (CD_ALL | VSID << 32, 1, errno.EIO),
    ],
)
def test_a_command_that_is_refused(guest: Guest, word0: int, word1: int, code: int) -> None:
    """arm_vsmmu_validate_user_cmd, arm_vsmmu_vsid_to_sid: those before it have been carried out."""
    guest.translated()
    assert guest.sees() == DATA
    guest.tables(DATA + PAGE)
    with pytest.raises(InvalidationError) as caught:
        guest.viommu.invalidate([command(NH_ALL), command(word0, word1), command(NH_ALL)])
    assert (caught.value.errno, caught.value.done) == (code, 1)
    assert guest.sees() == DATA + PAGE


def test_arrays_that_are_refused(guest: Guest) -> None:
    for entries in ([], [b"short"], [command(NH_ALL), 5], [command(NH_ALL)] * ((1 << 19) + 1)):
        with pytest.raises(InvalidationError) as caught:
            guest.viommu.invalidate(entries)
        assert (caught.value.errno, caught.value.done) == (errno.EINVAL, 0)
    hwpt = guest.translated()
    with refused(errno.EOPNOTSUPP):  # arm_smmu_nested_ops has no cache_invalidate_user
        hwpt.invalidate([])


# ---- CMDQ-V ----------------------------------------------------------------------------------


def test_cmdqv(world: World) -> None:
    """tegra241_vintf_init_vsid, tegra241_vintf_alloc_lvcmdq_user."""
    guest = Guest(world, what=ViommuType.TEGRA241_CMDQV)
    queue = guest.viommu.hw_queue_alloc
    kind = HwQueueType.TEGRA241_CMDQV
    with refused(errno.EINVAL):
        guest.viommu.vdevice_alloc(guest.bound, 1 << 20)
    assert guest.viommu.users == 0
    for position, iova, length, code in (
        (2, IPA, PAGE, errno.EINVAL),
        (1, IPA, PAGE, errno.EIO),
        (0, IPA, 16, errno.EINVAL),
        (0, IPA, 3 * PAGE, errno.EINVAL),
        (0, IPA + PAGE, 2 * PAGE, errno.EINVAL),
        (0, IPA - PAGE, PAGE, errno.ENOENT),
        (0, IPA + MiB - PAGE, 2 * PAGE, errno.ENOENT),
    ):
        with refused(code):
            queue(kind, position, iova, length)
    assert guest.ioas.unmap(IPA, MiB) == MiB, "a queue that is refused pins nothing"
    guest.ioas.map(GPA, PAGE, iova=IPA)
    guest.ioas.map(GPA + 2 * PAGE, PAGE, iova=IPA + PAGE)
    with refused(errno.EFAULT):
        queue(kind, 0, IPA, 2 * PAGE)
    first = queue(kind, 0, IPA + 64, 64)
    assert (first.gpa, first.index) == (GPA + 64, 0)
    with refused(errno.EBUSY):
        guest.viommu.destroy()
    first.destroy()
    guest.context.close()
    plain = world.iommu("smmu-v3")
    with Context() as context:
        bound = Device(context, world.add(plain).endpoint)
        parent = bound.hwpt_alloc(Ioas(context), AllocFlags.NEST_PARENT)
        with refused(errno.EOPNOTSUPP):
            bound.viommu_alloc(parent, ViommuType.TEGRA241_CMDQV)


# ---- AMD-Vi ----------------------------------------------------------------------------------


def gdte(gcr3: int = IPA, *, word0: int = 0, levels: int = 4, glx: int = 0) -> AmdGuestDte:
    first = 1 | 1 << 54 | 1 << 55 | glx << 56 | (gcr3 >> 12 & 7) << 58 | word0
    second = (gcr3 >> 15 & 0xFFFF) << 16 | (gcr3 >> 31 & 0x1F_FFFF) << 43
    return AmdGuestDte((first, second, levels - 4 << 54, 0))


def test_amd(world: World) -> None:
    guest = Guest(world, "amd-vi", 0xDEAD)  # amd_iommufd_get_viommu_size: whatever the type is
    guest.tables()
    guest.put(DATA, DATA)
    guest.put(CD, IPA + TABLES | 1)
    guest.put(0x7000, IPA + CD | 1)
    for data in (gdte(), gdte(IPA + 0x7000, glx=1)):
        guest.attach(guest.bound.hwpt_alloc(guest.viommu, data=data, memory=world.memory))
        assert guest.sees() == DATA and guest.sees(IOVA + PAGE) is None
    guest.put(CD + 8 * 5, IPA + TABLES | 1)
    for pasid, seen in ((5, DATA), (6, None), (512 * 512, None)):
        assert guest.sees(pasid=pasid) == seen
    for bit, seen in ((1 << 54, DATA), (1 << 55, None)):  # without GIOV; without GV
        without = AmdGuestDte((gdte().words[0] & ~bit, *gdte().words[1:]))
        guest.attach(guest.bound.hwpt_alloc(guest.viommu, data=without, memory=world.memory))
        assert guest.sees(IPA + DATA) == DATA and guest.sees(pasid=5) == seen
    with refused(errno.EOPNOTSUPP):
        guest.viommu.invalidate([])
    with refused(errno.EOPNOTSUPP):
        guest.bound.hwpt_alloc(guest.parent, data=gdte(), memory=world.memory)
    guest.context.close()


def test_amd_entries_that_are_refused(world: World) -> None:
    """validate_gdte_nested."""
    guest = Guest(world, "amd-vi")
    for data, code in (
        (gdte(word0=1 << 9), errno.EINVAL),
        (gdte(word0=1 << 12), errno.EINVAL),
        (gdte(0), errno.EINVAL),
        (gdte(levels=6), errno.EINVAL),
        (gdte(glx=3), errno.EINVAL),
        (gdte(levels=5), errno.EOPNOTSUPP),
        (SmmuV3Ste(V), errno.EOPNOTSUPP),
    ):
        with refused(code):
            guest.bound.hwpt_alloc(guest.viommu, data=data, memory=world.memory)
    guest.context.close()


# ---- VT-d ------------------------------------------------------------------------------------


def test_vtd(world: World) -> None:
    """struct iommu_hwpt_vtd_s1; widths and flags count when it is attached (intel_pasid_setup_nested)."""
    with Context() as context:
        ioas = Ioas(context)
        ioas.map(GPA, MiB, iova=IPA)
        device = world.add(world.iommu())
        bound = Device(context, device.endpoint)
        parent = bound.hwpt_alloc(ioas, AllocFlags.NEST_PARENT)
        for data in (VtdStage1(IPA, 57), VtdStage1(IPA, 39), VtdStage1(IPA, flags=1), VtdStage1(IPA, flags=2)):
            hwpt = bound.hwpt_alloc(parent, data=data, memory=world.memory)
            with refused(errno.EINVAL):
                bound.attach(hwpt)
            hwpt.destroy()
        bound.attach(bound.hwpt_alloc(parent, data=VtdStage1(IPA + TABLES, flags=VtdStage1.WPE), memory=world.memory))
        at = GPA + TABLES
        for level in (4, 3, 2, 1):
            to = TO_TABLE if level > 1 else TO_PAGE
            next_one = IPA + at - GPA + PAGE if level > 1 else IPA + DATA
            slot = at + 8 * index(IOVA, level)
            world.ram[slot : slot + 8] = (to[TableFormat.X86](int(level == 1)) | next_one).to_bytes(8, "little")
            at += PAGE
        assert device.dma.read(IOVA, 8) == bytes(8)
        with refused(errno.EOPNOTSUPP):
            bound.viommu_alloc(parent, ViommuType.ARM_SMMUV3)


def test_read_only_mappings_of_a_parent(world: World) -> None:
    """VT-d's parents have none: generic_pt/fmt/vtdss.h:235, PT_FEAT_VTDSS_FORCE_WRITEABLE; other kinds' may."""
    with Context() as context:
        for kind, code in (("vt-d", errno.EINVAL), ("smmu-v3", 0), ("amd-vi", 0)):
            bound, ioas = Device(context, world.add(world.iommu(kind)).endpoint), Ioas(context)
            ioas.map(GPA, PAGE, Access.READ, iova=IPA)
            if code:
                with refused(code):
                    bound.hwpt_alloc(ioas, AllocFlags.NEST_PARENT)
                assert ioas.unmap(IPA, PAGE) == PAGE and ioas.users == 0
            bound.hwpt_alloc(ioas)
            bound.hwpt_alloc(ioas, AllocFlags.NEST_PARENT)
            if code:
                with refused(code):
                    ioas.map(GPA, PAGE, Access.READ, iova=IPA)
                assert ioas.mappings() == []
            ioas.map(GPA, PAGE, Access.WRITE, iova=IPA + PAGE)
