"""A VM's invalidation commands (Linux arm_vsmmu_cache_invalidate; IHI 0070, chapter 4)."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import pytest

from tests.spaces.vm import (
    ASID,
    ATC,
    CD,
    CD_ALL,
    CD_ONE,
    DATA,
    IOVA,
    IPA,
    NH_ALL,
    NH_ASID,
    NH_VA,
    NH_VAA,
    NSNH_ALL,
    PAGE,
    S1,
    SID,
    VSID,
    Guest,
    V,
    command,
)
from tests.spaces.world import refused
from vmodel.iommu.iommufd import (
    InvalidationError,
)
from vmodel.span import MiB


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
    ("word0", "fresh"),
    [
        (0, []),
        (1 << 11 | 3 << 12, [3]),
        (1 << 11 | 3 << 12 | 1 << 9, [3, 4]),  # Global
        (3 << 12 | 1 << 9, []),  # without SSV, SSID and Global do not count
    ],
)
def test_device_tlbs_of_pasids(guest: Guest, word0: int, fresh: list[int]) -> None:
    """IHI 0070, 4.5.1: SSV, SSID, Global."""
    guest.device.endpoint.has_ats = True
    guest.tables()
    for n in range(5):
        guest.descriptor(at=CD + 64 * n)
    guest.viommu.vdevice_alloc(guest.bound, VSID)
    guest.attach(guest.ste(V | S1 | 4 << 59, 2 | 1 << 28))
    assert [guest.sees(pasid=n) for n in (3, 4)] == [DATA, DATA]
    guest.tables(DATA + PAGE)
    guest.viommu.invalidate([command(NSNH_ALL), command(ATC | word0 | VSID << 32, 52)])
    assert [n for n in (3, 4) if guest.sees(pasid=n) == DATA + PAGE] == fresh


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
