"""A served machine's events as records: which are recorded, how they read, and that nothing stays armed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import meanwhile, until
from vmodel import trace as traces
from vmodel.device import MmioBar, Msix, PciDevice, on_write
from vmodel.devices.edu import Edu, EduRegs
from vmodel.errors import ConfigError, DmaFault
from vmodel.inject import Engine, FaultPlan, Rule, parse_rule
from vmodel.regs import RO, W1C, Bit, Bits, Layout, Reg16, Reg32, RegisterBank, Values
from vmodel.testing.fakes import FakeDriver, FakeMemory
from vmodel.trace import KEPT, Trace, Wanted, what


class Power(Values):
    IDLE = 0
    RUN = 2


class Control(Layout):
    EN = Bit(0)
    MODE = Bits(4, 6)
    ENGINE = Bits(16, 17, values=Power)
    HIGH = Bits(8, 15)


class CardRegs(RegisterBank, size=0x20):
    CC = Reg32(0x00, layout=Control)
    LOW = Reg16(0x04)
    NEXT_ONE = Reg16(0x06, RO, reset=0x1234)
    EVENTS = Reg32(0x08, layout=type("Events", (Layout,), {"DONE": Bit(0, W1C)}))
    GO = Reg32(0x0C)
    WHOLE = Reg32(0x10, sizes=(4,))


class Card(PciDevice):
    vendor_id, device_id, class_code = 0x1234, 0x0001, 0xFF0000
    bar0 = MmioBar(0, size=4096)
    regs = bar0.bank(CardRegs)
    msix = Msix(vectors=2)

    @on_write(CardRegs.GO)
    def _go(self, new: int) -> None:
        self.dma.write(new, b"\x01\x02\x03\x04")
        self.msix.fire(1)


@pytest.fixture
def memory() -> Iterator[FakeMemory]:
    with FakeMemory() as made:
        yield made


@pytest.fixture
def card(memory: FakeMemory) -> Iterator[FakeDriver]:
    device = Card("card0")
    with FakeDriver(device, memory) as driver:
        yield driver
    device.close()


@pytest.fixture
def trace(card: FakeDriver) -> Iterator[Trace]:
    with Trace({"card0": card.device}) as made:
        yield made


def lines(trace: Trace, number: int) -> list[str]:
    records = trace.take(number)
    assert records is not None
    return [what(record) for record in records]


def test_registers_and_fields(card: FakeDriver, trace: Trace) -> None:
    """Values are those that the guest wrote or read; a field that is 0 is named where a write clears it."""
    number = trace.follow(Wanted.of([], [], ["mmio"]))
    card.write(CardRegs.CC, 0x531)
    card.read(CardRegs.CC)
    card.write(CardRegs.CC, 0x530)
    card.write((0, 0x04), 0xABCD_BEEF, 4)
    card.read((0, 0x01), 1)
    card.write((0, 0x100), 7, 2)
    card.settle()
    assert lines(trace, number) == [
        "write CC = 0x00000531 (EN=1 MODE=3 HIGH=5)",
        "read CC = 0x00000531 (EN=1 MODE=3 HIGH=5)",
        "write CC = 0x00000530 (EN=0 MODE=3 HIGH=5)",
        "write LOW = 0xbeef, NEXT_ONE = 0xabcd",
        "read CC[15:8] = 0x05 (HIGH=5)",
        "write BAR0+0x100 = 0x0007",
    ]
    assert lines(trace, number) == []


def test_names_of_values(card: FakeDriver, trace: Trace) -> None:
    """A value that has a name is shown by it; records have both."""
    number = trace.follow(Wanted())
    for value in (0x2_0001, 0x1_0000, 0x3_0000):
        card.write(CardRegs.CC, value)
    card.write(CardRegs.CC, 0)
    card.settle()
    records = trace.take(number) or []
    assert [what(record) for record in records] == [
        "write CC = 0x00020001 (EN=1 ENGINE=RUN)",
        "write CC = 0x00010000 (EN=0 ENGINE=1)",
        "write CC = 0x00030000 (ENGINE=3)",
        "write CC = 0x00000000 (ENGINE=IDLE)",
    ]
    assert records[0]["registers"][0]["fields"] == {"EN": 1, "ENGINE": 2}
    assert records[0]["registers"][0]["values"] == {"ENGINE": "RUN"}


def test_a_record_is_plain_data(card: FakeDriver, trace: Trace) -> None:
    number = trace.follow(Wanted())
    card.write(CardRegs.CC, 0x10)
    card.settle()
    (record,) = trace.take(number) or []
    assert record.pop("t") >= 0
    assert record == {
        "point": "mmio.write",
        "device": "card0",
        "region": 0,
        "address": "0x0",
        "size": 4,
        "data": "10000000",
        "registers": [{"name": "CC", "value": "0x00000010", "fields": {"MODE": 1}}],
    }


def test_what_a_write_causes_comes_after_it(card: FakeDriver, trace: Trace, memory: FakeMemory) -> None:
    number = trace.follow(Wanted())
    address = memory.alloc(64)
    card.write(CardRegs.GO, address)
    card.interrupt(1)
    assert lines(trace, number) == [f"write GO = {address:#010x}", f"dma.write {address:#x}+4", "irq msix 1"]
    card.write(CardRegs.GO, 0x8000_0000)
    card.settle()
    assert lines(trace, number) == [
        "write GO = 0x80000000",
        "dma.write 0x80000000+4: NO_WINDOW at 0x80000000, 0 bytes done",
    ]


def test_refused_accesses(card: FakeDriver, trace: Trace) -> None:
    """Accesses that have no effect are recorded, and only while somebody follows do they leave the shim.

    They have none then, either, and no fault rule gets them.
    """
    sizes, off = (
        f"refused, {why}"
        for why in (
            "size or alignment not allowed there",
            "its space is off in the Command register, or the function is in D3hot",
        )
    )

    def access() -> int:
        before = card.device.backend.function.stats()
        card.client.region_write(0, 0x10, b"\x01\0", posted=True)
        assert card.client.region_read(0, 0x11, 1) == b"\xff"
        card.config_write(4, 2, 0)
        card.client.region_write(0, 0, b"\x01\0\0\0")
        assert card.client.region_read(0, 0, 32) == b"\xff" * 32
        card.config_write(4, 2, 6)
        assert (card.device.regs.WHOLE, card.device.regs.CC) == (0, 0)
        after = card.device.backend.function.stats()
        return after.served - before.served

    in_shim = access()
    number = trace.follow(Wanted.of([], [], ["mmio"]))
    injected: list[object] = []
    with Engine(FaultPlan(rule=(parse_rule("mmio.write do=drop"),)), {"card0": card.device}) as engine:
        engine.journal.listeners.append(injected.append)
        assert access() == in_shim - 4
        assert lines(trace, number) == [
            f"write WHOLE[15:0] = 0x0001: {sizes}",
            f"read WHOLE[15:8] = 0xff: {sizes}",
            f"write CC = 0x00000001 (EN=1): {off}",
            f"read BAR0+0x0, 32 bytes: {off}",
        ]
        assert not injected
    trace.leave(number)
    assert access() == in_shim


def test_a_view_that_is_refused(card: FakeDriver, trace: Trace, memory: FakeMemory) -> None:
    """A model that looks at memory without a copy reads it, too."""
    number = trace.follow(Wanted.of([], [], ["dma"]))
    dma, address = card.device.dma, memory.alloc(64)
    with dma.view(address, 4):
        pass
    with pytest.raises(DmaFault), dma.view(0x8000_0000, 4):
        pass
    assert lines(trace, number) == [
        f"dma.read {address:#x}+4",
        "dma.read 0x80000000+4: NO_WINDOW at 0x80000000, 0 bytes done",
    ]


def test_an_interrupt_that_is_held_back_says_so(card: FakeDriver, trace: Trace, memory: FakeMemory) -> None:
    at = next(at for name, at, _ in card.device.config.places if name == "msix") + 2
    card.config_write(at, 2, 0xC000)  # enabled, and the whole function masked
    number = trace.follow(Wanted.of([], [], ["irq"]))
    card.write(CardRegs.GO, memory.alloc(64))
    card.settle()
    assert lines(trace, number) == ["irq msix 1 (not sent)"]


def test_config_space_resets_and_clients(card: FakeDriver, trace: Trace) -> None:
    number = trace.follow(Wanted())
    card.config_read(0, 4)
    card.config_write(4, 2, 0x0006)
    card.client.region_read(7, 0, 64)
    card.reset()
    card.client.close()
    gone: list[str] = []
    until(lambda: gone.extend(lines(trace, number)) or "client gone" in gone, "the client is gone")
    assert gone == [
        "config read VENDOR_ID = 0x1234, DEVICE_ID = 0x0001",
        "config write COMMAND = 0x0006 (IO=0 MEMORY=1 BUS_MASTER=1)",
        "config read 0x0, 64 bytes",
        "reset kind=DEVICE_RESET",
        "client gone",
    ]


def test_unarmed_accesses_stay_in_the_shim(card: FakeDriver, trace: Trace) -> None:
    """Reads that the shim answers are recorded while somebody follows, and exit neither before nor after."""

    def exits() -> int:
        before = card.device.backend.function.stats()
        for _ in range(10):
            card.read(CardRegs.CC)
        after = card.device.backend.function.stats()
        return 10 - (after.served - before.served)

    assert exits() == 0
    number = trace.follow(Wanted())
    assert exits() == 10 and len(lines(trace, number)) == 10
    trace.leave(number)
    assert exits() == 0 and not card.device.points.wanted
    assert trace.take(number) is None


def test_only_registers_of_the_filter(card: FakeDriver, trace: Trace, memory: FakeMemory) -> None:
    """Points that the registers do not need are not even tapped."""
    number = trace.follow(Wanted.of(["card0"], ["CC", "regs.EVENTS"], []))
    assert {point.value for point in card.device.points.wanted} == {"mmio.read", "mmio.write"}
    card.write(CardRegs.GO, memory.alloc(64))
    card.read(CardRegs.CC)
    card.read((0, 0x08), 8)
    card.config_read(0, 4)
    assert lines(trace, number) == ["read CC = 0x00000000", "read EVENTS = 0x00000000, GO = 0x00001000"]
    config = trace.follow(Wanted.of([], ["COMMAND"], []))
    card.config_read(4, 2)
    card.config_read(6, 2)
    assert lines(trace, config) == ["config read COMMAND = 0x0007 (IO=1 MEMORY=1 BUS_MASTER=1)"]


def test_a_flood_is_counted(card: FakeDriver, trace: Trace) -> None:
    number = trace.follow(Wanted())
    for _ in range(KEPT + 123):
        card.write(CardRegs.LOW, 1, posted=True)
    card.settle()
    records = trace.take(number) or []
    assert len(records) == KEPT + 1 and records[-1] == {"more": 123}
    card.write(CardRegs.LOW, 1)
    assert len(trace.take(number) or []) == 1


def test_two_followers(card: FakeDriver, trace: Trace) -> None:
    one, other = trace.follow(Wanted()), trace.follow(Wanted.of([], ["LOW"], []))
    card.read(CardRegs.CC)
    card.read(CardRegs.LOW)
    assert (len(lines(trace, one)), len(lines(trace, other))) == (2, 1)
    trace.leave(one)
    card.read(CardRegs.LOW)
    assert len(lines(trace, other)) == 1
    trace.leave(other)
    trace.leave(other)
    for _ in range(traces.MOST_FOLLOWERS):
        trace.follow(Wanted())
    with pytest.raises(ConfigError, match="16 follow already"):
        trace.follow(Wanted())


def test_a_follower_that_does_not_ask_is_dropped(
    card: FakeDriver, trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process may have been killed: the next event disarms."""
    number = trace.follow(Wanted())
    now = time.monotonic()
    monkeypatch.setattr(traces.time, "monotonic", lambda: now + traces.LEASE + 1)
    card.read(CardRegs.CC)
    assert trace.take(number) is None and not card.device.points.wanted


def test_the_last_records_are_waited_for(card: FakeDriver, trace: Trace, caplog: pytest.LogCaptureFixture) -> None:
    """A server that ends waits for those who still ask, for at most half a second."""
    number = trace.follow(Wanted())
    card.read(CardRegs.CC)
    taken: list[str] = []
    taker = threading.Timer(0.05, lambda: taken.extend(lines(trace, number)))
    taker.start()
    trace.drain()
    taker.join()
    assert taken == ["read CC = 0x00000000"] and not caplog.records
    card.read(CardRegs.CC)
    lines(trace, number)
    card.read(CardRegs.CC)
    trace.drain()
    assert [record.getMessage() for record in caplog.records] == ["1 records were not taken by those who follow"]


@pytest.mark.parametrize(
    ("devices", "registers", "points", "said"),
    [
        (["crad0"], [], [], "no device is called 'crad0': did you mean 'card0'?"),
        (["x"], [], [], "no device is called 'x': known are card0"),
        ([], ["EVNTS"], [], "no register is called 'EVNTS': did you mean 'EVENTS'?"),
        ([], ["_"], [], "no register is called '_': see vmodel regs MODEL"),
        ([], [], ["iqr"], "no point is called 'iqr': did you mean 'irq'?"),
        ([], [], [""], "no point is called ''"),
    ],
)
def test_names_that_are_not_there(
    trace: Trace, devices: list[str], registers: list[str], points: list[str], said: str
) -> None:
    with pytest.raises(ConfigError) as error:
        trace.follow(Wanted.of(devices, registers, points))
    assert str(error.value).startswith(said)


def test_what_a_fault_rule_makes_of_it(card: FakeDriver, trace: Trace, tmp_path: Path) -> None:
    """The log has what the guest gets; the rule stays armed when nobody follows any more."""
    rule = parse_rule("mmio.read register=NEXT_ONE do=value(0x55) every=2")
    with Engine(FaultPlan(rule=(rule,)), {"card0": card.device}) as engine:
        engine.journal.listeners.append(trace.injected)
        number = trace.follow(Wanted())
        assert [card.read(CardRegs.NEXT_ONE) for _ in range(2)] == [0x1234, 0x55]
        first, injection, second = trace.take(number) or []
        assert (what(first), what(second)) == ("read NEXT_ONE = 0x1234", "read NEXT_ONE = 0x0055")
        assert injection["rule"] == "rule1" and injection["n"] == 1
        trace.leave(number)
        assert [card.read(CardRegs.NEXT_ONE) for _ in range(2)] == [0x1234, 0x55]
    assert not card.device.points.wanted


def test_no_event_passes_a_rule_while_followers_come_and_go(card: FakeDriver, trace: Trace) -> None:
    """A plan counts events: a follower must not change its count."""
    rule: Rule = parse_rule("mmio.read register=CC do=value(3)")

    def come_and_go() -> None:
        trace.leave(trace.follow(Wanted.of([], [], ["mmio.write"])))
        trace.leave(trace.follow(Wanted()))

    with Engine(FaultPlan(rule=(rule,)), {"card0": card.device}) as engine, meanwhile(come_and_go):
        assert {card.read(CardRegs.CC) for _ in range(1500)} == {3}
        assert engine.describe()[0]["fired"] == 1500


def test_edu_by_intx_and_msi(memory: FakeMemory) -> None:
    device = Edu("edu0")
    with Trace({"edu0": device}) as trace:
        with FakeDriver(device, memory) as driver:
            number = trace.follow(Wanted.of([], [], ["irq"]))
            driver.write(EduRegs.IRQ_RAISE, 1)
            driver.interrupt()
            assert lines(trace, number) == ["irq msi 0"]
        with FakeDriver(device, memory, enable=False) as driver:
            at = next(at for name, at, _ in device.config.places if name == "msi") + 2
            driver.config_write(at, 2, 0)
            driver.write(EduRegs.IRQ_RAISE, 1)
            driver.settle()
            assert lines(trace, number) == ["irq intx 0 (not sent)"]
    device.close()
