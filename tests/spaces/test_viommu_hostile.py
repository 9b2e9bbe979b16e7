"""Whatever a VM writes into its tables and sends as commands: its device reaches no memory but the VM's, and no call
fails but with an errno.  (The parent maps MiB of the RAM; the rest of the RAM is the host's.)
"""

from __future__ import annotations

import contextlib
import errno
import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.examples import examples
from tests.iommu.tables import TO_PAGE, TO_TABLE, index
from tests.spaces.world import RAM, World
from vmodel.errors import DmaFault, IommuError
from vmodel.iommu import AllocFlags, TableFormat
from vmodel.iommu.iommufd import (
    AmdGuestDte,
    Context,
    Device,
    InvalidationError,
    Ioas,
    NestedData,
    SmmuV3Ste,
    VeventqType,
    Viommu,
    ViommuType,
    VtdS1Invalidate,
    VtdStage1,
)
from vmodel.span import MiB

IPA, GPA = 256 * MiB, MiB
PAGE, TABLES, PASID = 4096, 0x1000, 3
OTHERS = b"\xee" * 8
WORD = st.integers(0, (1 << 64) - 1)
#: Where an entry may be made to lead: into the VM's memory, beside it, to the host's, anywhere.
TARGET = st.one_of(
    st.integers(0, 255).map(lambda page: IPA + page * PAGE),
    st.sampled_from([0, GPA, IPA - PAGE, IPA + MiB, IPA + MiB - PAGE, (1 << 47) + IPA]),
    st.integers(0, (1 << 52) - 1).map(lambda value: value & -PAGE),
)
#: (which word, where it leads, which bit of it is flipped); None: as it was.
CHANGES = st.lists(st.tuples(st.integers(0, 5), TARGET | st.none(), st.integers(0, 63) | st.none()), max_size=3)
STE = st.builds(
    lambda config, fmt, at, most: 1 | config << 1 | fmt << 4 | IPA + at * 64 | most << 59,
    st.sampled_from([5, 5, 5, 5, 0, 4, 7]),
    st.sampled_from([0, 0, 0, 1, 2, 3]),
    st.just(0) | st.integers(0, 2 * PAGE),
    st.sampled_from([0, 0, 0, 1, 31]),
)
COMMAND = st.binary(min_size=16, max_size=16) | st.builds(
    lambda op, low, high, word1: struct.pack("<QQ", op | low | high << 32, word1),
    st.sampled_from([5, 6, 0x10, 0x11, 0x12, 0x13, 0x30, 0x40]),
    st.integers(0, (1 << 26) - 1).map(lambda bits: bits & ~0xFF) | st.just(0),
    st.integers(0, 3),
    WORD | st.integers(0, 64) | st.just(0),
)
#: What the tables map before they are changed.
MAPPED = 0x4030_2000
IOVA = st.integers(-2 * PAGE, 2 * PAGE).map(lambda offset: MAPPED + offset) | WORD | TARGET


Changes = list[tuple[int, int | None, int | None]]


class Vm:
    """A VM with one device, a context descriptor or GCR3 entry, and tables that map a page."""

    def __init__(self, kind: str, changes: Changes) -> None:
        self.world = World()
        self.ram = self.world.ram
        self.ram[:] = OTHERS * (RAM // 8)
        self.ram[GPA : GPA + MiB] = bytes(MiB)
        words = self.tables(TableFormat.ARM_S1 if kind == "smmu-v3" else TableFormat.X86)
        if kind == "amd-vi":
            words[0] = (0, IPA + TABLES | 1)
        for which, target, bit in changes:
            at, word = words[which]
            word = word if target is None else word & ~(((1 << 52) - 1) & -PAGE) | target
            words[which] = (at, word if bit is None else word ^ 1 << bit)
        words += [(at + 8 * PASID * (8 if kind == "smmu-v3" else 1), word) for at, word in words[:2]]
        for at, word in words:
            self.ram[GPA + at : GPA + at + 8] = (word & (1 << 64) - 1).to_bytes(8, "little")
        self.context = Context()
        ioas = Ioas(self.context)
        ioas.map(GPA, MiB, iova=IPA)
        self.device = self.world.add(self.world.iommu(kind))
        self.bound = Device(self.context, self.device.endpoint)
        self.parent = self.bound.hwpt_alloc(ioas, AllocFlags.NEST_PARENT)

    def tables(self, form: TableFormat) -> list[tuple[int, int]]:
        """(where, word): a context descriptor's two, and one for each level."""
        words = [(0, 16 | 1 << 31 | 5 << 32 | 1 << 41 | 3 << 45), (8, IPA + TABLES)]
        for n, level in enumerate((4, 3, 2, 1)):
            at = TABLES + n * PAGE
            entry = TO_TABLE[form](0) | IPA + at + PAGE if level > 1 else TO_PAGE[form](1) | IPA + 16 * PAGE
            words.append((at + 8 * index(MAPPED, level), entry))
        return words

    def close(self) -> None:
        self.context.close()
        self.world.close()

    def attach(self, parent: object, data: NestedData) -> None:
        """Attaches a nested HWPT by these data, if they are legal."""
        hwpt = self.bound.hwpt_alloc(parent, data=data, memory=self.world.memory)  # type: ignore[arg-type]
        with contextlib.suppress(IommuError):
            self.bound.attach(hwpt)

    def accesses(self, iovas: list[int]) -> None:
        """Reads and writes get only to the VM's memory."""
        for iova in (MAPPED, *iovas):
            for dma in (self.device.dma, self.device.dma.with_pasid(PASID)):
                with contextlib.suppress(DmaFault):
                    assert dma.read(iova, 8) != OTHERS
                with contextlib.suppress(DmaFault):
                    dma.write(iova, b"written!")
        assert self.ram[:GPA] == OTHERS * (GPA // 8) and self.ram[GPA + MiB :] == OTHERS * ((RAM - GPA - MiB) // 8)


@given(
    CHANGES,
    st.one_of(STE, STE, STE, WORD),
    st.one_of(st.just(0), st.integers(0, 3), WORD),
    st.lists(COMMAND, max_size=8),
    st.lists(IOVA, max_size=8),
)
@settings(max_examples=examples(150), deadline=None)
def test_smmu(changes: Changes, word0: int, word1: int, commands: list[bytes], iovas: list[int]) -> None:
    vm = Vm("smmu-v3", changes)
    viommu = vm.bound.viommu_alloc(vm.parent, ViommuType.ARM_SMMUV3)
    viommu.vdevice_alloc(vm.bound, 1)
    queue = viommu.veventq_alloc(VeventqType.ARM_SMMUV3, 2)
    try:
        vm.attach(viommu, SmmuV3Ste(word0, word1))
    except IommuError as error:
        assert error.errno == errno.EIO
    vm.accesses(iovas)
    for command in commands:
        try:
            assert viommu.invalidate([command]) == 1
        except InvalidationError as error:
            assert (error.errno, error.done) == (errno.EIO, 0)
        vm.accesses(iovas)
    for event in queue.read(1 << 10):
        assert event.lost or (len(event.data), event.data[4]) == (32, 1)
    vm.close()


@given(
    CHANGES,
    st.tuples(WORD, WORD, WORD, WORD),
    st.sampled_from([0, 0, 0, 5, 300]),
    st.sampled_from([0, 0, 1, 2, 3]),
    st.lists(IOVA, max_size=8),
)
@settings(max_examples=examples(80), deadline=None)
def test_amd(changes: Changes, dte: tuple[int, int, int, int], page: int, glx: int, iovas: list[int]) -> None:
    gcr3 = IPA + page * PAGE
    legal = (1 | 3 << 54 | glx << 56 | (gcr3 >> 12 & 7) << 58, (gcr3 >> 15 & 0xFFFF) << 16, 0, 0)
    for words in (dte, legal):
        vm = Vm("amd-vi", changes)
        viommu: Viommu = vm.bound.viommu_alloc(vm.parent, 1)
        with contextlib.suppress(IommuError):
            vm.attach(viommu, AmdGuestDte(words))
        vm.accesses(iovas)
        vm.close()


@given(
    CHANGES,
    st.just(IPA + TABLES) | TARGET | WORD,
    st.sampled_from([48, 48, 48, 57, 39]),
    st.lists(st.tuples(WORD | TARGET, WORD | st.integers(0, 9)), max_size=4),
    st.lists(IOVA, max_size=8),
)
@settings(max_examples=examples(80), deadline=None)
def test_vtd(changes: Changes, root: int, width: int, entries: list[tuple[int, int]], iovas: list[int]) -> None:
    vm = Vm("vt-d", changes)
    hwpt = vm.bound.hwpt_alloc(vm.parent, data=VtdStage1(root, width), memory=vm.world.memory)
    with contextlib.suppress(IommuError):
        vm.bound.attach(hwpt)
    vm.accesses(iovas)
    for entry in entries:
        try:
            assert hwpt.invalidate([VtdS1Invalidate(*entry)]) == 1
        except InvalidationError as error:
            assert error.errno == errno.EINVAL and entry[0]
    vm.accesses(iovas)
    vm.close()
