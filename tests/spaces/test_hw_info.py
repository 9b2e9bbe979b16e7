"""IOMMU_GET_HW_INFO: the registers of each kind follow its capabilities, with Linux's layout (uapi/linux/iommufd.h)."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator

import pytest

from tests.spaces.world import World, refused
from vmodel.iommu.drivers.intel_vtd import IntelVtd
from vmodel.iommu.iommufd import AmdInfo, CmdqvInfo, Context, Device, HwCapability, HwInfoType, SmmuV3Info, VtdInfo
from vmodel.span import KiB, MiB


@pytest.fixture
def context() -> Iterator[Context]:
    with Context() as made:
        yield made


def device(world: World, context: Context, kind: str, **changes: object) -> Device:
    return Device(context, world.add(world.iommu(kind, **changes)).endpoint)


def bits(value: int, first: int, last: int) -> int:
    return value >> first & (1 << last - first + 1) - 1


def test_vtd(world: World, context: Context) -> None:
    """drivers/iommu/intel/iommu.c:3709, intel_iommu_hw_info; fields of CAP and ECAP: VT-d 11.4.2, 11.4.3."""
    info = device(world, context, "vt-d", input_bits=57, pasid_bits=18).get_info()
    assert isinstance(info.registers, VtdInfo) and info.type == HwInfoType.INTEL_VTD
    flags, reserved, cap, ecap = struct.unpack("<IIQQ", info.data)
    assert (flags, reserved) == (1, 0)
    assert bits(cap, 16, 21) == 56 and bits(cap, 8, 12) == 0b1110 and bits(cap, 60, 60) == 1
    assert bits(ecap, 26, 26) == 1 and bits(ecap, 40, 40) == 1 and bits(ecap, 35, 39) == 17 and bits(ecap, 43, 43) == 1
    plain = device(world, context, "vt-d", nesting=False, pasid_bits=0, coherent=True, enforce_snoop=False).get_info()
    _, _, cap, ecap = struct.unpack("<IIQQ", plain.data)
    assert bits(cap, 16, 21) == 47 and bits(cap, 60, 60) == 0
    assert bits(ecap, 26, 26) == 0 and bits(ecap, 40, 43) == 0 and bits(ecap, 7, 7) == 0 and bits(ecap, 0, 0) == 1


def test_caching_mode_of_vtd(world: World, context: Context) -> None:
    """To a user the unit is the one that the guest has: CM of CAP, bit 7 (VT-d 11.4.2)."""
    for caching_mode in (False, True):
        unit = world.iommu("vt-d")
        unit.driver = IntelVtd({"caching_mode": caching_mode})
        info = Device(context, world.add(unit).endpoint).get_info()
        assert isinstance(info.registers, VtdInfo) and bits(info.registers.cap, 7, 7) == caching_mode


def test_smmu(world: World, context: Context) -> None:
    """drivers/iommu/arm/arm-smmu-v3/arm-smmu-v3-iommufd.c:10, arm_smmu_hw_info; fields: IHI 0070, 6.3.1 to 6.3.6."""
    info = device(world, context, "smmu-v3", pasid_bits=16, output_bits=44, dirty_tracking=False).get_info()
    assert isinstance(info.registers, SmmuV3Info) and info.type == HwInfoType.ARM_SMMUV3
    flags, reserved, *idr, iidr, aidr = struct.unpack("<10I", info.data)
    assert (flags, reserved, idr[2], idr[4], iidr) == (0, 0, 0, 0, 0)
    assert bits(idr[0], 0, 3) == 0b1011 and bits(idr[0], 4, 4) == 1 and bits(idr[0], 6, 7) == 0
    assert bits(idr[0], 21, 22) == 2 and bits(idr[0], 24, 25) == 0
    assert bits(idr[1], 0, 5) == 32 and bits(idr[1], 6, 10) == 16
    assert bits(idr[5], 0, 2) == 4 and bits(idr[5], 4, 6) == 0b001
    assert aidr == 2
    pages = frozenset((16 * KiB, 32 * MiB))
    other = device(world, context, "smmu-v3", page_sizes=pages, stall=False).get_info().registers
    assert isinstance(other, SmmuV3Info)
    assert bits(other.idr[5], 4, 6) == 0b010 and bits(other.idr[0], 24, 25) == 1 and bits(other.idr[0], 6, 7) == 2


def test_amd(world: World, context: Context) -> None:
    """drivers/iommu/amd/iommufd.c:14, amd_iommufd_hw_info; masks: amd_iommu_types.h:76."""
    info = device(world, context, "amd-vi", pasid_bits=16, input_bits=64, dirty_tracking=False).get_info()
    assert isinstance(info.registers, AmdInfo) and info.type == HwInfoType.AMD
    efr, efr2 = struct.unpack("<QQ", info.data)
    assert efr2 == 0 and bits(efr, 1, 1) == 1 and bits(efr, 4, 4) == 1 and bits(efr, 52, 52) == 0
    assert bits(efr, 10, 11) == 2 and bits(efr, 14, 15) == 1 and bits(efr, 32, 36) == 15


@pytest.mark.parametrize("kind", ["pamu", "power-pe", "virtio-iommu"])
def test_kinds_without_registers(world: World, context: Context, kind: str) -> None:
    """drivers/iommu/iommufd/device.c:1676: no data, and the type that is asked for does not matter."""
    context.allow_unsafe_interrupts = True
    bound = device(world, context, kind)
    for wanted in (HwInfoType.NONE, HwInfoType.AMD):
        info = bound.get_info(wanted)
        assert (info.type, info.registers, info.data) == (HwInfoType.NONE, None, b"")


@pytest.mark.parametrize(
    ("kind", "own"),
    [("vt-d", HwInfoType.INTEL_VTD), ("smmu-v3", HwInfoType.ARM_SMMUV3), ("amd-vi", HwInfoType.AMD)],
)
def test_the_type_that_is_asked_for(world: World, context: Context, kind: str, own: HwInfoType) -> None:
    bound = device(world, context, kind)
    assert bound.get_info(own) == bound.get_info()
    for wanted in {*HwInfoType, 0xFEEDBEEF} - {own, HwInfoType.NONE}:
        with refused(errno.EOPNOTSUPP):
            bound.get_info(wanted)


def test_cmdqv(world: World, context: Context) -> None:
    """tegra241-cmdqv.c:870, tegra241_cmdqv_hw_info: beside the SMMU's own information."""
    iommu = world.iommu("smmu-v3")
    iommu.driver.params = iommu.driver.params.model_copy(update={"vcmdqs": 8})
    bound = Device(context, world.add(iommu).endpoint)
    assert bound.get_info(HwInfoType.TEGRA241_CMDQV).data == struct.pack("<IBBBB", 0, 1, 3, 4, 0)
    assert isinstance(bound.get_info(HwInfoType.TEGRA241_CMDQV).registers, CmdqvInfo)
    assert isinstance(bound.get_info().registers, SmmuV3Info)


def test_capabilities(world: World, context: Context) -> None:
    """device.c:1705: what the IOMMU and the device can do."""
    plain = device(world, context, "vt-d", dirty_tracking=False)
    assert plain.get_info().capabilities == HwCapability.PCI_ATS_NOT_SUPPORTED
    able = device(world, context, "vt-d")
    able.endpoint.has_ats = True
    assert able.get_info().capabilities == HwCapability.DIRTY_TRACKING
    unable = device(world, context, "vt-d", page_requests=False)
    unable.endpoint.has_ats = True
    assert HwCapability.PCI_ATS_NOT_SUPPORTED in unable.get_info().capabilities


def test_a_device_that_is_gone(world: World, context: Context) -> None:
    bound = device(world, context, "vt-d")
    bound.destroy()
    with refused(errno.ENOENT):
        bound.get_info()
