"""Nested HWPTs of an SMMUv3: a VM's stream table entry, context descriptors and tables translate real DMA.

Linux 7.3: drivers/iommu/arm/arm-smmu-v3/arm-smmu-v3-iommufd.c; IHI 0070, 5.2 and 5.4.
"""

from __future__ import annotations

import errno
import struct

import pytest

from tests.spaces.vm import (
    ABORT,
    ASID,
    BYPASS,
    CD,
    CD_ONE,
    DATA,
    IOVA,
    IPA,
    NH_VA,
    PAGE,
    S1,
    VSID,
    Guest,
    V,
    command,
    decode,
)
from tests.spaces.world import refused
from vmodel.iommu import AllocFlags
from vmodel.iommu.iommufd import (
    Device,
    SmmuV3Ste,
    ViommuType,
    VtdStage1,
)


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
