"""What each action does to DMA, seen by the guest's side and by the device."""

from __future__ import annotations

import functools
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.inject.lab import COPY, DONE, LAST, SOURCE, TARGET, Bench, Lab, armed, bench, elapse, eventually, fired
from tests.waiting import until
from vmodel import _shim
from vmodel.device.taps import tap
from vmodel.dma import Dma
from vmodel.errors import DmaFault, Reason
from vmodel.inject import Engine, FaultPlan, parse_rule
from vmodel.patience import patience
from vmodel.pci.extcaps import Uncorrectable
from vmodel.points import DmaEvent, Event, Point, Proceed
from vmodel.server import Server
from vmodel.vfio_user.client import Client
from vmodel.vfio_user.wire import Command

DATA = bytes(range(1, 17))


def write(action: str) -> str:
    """A rule about the device's copy, not about its completion."""
    return f"dma.write iova=0x2000-0x2fff do={action}"


def test_rules_that_do_not_fire_change_nothing(lab: Bench) -> None:
    with armed(lab, "dma.read nth=99 do=drop", "dma.write nth=99 do=drop", "mmio.read nth=99 do=drop"):
        lab.copy(DATA)
        assert lab.target(16) == DATA and lab.done and lab.raised()
        lab.lab.dma.scatter([(0x4000, 3), (0x5000, 5)], b"abcdefgh")
        assert lab.lab.dma.gather([(0x4000, 3), (0x5000, 5)]) == b"abcdefgh"
        assert lab.lab.dma.fetch_add(0x6000, 4, 3) == 0 and lab.lab.dma.fetch_add(0x6000, 4, 1) == 3
        with lab.lab.dma.view(0x4000, 3, writable=True) as view:
            view[0] = ord("X")
        assert lab.target(3, 0x4000) == b"Xbc"
        into = bytearray(3)
        lab.lab.dma.readinto(0x4000, into)
        assert into == b"Xbc"


def test_abort_of_a_read(lab: Bench) -> None:
    with armed(lab, "dma.read do=abort") as engine:
        lab.copy(DATA)
        (fault,) = lab.lab.faults
        assert (fault.reason, fault.iova, fault.done) == (Reason.UNSUPPORTED_REQUEST, SOURCE, 0)
        assert not lab.done
        (record,) = fired(engine)
        assert (record["result"], record["address"], record["size"]) == ("UNSUPPORTED_REQUEST", "0x1000", 16)


def test_abort_of_a_write_half_way(lab: Bench) -> None:
    with armed(lab, write("abort(completer, done=5)")):
        lab.copy(DATA)
    (fault,) = lab.lab.faults
    assert (fault.reason, fault.iova, fault.done) == (Reason.COMPLETER_ABORT, TARGET + 5, 5)
    assert lab.target(16) == DATA[:5] + bytes(11) and not lab.done


@pytest.mark.parametrize(("kind", "reason"), [("translation", Reason.NOT_MAPPED), ("permission", Reason.PERMISSION)])
def test_fault(lab: Bench, kind: str, reason: Reason) -> None:
    with armed(lab, f"dma.write do=fault({kind})"):
        lab.copy(DATA)
    assert [fault.reason for fault in lab.lab.faults] == [reason]
    assert lab.target(16) == bytes(16)


def test_flip(lab: Bench) -> None:
    with armed(lab, "dma.read do=flip(3)") as engine:
        lab.copy(DATA)
        changed = int.from_bytes(lab.target(16), "little") ^ int.from_bytes(DATA, "little")
        assert changed.bit_count() == 3
        assert lab.target(16, SOURCE) == DATA
        (record,) = fired(engine)
        assert (record["before"], record["after"]) == (DATA.hex(), lab.target(16).hex())


def test_corrupt(lab: Bench) -> None:
    with armed(lab, write("corrupt(0xc0ffee)")):
        lab.copy(DATA)
    assert lab.target(16) == (b"\xc0\xff\xee" * 6)[:16] and lab.done


def test_stale_read(lab: Bench) -> None:
    with armed(lab, "dma.read nth=2 do=stale"):
        lab.copy(b"old!")
        lab.copy(b"new!")
        assert lab.target(4) == b"old!"
        lab.copy(b"3rd!")
        assert lab.target(4) == b"3rd!"


def test_stale_write(lab: Bench) -> None:
    with armed(lab, "dma.write iova=0x2000-0x2fff nth=2 do=stale"):
        lab.copy(b"old!")
        lab.copy(b"new!")
    assert lab.target(4) == b"old!" and lab.get(LAST) == int.from_bytes(b"new!", "little")


def test_partial(lab: Bench) -> None:
    lab.ram.view[TARGET : TARGET + 16] = b"." * 16
    with armed(lab, write("partial(6)")):
        lab.copy(DATA)
    assert lab.target(16) == DATA[:6] + b"." * 10 and lab.done
    with armed(lab, "dma.read do=partial(6)"):
        lab.copy(DATA)
    assert lab.target(16) == DATA[:6] + bytes(10)


def test_torn_write(lab: Bench) -> None:
    with armed(lab, write("torn(4, ms=10min)")):
        lab.copy(DATA)
        assert lab.done and lab.target(16) == DATA[:4] + bytes(12)
        lab.elapse(600)
        assert lab.target(16) == DATA


def test_torn_read(lab: Bench) -> None:
    """What is changed between the two halves of a read is seen by one of them only."""

    def change() -> None:
        lab.ram.view[SOURCE : SOURCE + 16] = b"b" * 16

    lab.clock.while_asleep = change
    with armed(lab, "dma.read do=torn(4, ms=1000)"):
        lab.copy(b"a" * 16)
    assert lab.clock.slept == [1.0]
    assert lab.done and lab.target(16) == b"aaaa" + b"b" * 12


def test_drop(lab: Bench) -> None:
    with armed(lab, write("drop")):
        lab.copy(DATA)
        assert lab.target(16) == bytes(16) and lab.done
    with armed(lab, "dma.read do=drop"):
        lab.copy(DATA)
    assert [fault.reason for fault in lab.lab.faults] == [Reason.COMPLETION_TIMEOUT]


def test_duplicate_comes_back_after_the_driver_has_used_its_buffer_again(lab: Bench) -> None:
    with armed(lab, write("duplicate(ms=10min)")):
        lab.copy(DATA)
        assert lab.target(16) == DATA
        lab.ram.view[TARGET : TARGET + 16] = b"." * 16
        lab.elapse(600)
        assert lab.target(16) == DATA


def test_duplicate_at_once(lab: Bench) -> None:
    before = lab.lab.dma.stats
    with armed(lab, write("duplicate"), "dma.read do=duplicate"):
        lab.copy(DATA)
    after = lab.lab.dma.stats
    assert (after.read_ops - before.read_ops, after.write_ops - before.write_ops) == (2, 3)


def test_delay(lab: Bench) -> None:
    seen: list[tuple[bytes, bool]] = []
    lab.clock.while_asleep = lambda: seen.append((lab.target(16), lab.done))
    with armed(lab, write("delay(100)")):
        lab.copy(DATA)
        assert lab.clock.slept == [0.1] and seen == [(bytes(16), False)]
        assert lab.target(16) == DATA and lab.done


def test_late(lab: Bench) -> None:
    with armed(lab, write("late(10min)")) as engine:
        lab.copy(DATA)
        lab.elapse(599)
        assert lab.done and lab.target(16) == bytes(16)
        lab.elapse(600)
        assert lab.target(16) == DATA
        first, second = fired(engine)
        assert (first["result"], second["result"], second["late"]) == ("later", "ok", True)


def test_data_after_completion(tmp_path: Path) -> None:
    """The write is overtaken by the next one, which is the completion: memory without a file shows the order."""
    with bench(tmp_path, by_fd=False) as lab, armed(lab, write("reorder")):
        lab.ram.view[SOURCE : SOURCE + 16] = DATA
        lab.put(COPY, 16, posted=True)
        assert eventually(lambda: lab.client.info() and lab.target(16) == DATA)
        writes = [address for command, address, _ in lab.client.dma_log if command is Command.DMA_WRITE]
        assert writes == [DONE, TARGET]


def test_interrupt_before_completion(lab: Bench) -> None:
    with armed(lab, "dma.write iova=0x3000 do=reorder(after=irq)", "irq nth=1 do=delay(1)"):
        lab.copy(DATA)
        assert lab.raised() and lab.done
    lab.ram.view[DONE : DONE + 4] = bytes(4)
    with armed(lab, "dma.write iova=0x3000 do=reorder(after=irq)", "irq do=drop"):
        # The interrupt is what it waits for, lost or not.
        lab.copy(DATA)
        assert not lab.raised() and lab.done
    lab.ram.view[DONE : DONE + 4] = bytes(4)
    with armed(lab, "dma.write iova=0x3000 do=reorder(after=reset)"):
        lab.copy(DATA)
        assert lab.raised() and not lab.done


def test_overrun(lab: Bench) -> None:
    lab.ram.view[TARGET - 8 : TARGET + 32] = b"." * 40
    with armed(lab, write("overrun(3)")):
        lab.copy(DATA)
    assert lab.target(32) == DATA + b"\xee" * 3 + b"." * 13
    with armed(lab, write("overrun(-2, pattern=ab)")):
        lab.copy(DATA)
    assert lab.target(10, TARGET - 8) == b"......\xab\xab" + DATA[:2]


def test_toctou(lab: Bench) -> None:
    with armed(lab, write("toctou(after=mmio.read, bits=1)")):
        lab.copy(DATA)
        assert lab.target(16) == DATA  # the driver's first look
        lab.get(0)
        lab.settle()
        second = lab.target(16)
        assert (int.from_bytes(second, "little") ^ int.from_bytes(DATA, "little")).bit_count() == 1


def test_toctou_by_time(lab: Bench) -> None:
    with armed(lab, write("toctou(ms=10min)")):
        lab.copy(DATA)
        assert lab.target(16) == DATA
        lab.elapse(600)
        assert lab.target(16) != DATA


def test_use_after_unmap(lab: Bench) -> None:
    """Memory that the client has taken away is touched again; here the window has gone."""
    with armed(lab, write("use-after-unmap(ms=10min)")) as engine:
        lab.copy(DATA)
        lab.client.unmap_dma(0, 0x10000)
        lab.elapse(600)
        assert len(fired(engine)) == 2
        assert fired(engine)[1]["result"] == "NO_WINDOW"


def test_delayed_events_are_carried_out_after_disarming(lab: Bench) -> None:
    for action in ("late(10min)", "duplicate(10min)"):
        with armed(lab, write(action)):
            lab.copy(DATA)
        lab.ram.view[TARGET : TARGET + 16] = bytes(16)
        lab.elapse(600)
        assert lab.target(16) == DATA, action
    assert lab.lab.errors == 0


def test_poison(lab: Bench) -> None:
    with armed(lab, "dma.read do=poison"):
        lab.copy(DATA)
    assert [fault.reason for fault in lab.lab.faults] == [Reason.POISONED]
    assert Uncorrectable.POISONED_TLP.mask == lab.lab.aer.regs.UNCORRECTABLE


def test_aer(lab: Bench) -> None:
    with armed(lab, "dma.read do=aer(bad-tlp)", "dma.write once do=aer(malformed)"):
        lab.copy(DATA)
    assert lab.target(16) == DATA
    assert (lab.lab.aer.regs.CORRECTABLE, lab.lab.aer.regs.UNCORRECTABLE) == (1 << 6, 1 << 18)


def test_what_is_armed_reaches_pasids_and_is_gone_afterwards(lab: Bench) -> None:
    with armed(lab, "dma.write pasid=5 do=drop") as engine:
        with_pasid = lab.lab.dma.with_pasid(5)
        with_pasid.write(TARGET, b"x")  # nobody translates this PASID: it would be a fault
        lab.lab.dma.write(TARGET, b"y")
        assert lab.target(1) == b"y" and len(fired(engine)) == 1
    with pytest.raises(Exception, match="PASID"):
        with_pasid.write(TARGET, b"x")


def test_faults_in_the_middle_of_several_pieces(lab: Bench) -> None:
    pieces = [(0x4000, 4), (0x5000, 4), (0x6000, 4)]
    with armed(lab, "dma.write iova=0x5000 do=abort(done=1)", "dma.read iova=0x6000 do=abort"):
        with pytest.raises(DmaFault) as caught:
            lab.lab.dma.scatter(pieces, bytearray(b"abcdefghijkl"))
        assert (caught.value.iova, caught.value.done) == (0x5001, 5)
        buffer = bytearray(12)
        with pytest.raises(DmaFault) as caught:
            lab.lab.dma.gather_into(pieces, buffer)
        assert caught.value.done == 8 and buffer == b"abcde\0\0\0" + bytes(4)
        with pytest.raises(ValueError, match="differ in size"):
            lab.lab.dma.gather_into(pieces, bytearray(5))
        buffer.append(1)  # nobody has it any more
        del caught
    gc.collect()


def test_two_rules_at_one_event(lab: Bench) -> None:
    """The first is outermost: it changes what the second gets, and what it drops the second never sees."""
    with armed(lab, write("partial(8)"), write("corrupt(aa)")) as engine:
        lab.copy(DATA)
        assert lab.target(16) == b"\xaa" * 8 + bytes(8)
        assert [record["rule"] for record in fired(engine)] == ["rule2", "rule1"]
    with armed(lab, write("drop"), write("corrupt(bb)")) as engine:
        lab.copy(DATA)
        assert lab.target(16) == b"\xaa" * 8 + bytes(8)
        assert [record["rule"] for record in fired(engine)] == ["rule1"]


def test_a_device_by_itself() -> None:
    """Without a server: what is late waits for the device's own clock."""
    lab = Lab()
    with Engine(FaultPlan(rule=(parse_rule("reset do=late(10min)"),)), [lab]):
        lab.resets.clear()
        lab.backend.reset_device()
        elapse(lab, 599)
        assert lab.resets == []
        elapse(lab, 600)
        assert len(lab.resets) == 1
    lab.close()


def test_by_default_a_delay_takes_real_time() -> None:
    lab = Lab()
    with Engine(FaultPlan(rule=(parse_rule("reset do=delay(20)"),)), [lab]):
        began = time.monotonic()
        lab.backend.reset_device()
        assert time.monotonic() - began >= 0.02
    lab.close()


@pytest.mark.parametrize(
    ("action", "what"),
    [
        ("delay(4000)", "a stop of the server"),
        ("torn(size=2, ms=60000)", "a stop of the server"),
        ("torn(size=2, ms=60000)", "the engine's end"),
    ],
)
def test_what_ends_a_wait(tmp_path: Path, action: str, what: str) -> None:
    """The device's thread goes on, long before the wait's own end."""
    lab = Lab()
    server = Server()
    server.add(lab, tmp_path / "lab.sock")
    with Engine(FaultPlan(rule=(parse_rule(f"dma.read do={action}"),)), [lab]) as engine:
        with server, Client.connect(tmp_path / "lab.sock") as client:
            client.negotiate()
            made = Bench(lab, client)
            made.enable()
            made.put(COPY, 8, posted=True)
            until(lambda: engine.describe()[0]["fired"], "the rule to fire")
            if what == "the engine's end":
                engine.close()
                client.region_read(0, 0, 4)
            for event in made.events:
                event.close()
        assert not lab.backend.abandoned
    # Served again, a device waits again.
    began = time.monotonic()
    with Server() as again, Engine(FaultPlan(rule=(parse_rule("reset do=delay(20)"),)), [lab]):
        again.add(lab, tmp_path / "lab.sock")
        again.start()
        done = threading.Event()
        lab.backend.defer(lambda: (lab.backend.reset_device(), done.set()), None)
        assert done.wait(patience(10))
        assert time.monotonic() - began >= 0.02
    lab.close()


def every_access(dma: Dma) -> dict[str, Any]:
    """What each kind of access gives, at TARGET and behind; what it reads was written by the one before."""
    found: dict[str, Any] = {}
    dma.write(TARGET, b"abcdefgh")
    found["read"] = dma.read(TARGET, 8)
    buffer = bytearray(4)
    dma.readinto(TARGET, buffer)
    found["readinto"] = bytes(buffer)
    dma.scatter([(TARGET, 2), (TARGET + 4, 2)], b"wxyz")
    found["gather"] = dma.gather([(TARGET + 4, 2), (TARGET, 2)])
    with dma.view(TARGET, 4, writable=True) as view:
        view[0:1] = b"!"
    found["view"] = dma.read(TARGET, 4)
    dma.write(TARGET, bytes(8))
    found["atomics"] = [dma.fetch_add(TARGET, 4, 5), dma.swap(TARGET, 4, 9), dma.compare_swap(TARGET, 4, 9, 7)]
    found["empty"] = dma.read(TARGET, 0)
    found["end"] = dma.read(TARGET, 4)
    return found


def noting(seen: list[Event], event: Event, proceed: Proceed) -> bytes:
    """A sink."""
    seen.append(event)
    return proceed(event)


def test_each_kind_of_access_passes_the_tap_and_is_carried_out(lab: Bench) -> None:
    """Before, while and after it is tapped, by a Dma that a model has kept, with a PASID or without one."""
    device = lab.lab
    for kept in (device.dma, device.dma.with_pasid(5)):
        if kept.pasid is not None:
            device.dma.requester.attach(_shim.Domain.plain(_shim.DOMAIN_IDENTITY), kept.pasid)
        plain = every_access(kept)
        assert plain["end"] == b"\7\0\0\0"
        seen: list[Event] = []
        tap(device.backend, {Point.DMA_READ, Point.DMA_WRITE}, functools.partial(noting, seen))
        assert every_access(kept) == plain
        expected = [Point.DMA_WRITE if letter == "W" else Point.DMA_READ for letter in "WRRWWRRRWRWRRRR"]
        assert [(event.point, event.pasid) for event in seen if isinstance(event, DmaEvent)] == [
            (point, kept.pasid) for point in expected
        ]
        tap(device.backend, (), None)
        assert every_access(kept) == plain and len(seen) == len(expected)


def test_a_delayed_access_is_carried_out_after_disarming(lab: Bench) -> None:
    """It takes effect through the untapped path: the sink that delayed it is gone, or another one is there."""
    device = lab.lab
    for armed_again in (False, True):
        late: list[Callable[[], object]] = []

        def sink(event: Event, proceed: Proceed, late: list[Callable[[], object]] = late) -> bytes:
            late.append(lambda: proceed(event))
            return bytes(4) if event.point.is_read else b""

        device.dma.write(TARGET, bytes(4))
        tap(device.backend, {Point.DMA_READ, Point.DMA_WRITE}, sink)
        device.dma.write(TARGET, b"late")
        device.dma.fetch_add(TARGET, 4, 1)
        assert device.dma.read(TARGET, 4) == bytes(4) and lab.target(4) == bytes(4)
        tap(device.backend, (), None)
        seen: list[Event] = []
        if armed_again:
            tap(device.backend, {Point.DMA_WRITE}, functools.partial(noting, seen))
        assert len(late) == 3
        late[0]()
        assert lab.target(4) == b"late"
        late[1]()
        assert lab.target(4) == b"mate"
        assert late[2]() == b"mate" and seen == []
        tap(device.backend, (), None)
