"""vIOMMUs of CMDQ-V and AMD-Vi, and nested HWPTs of VT-d.

Linux 7.3: drivers/iommu/arm/arm-smmu-v3/tegra241-cmdqv.c, drivers/iommu/amd/{iommufd,nested}.c,
drivers/iommu/intel/nested.c; AMD 48882, 2.2.2.1.
"""

from __future__ import annotations

import errno

from tests.iommu.tables import TO_PAGE, TO_TABLE, index
from tests.spaces.vm import (
    CD,
    DATA,
    GPA,
    IOVA,
    IPA,
    PAGE,
    TABLES,
    Guest,
    V,
)
from tests.spaces.world import World, refused
from vmodel.errors import Access
from vmodel.iommu import AllocFlags, TableFormat
from vmodel.iommu.iommufd import (
    AmdGuestDte,
    Context,
    Device,
    HwQueueType,
    Ioas,
    SmmuV3Ste,
    ViommuType,
    VtdStage1,
)
from vmodel.span import MiB


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
