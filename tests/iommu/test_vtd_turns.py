"""The VT-d unit's invalidation queue is served in bounded turns, wherever the guest puts its head, tail and end."""

from __future__ import annotations

import itertools
import mmap
import os
import struct
from pathlib import Path

import pytest

from tests.iommu.vtd_bench import (
    FSTS,
    GCMD,
    GSTS,
    IQA,
    IQE,
    IQER,
    IQH,
    IQT,
    QIE,
    RAM,
    ROOT,
    RTADDR,
    SCALABLE,
    SRTP,
    STATUS,
    WIDE,
    Bench,
    ScalableBench,
)
from tests.waiting import until
from vmodel.device import ResetKind
from vmodel.devices.vtd.queue import TURN
from vmodel.devices.vtd.unit import VtdDevice
from vmodel.machine import parse
from vmodel.vfio_user.client import Client
from vmodel.vfio_user.wire import Region

#: A queue of the largest size: 128 pages.
LONG, LONG_SIZE = 0x40_0000, 0x8_0000
WAIT = struct.pack("<2Q", 5, 0)
WRITES_STATUS = struct.pack("<2Q", 5 | 1 << 5 | 1 << 32, STATUS)


def fill(bench: Bench) -> None:
    """A full queue that is on: waits that do nothing, then one that writes its status; the tail is not written."""
    bench.ram[LONG : LONG + LONG_SIZE - 32] = WAIT * (LONG_SIZE // 16 - 2)
    bench.ram[LONG + LONG_SIZE - 32 : LONG + LONG_SIZE] = WRITES_STATUS + WAIT
    bench.put(IQA, LONG | 7, 8)
    bench.put(GCMD, QIE)


# ---- where the head is -------------------------------------------------------------------------------


def test_the_width_changes_while_the_queue_is_on(scalable: ScalableBench) -> None:
    """6.5.2: head and tail count descriptors of the width in IQA.  A head between two reaches no tail."""
    scalable.ram[LONG : LONG + 0x20] = WAIT * 2
    scalable.put(IQA, LONG, 8)
    scalable.put(GCMD, QIE)
    scalable.put(IQT, 0x10, 8)
    assert scalable.get(IQH, 8) == 0x10
    scalable.put(RTADDR, ROOT | SCALABLE, 8)
    scalable.put(GCMD, QIE | SRTP)
    scalable.put(IQA, LONG | WIDE, 8)
    for at in range(0, 4096, 32):
        scalable.words(LONG + 0x10 + at, 5, 0, 0, 0)
    scalable.put(IQT, 0x40, 8)
    assert scalable.get(FSTS) == IQE and scalable.get(IQER, 8) == 0 and scalable.get(IQH, 8) == 0x10
    scalable.put(FSTS, IQE)  # still there
    assert scalable.get(FSTS) == IQE
    scalable.put(GCMD, 0)  # this sets the head to 0
    scalable.words(LONG, 5 | 1 << 5 | 7 << 32, STATUS, 0, 0)
    scalable.words(LONG + 0x20, 5, 0, 0, 0)
    scalable.put(FSTS, IQE)
    scalable.put(GCMD, QIE)
    assert scalable.get(FSTS) == 0 and scalable.get(IQH, 8) == 0x40 and scalable.ram[STATUS] == 7


def test_the_queue_shrinks_while_the_head_is_behind_its_new_end(bench: Bench) -> None:
    bench.ram[LONG : LONG + 0x2000] = WAIT * 0x200
    bench.put(IQA, LONG | 1, 8)
    bench.put(GCMD, QIE)
    bench.put(IQT, 0x1800, 8)
    assert bench.get(IQH, 8) == 0x1800
    bench.put(IQA, LONG, 8)
    bench.put(IQT, 0x10, 8)
    assert bench.get(FSTS) == IQE and bench.get(IQER, 8) == 0 and bench.get(IQH, 8) == 0x1800


@pytest.mark.parametrize("head", [1, 0x18, 0x1000, (1 << 64) - 16])
def test_a_migration_state_has_an_impossible_head(bench: Bench, head: int) -> None:
    bench.queue((5, 0))
    bench.unit.regs.IQH = head
    bench.unit.backend.restore(bench.unit.backend.save())
    bench.run_unit()
    assert bench.get(FSTS) == IQE and bench.get(IQH, 8) == head


# ---- turns -------------------------------------------------------------------------------------------


def test_a_turn_is_bounded(bench: Bench) -> None:
    """What is left comes later, in order, without another register write; IQH tells how far the unit is."""
    fill(bench)
    bench.post(IQT, LONG_SIZE - 16, 8)
    heads = [bench.get(IQH, 8)]
    assert heads == [0]  # nothing before the write is answered
    while bench.unit.backend.has_work():
        bench.post(IQT, LONG_SIZE - 16, 8)  # a turn is due anyway
        assert bench.get(IQH, 8) == heads[-1]
        bench.unit.backend.run_due(0)
        heads.append(bench.get(IQH, 8))
        assert bench.ram[STATUS] == (heads[-1] == LONG_SIZE - 16)
    assert heads[-1] == LONG_SIZE - 16 and bench.get(FSTS) == 0
    assert all(0 <= after - before <= 16 * TURN for before, after in itertools.pairwise(heads))
    bench.ram[LONG + LONG_SIZE - 16 : LONG + LONG_SIZE] = WRITES_STATUS
    bench.ram[STATUS] = 0
    bench.put(IQT, 0, 8)  # a tail works as before
    assert bench.get(IQH, 8) == 0 and bench.ram[STATUS] == 1


def test_an_error_in_a_later_turn(bench: Bench) -> None:
    """The queue continues there, in turns, when software has cleared IQE."""
    fill(bench)
    wrong = 16 * (2 * TURN + 3)
    bench.words(LONG + wrong, 0, 0)
    bench.put(IQT, LONG_SIZE - 16, 8)
    assert bench.get(FSTS) == IQE and bench.get(IQER, 8) == 3 and bench.get(IQH, 8) == wrong
    bench.words(LONG + wrong, 5, 0)
    bench.post(FSTS, IQE)
    assert bench.get(IQH, 8) == wrong
    bench.run_unit()
    assert bench.get(FSTS) == 0 and bench.get(IQH, 8) == LONG_SIZE - 16 and bench.ram[STATUS] == 1


@pytest.mark.parametrize("how", ["reset", "disable"])
def test_what_was_left_is_dropped(bench: Bench, how: str) -> None:
    """11.4.9.1: the head is 0 whenever the queue is off; a guest that wants all of it waits for the head first."""
    fill(bench)
    bench.post(IQT, LONG_SIZE - 16, 8)
    bench.unit.backend.run_due(0)
    assert 0 < bench.get(IQH, 8) <= 16 * TURN
    if how == "reset":
        bench.unit.reset(ResetKind.DEVICE)
    else:
        bench.post(GCMD, 0)
    bench.run_unit()
    assert bench.get(IQH, 8) == 0 and bench.get(GSTS) & QIE == 0 and bench.ram[STATUS] == 0
    bench.queue((5 | 1 << 5 | 2 << 32, STATUS))  # a new queue works
    assert bench.get(IQH, 8) == 0x10 and bench.ram[STATUS] == 2


def test_another_queue_while_a_turn_is_due(bench: Bench) -> None:
    fill(bench)
    bench.post(IQT, LONG_SIZE - 16, 8)
    bench.post(GCMD, 0)
    bench.post(IQT, 0x10, 8)
    bench.post(GCMD, QIE)
    bench.run_unit()
    assert bench.get(IQH, 8) == 0x10 and bench.ram[STATUS] == 0


def test_a_migration_between_two_turns(bench: Bench) -> None:
    fill(bench)
    bench.post(IQT, LONG_SIZE - 16, 8)
    bench.unit.backend.run_due(0)
    other = Bench()
    other.ram[:] = bench.ram[:]
    other.unit.backend.restore(bench.unit.backend.save())
    assert other.get(IQH, 8) == bench.get(IQH, 8) < LONG_SIZE - 16
    other.run_unit()
    assert other.get(IQH, 8) == LONG_SIZE - 16 and other.ram[STATUS] == 1
    other.close()


# ---- served ------------------------------------------------------------------------------------------


def test_a_guest_that_always_has_more(tmp_path: Path) -> None:
    """The unit serves its client between turns, and a stop does not wait for the rest."""
    bench = Bench()  # lays the queue out
    fill(bench)
    machine = parse(bench.text, Path("m.toml"))
    server = machine.serve(tmp_path)
    with server, Client.connect(tmp_path / "vtd0.sock") as client:
        client.negotiate()
        fd = os.memfd_create("ram")
        os.ftruncate(fd, RAM)
        client.map_dma(0, RAM, fd=fd)
        ram = mmap.mmap(fd, RAM)
        ram[:] = bench.ram[:]
        client.region_write(Region.CONFIG, 0x10, VtdDevice.base.to_bytes(4, "little"))
        client.region_write(Region.CONFIG, 4, b"\x02\0")
        client.region_write(0, IQA, (LONG | 7).to_bytes(8, "little"))
        client.region_write(0, GCMD, QIE.to_bytes(4, "little"))
        client.region_write(0, IQT, (LONG_SIZE - 16).to_bytes(8, "little"))
        until(lambda: ram[STATUS] == 1, "the status of the last descriptor")
        for n in range(400):  # each makes nearly a whole queue pending
            tail = (n + 1) % 2 * 16
            client.region_write(0, IQT, tail.to_bytes(8, "little"), posted=True)
        assert client.region_read(0, FSTS, 4) == bytes(4)
    assert not machine.abandoned
    assert machine.devices["vtd0"].errors == 0
    machine.close()
    bench.close()
    ram.close()
    os.close(fd)
