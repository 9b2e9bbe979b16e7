"""Which faults the VT-d unit reports in legacy mode, and how."""

from __future__ import annotations

import logging

import pytest

from tests.iommu.vtd_bench import (
    CONTEXT,
    DATA,
    FEADDR,
    FECTL,
    FEDATA,
    FEUADDR,
    FSTS,
    OUTSIDE,
    PFO,
    PPF,
    ROOT,
    SID,
    TABLES,
    Bench,
)
from vmodel.devices.vtd.codes import FaultCode
from vmodel.errors import DmaFault
from vmodel.pci.caps import ResetKind

# ---- faults ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code,root,context",
    [
        (FaultCode.ROOT_NOT_PRESENT, (CONTEXT, 0), (0, 0)),
        (FaultCode.ROOT_RESERVED, (CONTEXT | 3, 0), (0, 0)),
        (FaultCode.ROOT_RESERVED, (CONTEXT | 1, 1), (0, 0)),
        (FaultCode.ROOT_RESERVED, (CONTEXT | 1 | 1 << 60, 0), (0, 0)),
        (FaultCode.CONTEXT_ACCESS, (OUTSIDE | 1, 0), (0, 0)),
        (FaultCode.CONTEXT_NOT_PRESENT, (CONTEXT | 1, 0), (TABLES, 0x702)),
        (FaultCode.CONTEXT_RESERVED, (CONTEXT | 1, 0), (TABLES | 0x11, 0x702)),
        (FaultCode.CONTEXT_RESERVED, (CONTEXT | 1, 0), (TABLES | 1, 0x782)),
        (FaultCode.CONTEXT_RESERVED, (CONTEXT | 1, 0), (TABLES | 1, 1 << 32 | 0x702)),
        (FaultCode.CONTEXT_RESERVED, (CONTEXT | 1, 0), (TABLES | 1 | 1 << 60, 0x702)),
        (FaultCode.CONTEXT_INVALID, (CONTEXT | 1, 0), (TABLES | 5, 0x702)),
        (FaultCode.CONTEXT_INVALID, (CONTEXT | 1, 0), (TABLES | 13, 0x702)),
        (FaultCode.CONTEXT_INVALID, (CONTEXT | 1, 0), (TABLES | 1, 0x700)),
        (FaultCode.CONTEXT_INVALID, (CONTEXT | 1, 0), (TABLES | 1, 0x703)),
        (FaultCode.TABLE_ACCESS, (CONTEXT | 1, 0), (OUTSIDE | 1, 0x702)),
        (FaultCode.NO_READ, (CONTEXT | 1, 0), (TABLES | 1, 0x702)),
        # Software may keep things in AVAIL.
        (FaultCode.NO_READ, (CONTEXT | 1, 0), (TABLES | 1, 0x77A)),
    ],
)
def test_tables_of_devices(bench: Bench, code: FaultCode, root: tuple[int, int], context: tuple[int, int]) -> None:
    bench.words(ROOT, *root)
    bench.words(CONTEXT + 16 * SID["edu0"], *context)
    bench.on()
    bench.refused("edu0", 0x7123)
    assert bench.record() == (0x7000, code, 0x18, True)


@pytest.mark.parametrize("root", [OUTSIDE, (1 << 64) - 4096])
def test_the_root_is_nowhere(bench: Bench, root: int) -> None:
    bench.on(root)
    bench.refused("edu0", 0x7000)
    assert bench.record() == (0x7000, FaultCode.ROOT_ACCESS, 0x18, True)


@pytest.mark.parametrize(
    "entry,write,code",
    [
        (0, True, FaultCode.NO_WRITE),
        (DATA | 1, True, FaultCode.NO_WRITE),
        (DATA | 2, False, FaultCode.NO_READ),
        (DATA | 3 | 1 << 62, False, FaultCode.TABLE_RESERVED),
    ],
)
def test_pages(bench: Bench, entry: int, write: bool, code: FaultCode) -> None:
    root = bench.translate("edu0")
    bench.words(bench.slot(root, 0x7000, 4), entry)
    bench.on()
    bench.refused("edu0", 0x7FFF, write=write)
    assert bench.record() == (0x7000, code, 0x18, not write)


def test_too_wide(bench: Bench) -> None:
    bench.translate("edu0", levels=3)
    bench.on()
    bench.refused("edu0", 1 << 39, write=True)
    assert bench.record() == (1 << 39, FaultCode.ADDRESS_TOO_WIDE, 0x18, False)


def test_no_report_is_wanted(bench: Bench) -> None:
    bench.context("edu0", 2, 0)  # FPD counts without P
    bench.on()
    bench.refused("edu0", 0)
    bench.context("edu0", TABLES | 3, 0x702)
    bench.refused("edu0", 0)
    assert bench.get(FSTS) == 0 and bench.record() is None


def test_records_run_over(bench: Bench) -> None:
    bench.on()
    for n in range(9):
        bench.refused("edu0", n << 12)
    assert bench.get(FSTS) == PPF | PFO
    assert [bench.record(n) for n in range(8)] == [(n << 12, 1, 0x18, True) for n in range(8)]
    for n in range(3):
        bench.clear(n)
    assert bench.get(FSTS) == PPF | PFO | 3 << 8
    bench.refused("edu0", 0x9000)
    assert bench.record(0) is None  # nothing is recorded as long as PFO is set
    bench.put(FSTS, PFO)
    bench.refused("edu0", 0xA000)
    assert bench.record(0) == (0xA000, 1, 0x18, True)
    assert bench.get(FSTS) == PPF | 3 << 8
    for n in range(8):
        bench.clear(n)
    assert bench.get(FSTS) == 0


def test_fault_event(bench: Bench) -> None:
    bench.on()
    line = bench.lines["edu1"]
    bench.refused("edu1", 0)
    assert bench.get(FECTL) == 3 << 30 and not line.sent
    bench.put(FEDATA, 0x4021)
    bench.put(FEADDR, 0xFEE0_1000)
    bench.put(FEUADDR, 1)
    bench.put(FECTL, 0)
    bench.run()
    message = (0x1_FEE0_1000, (0x4021).to_bytes(4, "little"))
    assert len(line.sent) + len(bench.lines["edu0"].sent) == 1 and bench.get(FECTL) == 0
    bench.refused("edu1", 0)
    assert len(line.sent) + len(bench.lines["edu0"].sent) == 1  # one is pending already
    for n in range(2):
        bench.clear(n)
    line.sent.clear()
    bench.refused("edu1", 0)
    assert line.sent == [message]  # by the device that is at fault
    bench.clear(2)
    line.broken = True
    bench.lines["edu0"].sent.clear()
    bench.refused("edu1", 0)
    assert bench.lines["edu0"].sent == [message]  # another helps out


def test_a_masked_fault_that_is_gone(bench: Bench) -> None:
    bench.on()
    bench.refused("edu0", 0)
    bench.clear()
    assert bench.get(FECTL) == 1 << 31
    bench.put(FECTL, 0)
    bench.run()
    assert not bench.lines["edu0"].sent


def pend(bench: Bench) -> None:
    """A fault of edu0's, which is to send the event for the unit."""
    bench.on()
    bench.put(FEADDR, 0xFEE0_1000)
    bench.put(FECTL, 0)
    with pytest.raises(DmaFault):
        bench.machine.devices["edu0"].dma.read(0, 4)
    bench.unit.backend.run_due(0)
    assert not bench.lines["edu0"].sent


def test_a_reset_of_another_device_drops_no_event(bench: Bench) -> None:
    """7.3: the event is the unit's.  That a device sends it for the unit is our way; its reset is no business of it."""
    pend(bench)
    bench.machine.devices["edu0"].reset(ResetKind.FUNCTION)
    bench.run()
    assert bench.lines["edu0"].sent == [(0xFEE0_1000, bytes(4))]


def test_a_reset_of_the_unit_drops_its_event(bench: Bench) -> None:
    """A unit that was reset has no faults, so none to report; whoever was to send it keeps work of its own."""
    pend(bench)
    ran: list[int] = []
    bench.machine.devices["edu0"].defer(lambda: ran.append(1))
    bench.unit.reset(ResetKind.DEVICE)
    bench.run()
    assert ran == [1] and not bench.lines["edu0"].sent


def test_nobody_can_send(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.on()
    bench.put(FECTL, 0)
    for line in bench.lines.values():
        line.broken = True
    with caplog.at_level(logging.ERROR, "vmodel.device"):
        bench.refused("edu0", 0)
    assert "an interrupt is lost" in caplog.text
    assert bench.get(FSTS) == PPF
