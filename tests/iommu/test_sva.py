"""What sharing a process's table needs, by kind: Linux 7.3, drivers/iommu; each row names the function that checks."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from tests.iommu.tables import make
from tests.iommu.world import World, group_of, iommu
from vmodel.errors import DmaFault, IommuError
from vmodel.iommu import DomainType, Table, TableFormat, sva_domain_alloc

X86, ARM = make(TableFormat.X86, 4), make(TableFormat.ARM_S1, 4)
LA57 = make(TableFormat.X86, 5)

#: (kind, what its IOMMU differs in, whether the device has ATS, the CPU's table, errno or 0)
NEEDS: list[tuple[str, dict[str, Any], bool, Table, int]] = [
    ("vt-d", {}, True, X86, 0),
    ("vt-d", {"page_requests": False}, True, X86, 0),  # intel_iommu_sva_supported: !pri_supported is no error
    ("vt-d", {}, False, X86, errno.EINVAL),  # intel_iommu_sva_supported: !ats_enabled
    ("vt-d", {"coherent": False}, True, X86, errno.ENODEV),  # intel_svm_check: ecap_smpwc, VTD_FLAG_SVM_CAPABLE
    ("vt-d", {"coherent": False}, False, X86, errno.ENODEV),  # the flag comes first
    ("vt-d", {"input_bits": 48}, True, LA57, errno.ENODEV),  # intel_svm_check: cap_fl5lp_support
    ("vt-d", {"input_bits": 57}, True, LA57, 0),
    ("vt-d", {"pasid_bits": 0}, True, X86, errno.ENOSPC),  # iommu_alloc_mm_data: iommu_alloc_global_pasid
    ("vt-d", {}, True, ARM, errno.EOPNOTSUPP),
    ("amd-vi", {}, False, X86, 0),  # amd_iommu_domain_alloc_sva, iommu_sva_set_dev_pasid: no ATS, no PRI
    ("amd-vi", {"page_requests": False, "coherent": False}, False, X86, 0),
    ("amd-vi", {"pasid_bits": 0}, False, X86, errno.ENOSPC),
    ("smmu-v3", {}, False, ARM, 0),
    # arm_smmu_enable_iopf: devices without stall handle faults themselves
    ("smmu-v3", {"stall": False, "page_requests": False}, False, ARM, 0),
    ("smmu-v3", {"coherent": False}, True, ARM, errno.EOPNOTSUPP),  # arm_smmu_sva_supported: ARM_SMMU_FEAT_COHERENCY
    ("smmu-v3", {"page_sizes": frozenset((1 << 16,))}, True, ARM, errno.EOPNOTSUPP),  # pgsize_bitmap & PAGE_SIZE
    ("smmu-v3", {"output_bits": 40}, True, ARM, errno.EOPNOTSUPP),  # oas of the CPU
    ("smmu-v3", {}, True, X86, errno.EOPNOTSUPP),
    ("riscv", {}, True, X86, errno.ENOSPC),
    ("riscv", {"pasid_bits": 20}, True, X86, errno.EOPNOTSUPP),  # iommu_sva_domain_alloc: no domain_alloc_sva
    ("virtio-iommu", {"pasid_bits": 20}, True, X86, errno.EOPNOTSUPP),
]


@pytest.mark.parametrize(("kind", "differs", "has_ats", "table", "code"), NEEDS)
def test_what_sva_needs(kind: str, differs: dict[str, Any], has_ats: bool, table: Table, code: int) -> None:
    world = World(iommu(kind, **differs))
    endpoint, dma = world.device("00:03.0")
    endpoint.has_ats = has_ats
    if code:
        with pytest.raises(IommuError) as caught:
            sva_domain_alloc(endpoint, world.memory, table)
        assert caught.value.errno == code
    else:
        domain = sva_domain_alloc(endpoint, world.memory, table)
        group_of(endpoint).attach_pasid(domain, 5)
        assert domain.type is DomainType.SVA
        with pytest.raises(DmaFault):  # the table is empty, and nobody pages in
            dma.with_pasid(5).read(0, 1)
    world.close()


def test_a_device_without_pasids() -> None:
    """iommu_alloc_global_pasid: max_pasids is 0."""
    world = World(iommu())
    endpoint = world.plug(world.function("00:03.0"), max_pasids=0)
    endpoint.has_ats = True
    with pytest.raises(IommuError) as caught:
        sva_domain_alloc(endpoint, world.memory, X86)
    assert caught.value.errno == errno.ENOSPC
    world.close()


@pytest.mark.parametrize(
    ("kind", "table", "lost", "code"),
    [
        ("vt-d", X86, "ATS", errno.EINVAL),  # intel_svm_set_dev_pasid: intel_iommu_sva_supported once more
        ("smmu-v3", ARM, "", 0),
    ],
)
def test_attached_to_a_second_device(kind: str, table: Table, lost: str, code: int) -> None:
    """A process has one domain for all devices for which it is right; the driver looks at each."""
    world = World(iommu(kind))
    first, second = (world.device(f"00:0{n}.0")[0] for n in (3, 4))
    first.has_ats = True
    domain = sva_domain_alloc(first, world.memory, table)
    group_of(first).attach_pasid(domain, 5)
    if code:
        with pytest.raises(IommuError, match=lost) as caught:
            group_of(second).attach_pasid(domain, 5)
        assert caught.value.errno == code
        assert group_of(second).pasids == {}
    else:
        group_of(second).attach_pasid(domain, 5)
        assert domain.users == 2
    world.close()
