"""Faults of a VM's tables come to its vEVENTQ (Linux arm_smmu_handle_event; IHI 0070, 7.3)."""

from __future__ import annotations

import pytest

from tests.iommu.tables import TO_PAGE, index
from tests.spaces.vm import (
    CD_ALL,
    CD_ONE,
    DATA,
    IOVA,
    IPA,
    NSNH_ALL,
    PAGE,
    TABLES,
    VSID,
    Guest,
    command,
    decode,
)
from vmodel.iommu.iommufd import (
    FaultObject,
)
from vmodel.span import MiB


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
