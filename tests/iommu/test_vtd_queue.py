"""The invalidation queue of the VT-d unit."""

from __future__ import annotations

import pytest

from tests.iommu.vtd_bench import (
    FECTL,
    FSTS,
    GCMD,
    GSTS,
    ICS,
    IEADDR,
    IECTL,
    IEDATA,
    IQA,
    IQE,
    IQER,
    IQH,
    IQT,
    OUTSIDE,
    QIE,
    QUEUE,
    RAM,
    STATUS,
    Bench,
)

# ---- the queue ---------------------------------------------------------------------------------------


def test_wait_writes_its_status(bench: Bench) -> None:
    bench.queue((5 | 1 << 5 | 0xABCD_1234 << 32, STATUS), (5, 0))
    assert bench.ram[STATUS : STATUS + 8] == (0xABCD_1234).to_bytes(8, "little")
    assert bench.get(IQH, 8) == 0x20 and bench.get(ICS) == 0


def test_wait_interrupts(bench: Bench) -> None:
    bench.put(IEDATA, 0x55)
    bench.put(IEADDR, 0xFEE0_0000)
    bench.queue((5 | 1 << 4, 0))
    assert bench.get(ICS) == 1 and bench.get(IECTL) == 3 << 30
    bench.put(IECTL, 0)
    bench.run()
    assert bench.lines["edu0"].sent == [(0xFEE0_0000, b"\x55\0\0\0")]
    bench.queue((5 | 1 << 4, 0))
    bench.run()
    assert len(bench.lines["edu0"].sent) == 1  # ICS says so still
    bench.put(ICS, 1)
    bench.queue((5 | 1 << 4, 0))
    bench.run()
    assert len(bench.lines["edu0"].sent) == 2


def test_the_queue_wraps(bench: Bench) -> None:
    bench.queue(*[(5, 0)] * 255)
    assert bench.get(IQH, 8) == 0xFF0
    bench.queue((5 | 1 << 5 | 1 << 32, STATUS), (5 | 1 << 5 | 2 << 32, STATUS + 4))
    assert bench.get(IQH, 8) == 0x10
    assert bench.ram[STATUS : STATUS + 8] == b"\1\0\0\0\2\0\0\0"
    bench.put(GCMD, 0)
    assert bench.get(GSTS) & QIE == 0 and bench.get(IQH, 8) == 0


def test_device_tlbs_are_not_there(bench: Bench) -> None:
    bench.queue((3 | 0x18 << 32, 0x7000 | 1))
    assert bench.get(IQH, 8) == 0x10 and bench.get(FSTS) == 0


@pytest.mark.parametrize(
    "low,high,why",
    [
        (0, 0, 3),
        (4, 0, 3),  # interrupt entries
        (6, 0, 3),  # PASIDs
        (15, 0, 3),
        (5 | 1 << 9, 0, 3),
        (1, 0, 4),  # no such granularity
        (1 | 1 << 4, 1, 4),
        (2, 0, 4),
        (2 | 1 << 4, 1 << 8, 4),
        (2 | 3 << 4, 19, 4),
        (5 | 1 << 8, 0, 4),
        (5, 1, 4),
        (5 | 1 << 5, OUTSIDE, 0),
        (5 | 1 << 5, (1 << 64) - 4, 0),
    ],
)
def test_descriptors_that_are_wrong(bench: Bench, low: int, high: int, why: int) -> None:
    bench.put(FECTL, 0)
    bench.queue((5, 0), (low, high), (5 | 1 << 5 | 1 << 32, STATUS))
    bench.run()
    assert bench.get(FSTS) == IQE and bench.get(IQER, 8) == why
    assert sum(len(line.sent) for line in bench.lines.values()) == 1
    assert bench.get(IQH, 8) == 0x10 and bench.ram[STATUS] == 0
    bench.queue((5, 0))  # nothing happens before the error is cleared
    assert bench.get(IQH, 8) == 0x10
    bench.put(FSTS, IQE)  # and then it is there again
    assert bench.get(FSTS) == IQE
    bench.words(QUEUE + 0x10, 5, 0)
    bench.put(FSTS, IQE)
    assert bench.get(FSTS) == 0 and bench.get(IQH, 8) == 0x40 and bench.ram[STATUS] == 1


def test_the_tail_is_beyond_the_queue(bench: Bench) -> None:
    bench.queue((5, 0))
    bench.put(IQT, 0x1000, 8)
    assert bench.get(FSTS) == IQE and bench.get(IQER, 8) == 1 and bench.get(IQH, 8) == 0x10
    bench.put(IQT, 0x10, 8)
    bench.put(FSTS, IQE)
    assert bench.get(FSTS) == 0


@pytest.mark.parametrize("queue", [OUTSIDE, RAM, (1 << 64) - 4096])
def test_the_queue_is_nowhere(bench: Bench, queue: int) -> None:
    bench.put(IQA, queue | 7, 8)
    bench.put(GCMD, QIE)
    bench.put(IQT, 0x100, 8)
    assert bench.get(FSTS) == IQE and bench.get(IQER, 8) == 2 and bench.get(IQH, 8) == 0
