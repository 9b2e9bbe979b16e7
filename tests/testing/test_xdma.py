"""examples/xdma without a guest.  Its driver's own tests drive it in tests/guest/test_xdma.py.

Registers, descriptors and events: PG195, "Register Space" and "Descriptors".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from vmodel.machine.models import load_model
from vmodel.testing.fakes import FakeDriver, FakeMemory

Xdma: Any = load_model("xdma.py:Xdma", Path(__file__).parents[2] / "examples" / "xdma")
RUN, WRITEBACK, ALL = 1 << 0, 1 << 26, 0xFF_FFFE
BUSY, STOPPED, COMPLETED, MAGIC_STOPPED, IDLE_STOPPED = (1 << n for n in (0, 1, 2, 4, 6))
STOP, COMPLETE = 1 << 0, 1 << 1
#: Where no memory is.
NOWHERE = 1 << 40
#: The user interrupts' vectors begin behind those of channels.
USER_VECTOR = 8


class Host:
    """A driver of the card."""

    def __init__(self, card: FakeDriver) -> None:
        self.card = card
        self.device: Any = card.device
        for n in range(8):
            card.write((1, 0x20A0 + n), n, 1)
        for n in range(16):
            card.write((1, 0x2080 + n), USER_VECTOR + n, 1)
        card.write("IRQ.CHANNEL_ENABLE_SET", 0xFF)
        card.write("IRQ.USER_ENABLE_SET", 0xFFFF)

    def descriptors(self, copies: Sequence[tuple[int, int, int]], flags: int = STOP | COMPLETE) -> int:
        """A list of (source, target, length) in adjacent descriptors, the last of which has the flags; its address."""
        at, last = self.card.memory.alloc(32 * len(copies), align=4096), len(copies) - 1
        for n, (source, target, length) in enumerate(copies):
            adjacent = max(last - n - 1, 0)
            control = 0xAD4B_0000 | adjacent << 8 | (flags if n == last else 0)
            following = 0 if n == last else at + 32 * (n + 1)
            self.card.memory.write(at + 32 * n, struct.pack("<IIQQQ", control, length, source, target, following))
        return at

    def start(self, channel: str, first: int, adjacent: int = 0, control: int = RUN | ALL) -> None:
        sgdma = channel.replace("[", "_SGDMA[")
        self.card.write(f"{channel}.INTERRUPT", ALL)
        self.card.write(f"{sgdma}.FIRST_LOW", first & 0xFFFF_FFFF)
        self.card.write(f"{sgdma}.FIRST_HIGH", first >> 32)
        self.card.write(f"{sgdma}.ADJACENT", adjacent)
        self.card.write(f"{channel}.CONTROL", control)

    def finish(self, channel: str) -> int:
        """Waits for the channel, stops it, and takes its status."""
        self.card.wait(lambda: not self.card.read(f"{channel}.STATUS") & BUSY)
        status = self.card.read(f"{channel}.STATUS_TAKE")
        self.card.write(f"{channel}.CONTROL_CLEAR", RUN)
        return status

    def run(self, channel: str, copies: Sequence[tuple[int, int, int]], control: int = RUN | ALL) -> int:
        self.start(channel, self.descriptors(copies), len(copies) - 1, control)
        return self.finish(channel)


@pytest.fixture
def host() -> Iterator[Host]:
    device = Xdma("xdma0", {"channels": 2, "memory": 1 << 20})
    with FakeMemory() as memory, FakeDriver(device, memory) as card:
        yield Host(card)
        assert device.errors == 0
    device.close()


def test_what_a_driver_finds(host: Host) -> None:
    """Identifiers of blocks, by their offsets in BAR1; a channel that is not there has none, and does nothing."""
    found = {at: host.card.read((1, at)) for at in range(0, 0x6000, 0x100)}
    there = {0x0000: 0x1FC00006, 0x0100: 0x1FC00106, 0x1000: 0x1FC10006, 0x1100: 0x1FC10106}
    there |= {0x2000: 0x1FC20006, 0x3000: 0x1FC30006}
    there |= {0x4000: 0x1FC40006, 0x4100: 0x1FC40106, 0x5000: 0x1FC50006, 0x5100: 0x1FC50106}
    assert {at: value for at, value in found.items() if value} == there
    for name in ("CONTROL", "CONTROL_SET"):
        host.card.write(f"H2C[2].{name}", RUN)
    assert host.card.read("H2C[2].CONTROL") == host.card.read("H2C[2].STATUS") == 0


def test_there_and_back(host: Host) -> None:
    """Two pieces to the card by one channel, back in one by another; each interrupts by its own vector."""
    memory, (one, two) = host.card.memory, (bytes(range(256)) * 16, b"tail")
    copies = [(memory.alloc(one), 0x1000, len(one)), (memory.alloc(two), 0x1000 + len(one), len(two))]
    assert host.run("H2C[1]", copies) == STOPPED | COMPLETED
    assert host.card.read("H2C[1].COMPLETED") == 2 and host.card.interrupt(1) == 1
    back = memory.alloc(5000)
    assert host.run("C2H[0]", [(0x1000, back, len(one + two))]) == STOPPED | COMPLETED
    assert host.card.interrupt(2) == 1 and memory.read(back, 4100) == one + two
    assert memory.read(back + 4100, 10) == bytes(10)
    assert host.card.quiet()


def test_a_list_in_blocks(host: Host) -> None:
    """Blocks of adjacent descriptors are linked by the last one of each."""
    memory = host.card.memory
    first, second = (host.descriptors([(memory.alloc(b"%d" % n), n, 1)] * 2) for n in (1, 2))
    words = bytearray(memory.read(first + 32, 32))
    struct.pack_into("<I", words, 0, 0xAD4B_0000 | 1 << 8)  # no flags; one more behind the next
    struct.pack_into("<Q", words, 24, second)
    memory.write(first + 32, bytes(words))
    host.start("H2C[0]", first, 1)
    assert host.finish("H2C[0]") == STOPPED | COMPLETED
    assert host.card.read("H2C[0].COMPLETED") == 4
    assert bytes(host.device.axi[:3]) == b"\x0012"


@pytest.mark.parametrize(
    ("channel", "copy", "status"),
    [
        ("H2C[0]", (NOWHERE, 0, 16), 1 << 9),  # read error: unsupported request
        ("H2C[0]", (0x1000, (1 << 20) - 8, 16), 1 << 14),  # write error: no such address on the card
        ("H2C[0]", (0x1000, (1 << 64) - 8, 16), 1 << 14),
        ("H2C[0]", ((1 << 64) - 8, 0, 16), 1 << 9),
        ("C2H[0]", (1 << 20, 0x1000, 1), 1 << 9),  # read error: no such address on the card
    ],
)
def test_errors(host: Host, channel: str, copy: tuple[int, int, int], status: int) -> None:
    """The channel stops; Status has the event if Control has it recorded, and the next list runs."""
    assert host.run(channel, [(0x1000, 0x1000, 1), copy]) == status
    assert host.card.read(f"{channel}.COMPLETED") == 1
    assert host.card.interrupt(0 if channel == "H2C[0]" else 2) == 1
    assert host.run(channel, [copy], RUN) == 0
    assert host.run(channel, [(0x1000, 0x1000, 1)]) == STOPPED | COMPLETED


def test_descriptors_that_cannot_be_read(host: Host) -> None:
    host.start("C2H[1]", NOWHERE, 63)
    assert host.finish("C2H[1]") == 1 << 19
    host.start("C2H[1]", host.card.memory.alloc(bytes(32)))
    assert host.finish("C2H[1]") == MAGIC_STOPPED
    assert host.card.read("C2H[1].COMPLETED") == 0


def test_a_write_that_is_lost(host: Host) -> None:
    """Writes are posted (PCIe 5.0, 2.4): nobody tells the card, which reports success."""
    assert host.run("C2H[0]", [(0, NOWHERE, 16)]) == STOPPED | COMPLETED
    assert host.device.dma.stats.faults == 1


def test_a_list_without_an_end(host: Host) -> None:
    """Other work has its turn; clearing Run ends it."""
    memory = host.card.memory
    at = host.descriptors([(memory.alloc(b"x"), 0, 0)], flags=0)
    memory.write(at + 24, at.to_bytes(8, "little"))
    host.start("H2C[0]", at)
    assert host.run("H2C[1]", [(at, 0, 32)]) == STOPPED | COMPLETED
    host.card.wait(lambda: host.card.read("H2C[0].COMPLETED") > 10_000)
    host.card.write("H2C[0].CONTROL_CLEAR", RUN)
    assert host.card.read("H2C[0].STATUS") == IDLE_STOPPED
    done = host.card.read("H2C[0].COMPLETED")
    host.card.settle()
    assert host.card.read("H2C[0].COMPLETED") == done


def test_writeback(host: Host) -> None:
    """The number of completed descriptors; bit 31: an error."""
    at = host.card.memory.alloc(4)
    host.card.write("H2C[0].WRITEBACK_LOW", at)
    copy = (host.card.memory.alloc(b"data"), 0, 4)
    for copies, expected in (([copy] * 3, 3), ([copy, (NOWHERE, 0, 1)], 1 << 31 | 1)):
        host.run("H2C[0]", copies, RUN | ALL | WRITEBACK)
        assert int.from_bytes(host.card.memory.read(at, 4), "little") == expected


def test_events_are_levels(host: Host) -> None:
    """An event that is masked interrupts when it is unmasked, and is acknowledged by writing ones."""
    host.card.write("IRQ.CHANNEL_ENABLE_CLEAR", 1)
    host.start("H2C[0]", host.descriptors([(0x1000, 0, 1)]))
    host.card.wait(lambda: host.card.read("H2C[0].STATUS") == STOPPED | COMPLETED)
    assert host.card.quiet() and host.card.read("IRQ.CHANNEL_REQUEST") == 0
    assert host.card.read("IRQ.CHANNEL_PENDING") == 1
    host.card.write("IRQ.CHANNEL_ENABLE_SET", 1)
    assert host.card.interrupt(0) == 1
    host.card.write("H2C[0].INTERRUPT_CLEAR", ALL)
    assert host.card.read("IRQ.CHANNEL_PENDING") == 0
    host.card.write("H2C[0].INTERRUPT_SET", COMPLETED)
    assert host.card.interrupt(0) == 1
    host.card.write("H2C[0].STATUS", COMPLETED)
    assert host.card.read("IRQ.CHANNEL_PENDING") == 0 and host.card.read("H2C[0].STATUS") == STOPPED


def test_events_that_nobody_takes(host: Host) -> None:
    """As after a lost interrupt: they end when Run is set again (PG195, Status), so that the next list interrupts."""
    for _ in range(3):
        host.start("H2C[0]", host.descriptors([(0x1000, 0, 1)]))
        assert host.card.interrupt(0) == 1
        host.card.write("H2C[0].CONTROL_CLEAR", RUN)
        assert host.card.read("H2C[0].STATUS") == STOPPED | COMPLETED


def test_lines_of_the_cards_logic(host: Host) -> None:
    """From the card's register, and from outside."""
    host.card.write("LINES", 1 << 3)
    assert host.card.interrupt(USER_VECTOR + 3) == 1
    host.card.call("line", 0, True)
    assert host.card.interrupt(USER_VECTOR) == 1 and host.card.read("IRQ.USER_REQUEST") == 0b1001
    host.card.write("IRQ.USER_ENABLE_CLEAR", 1)
    assert host.card.read("IRQ.USER_REQUEST") == 0b1000 and host.card.read("IRQ.USER_PENDING") == 0b1001
    host.card.write("LINES", 0)
    assert host.card.read("IRQ.USER_PENDING") == 0 and host.card.quiet()


def test_a_reset(host: Host) -> None:
    host.start("H2C[0]", host.descriptors([(0x1000, 0, 1)]))
    host.card.wait(lambda: host.card.read("H2C[0].COMPLETED") == 1)
    host.card.reset()
    host.card.enable()
    host = Host(host.card)
    assert host.card.read("H2C[0].CONTROL") == host.card.read("H2C[0].STATUS") == 0
    assert host.run("H2C[0]", [(0x1000, 0, 1)]) == STOPPED | COMPLETED
