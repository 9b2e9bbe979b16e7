"""Devices with TLBs of their own behind the VT-d unit: what takes translations out of them, and who may have one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.iommu.ats import DTE, MODEL, edu, switch
from tests.iommu.vtd_bench import DATA, FSTS, PASIDE, PRESENT, ROOT, USER, Bench, ScalableBench
from vmodel.devices.vtd.codes import FaultCode
from vmodel.errors import DmaFault, Reason


@pytest.fixture
def ats() -> Iterator[ScalableBench]:
    """edu0 has ATS on, and maps 64 KiB from 0 on without a PASID and with 1 and 2."""
    made = ScalableBench(params="ats = true, report_stale = true", model=MODEL)
    made.device("edu0", PRESENT | PASIDE | DTE)
    for pasid in (0, 1, 2):
        root = made.first("edu0", pasid)
        for page in range(16):
            made.map_first(root, page << 12, DATA + (page << 12))
    made.on()
    switch(made, True)
    yield made
    made.close()


def remap(bench: ScalableBench, page: int, pasid: int) -> None:
    """What the tables say of a page now is `new`."""
    table = int.from_bytes(bench.ram[bench.pasid_tables["edu0"] + 64 * pasid + 16 :][:8], "little") & ~0xFFF
    bench.words(bench.slot(table, page << 12, 4), DATA + 0x10_0000 | USER)
    bench.ram[DATA + 0x10_0000 : DATA + 0x10_0003] = b"new"


def read(bench: Bench, page: int, pasid: int) -> bytes:
    dma = bench.machine.devices["edu0"].dma
    return (dma.with_pasid(pasid) if pasid else dma).read(page << 12, 3)


def device_tlb(page: int, several: bool = False, source: int = 0x18) -> tuple[int, int]:
    return 3 | 31 << 16 | source << 32, page << 12 | several


def pasid_device_tlb(page: int, pasid: int, several: bool = False, everywhere: bool = False) -> tuple[int, int]:
    return 8 | 0x18 << 16 | pasid << 32, page << 12 | several << 11 | everywhere


EVERYTHING = 0x7_FFFF_FFFF_FFFF


@pytest.mark.parametrize(
    "pasid,descriptor,gone",
    [
        # That of the unit is not that of the device.
        (0, (2 | 1 << 4, 0), False),
        (1, (6 | 2 << 4 | 7 << 16 | 1 << 32, 0), False),
        (0, device_tlb(5), True),
        (0, device_tlb(4), False),
        (0, device_tlb(5, source=0x19), False),
        (0, device_tlb(4, True), True),  # 8 KiB
        (0, device_tlb(6, True), False),
        (0, device_tlb(0b1011, True), False),  # 32 KiB from 8 on
        (0, device_tlb(0b0011, True), True),
        (0, device_tlb(EVERYTHING, True), True),
        (1, device_tlb(EVERYTHING, True), False),
        (1, pasid_device_tlb(5, 1), True),
        (1, pasid_device_tlb(5, 2), False),
        (1, pasid_device_tlb(EVERYTHING, 1, True), True),
        (1, pasid_device_tlb(EVERYTHING, 2, True), False),
        (1, pasid_device_tlb(EVERYTHING, 2, True, True), True),
        (0, pasid_device_tlb(EVERYTHING, 1, True), False),
    ],
)
def test_what_reaches_a_devices_tlb(ats: ScalableBench, pasid: int, descriptor: tuple[int, int], gone: bool) -> None:
    for other in (0, 1, 2):
        assert read(ats, 5, other) == bytes(3)
    remap(ats, 5, pasid)
    ats.queue(descriptor)
    assert ats.get(FSTS) == 0
    assert read(ats, 5, pasid) == (b"new" if gone else bytes(3))
    # So a driver that omits it is detected.
    assert edu(ats).dma.stats.stale == (0 if gone else 1)


def test_a_device_without_is_as_ever(ats: ScalableBench) -> None:
    switch(ats, False)
    read(ats, 5, 0)
    remap(ats, 5, 0)
    ats.queue(device_tlb(5))
    assert read(ats, 5, 0) == bytes(3)
    ats.queue((2 | 2 << 4 | 7 << 16, 0))
    assert read(ats, 5, 0) == b"new"


@pytest.mark.parametrize("on", [True, False])
def test_a_change_empties_it(ats: ScalableBench, on: bool) -> None:
    switch(ats, not on)
    ats.queue((2 | 1 << 4, 0))
    read(ats, 5, 0)
    read(ats, 5, 1)
    switch(ats, on)
    remap(ats, 5, 0)
    remap(ats, 5, 1)
    ats.queue((2 | 1 << 4, 0))
    assert read(ats, 5, 0) == read(ats, 5, 1) == b"new"


def test_scalable_mode_has_to_allow_it(ats: ScalableBench) -> None:
    ats.device("edu0", PRESENT | PASIDE)
    ats.first("edu0")
    with pytest.raises(DmaFault) as caught:
        read(ats, 5, 0)
    ats.run()
    assert caught.value.reason is Reason.BLOCKED
    assert ats.record() == (0x5000, FaultCode.SM_NO_DEVICE_TLB, 0x18, True)
    switch(ats, False)
    ats.put(0x18, 0)
    ats.put(0x18, 1 << 31)
    with pytest.raises(DmaFault) as caught:
        read(ats, 5, 0)
    assert caught.value.reason is Reason.NOT_MAPPED


@pytest.mark.parametrize("kind,allowed", [(0, False), (1, True), (2, False)])
def test_legacy_mode_has_to_allow_it(kind: int, allowed: bool) -> None:
    """By the translation type of the context entry; a device without one may be behind any."""
    bench = Bench(params="ats = true", model=MODEL)
    root = bench.new_table()
    bench.map(root, 0x5000, DATA)
    for name in ("edu0", "edu1"):
        bench.context(name, root | kind << 2 | 1, 7 << 8 | 2)
    bench.on(ROOT)
    switch(bench, True)
    edu(bench, "edu1").dma.read(0x5000, 1)
    if allowed:
        assert edu(bench).dma.read(0x5000, 3) == bytes(3)
        bench.words(bench.slot(root, 0x5000, 4), DATA + 0x1000 | 3)
        bench.ram[DATA + 0x1000] = 1
        bench.queue((2 | 1 << 4, 0))
        assert edu(bench).dma.read(0x5000, 1) == b"\0" and edu(bench, "edu1").dma.read(0x5000, 1) == b"\1"
        bench.queue(device_tlb(5))
        assert edu(bench).dma.read(0x5000, 1) == b"\1"
    else:
        bench.refused("edu0", 0x5000)
        assert bench.record() == (0x5000, FaultCode.NO_DEVICE_TLB, 0x18, True)
    bench.close()


def test_a_unit_without() -> None:
    """The device's switch alone does nothing, and context entries cannot ask for it."""
    bench = Bench(model=MODEL)
    root = bench.translate("edu0")
    bench.map(root, 0x5000, DATA)
    bench.on()
    switch(bench, True)
    bench.read("edu0", 0x5000)
    bench.words(bench.slot(root, 0x5000, 4), 0)
    bench.queue((2 | 1 << 4, 0))
    assert bench.refused("edu0", 0x5000) is Reason.NOT_MAPPED
    bench.context("edu1", root | 1 << 2 | 1, 7 << 8 | 2)
    bench.refused("edu1", 0x5000)
    assert bench.record(1) == (0x5000, FaultCode.CONTEXT_INVALID, 0x20, True)
    bench.close()
