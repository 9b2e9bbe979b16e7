"""examples/uart.py: the registers as TI's PC16550D describes them (section 8), and the pty behind them."""

from __future__ import annotations

import logging
import os
import select
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import needs
from tests.waiting import until
from vmodel import machine as machines
from vmodel.testing.fakes import FakeDriver

EXAMPLE = Path(__file__).parents[2] / "examples" / "uart.toml"
DATA, ENABLE, ID, LINE_CONTROL, MODEM_CONTROL, LINE_STATUS, MODEM_STATUS = range(7)


class Card:
    """The card as its driver sees it, and the other end of its line."""

    def __init__(self, driver: FakeDriver) -> None:
        self.driver = driver
        self.far = os.open(driver.call("line"), os.O_RDWR | os.O_NOCTTY)

    def __getitem__(self, port: int) -> int:
        return self.driver.read((0, port), 1)

    def __setitem__(self, port: int, value: int) -> None:
        self.driver.write((0, port), value, 1)

    def receive(self, count: int) -> bytes:
        found = bytearray()
        while len(found) < count:
            until(lambda: self[LINE_STATUS] & 1, "data")
            found.append(self[DATA])
        return bytes(found)

    def arrived(self, count: int) -> bytes:
        found = b""
        while len(found) < count:
            assert select.select([self.far], [], [], 10)[0]
            found += os.read(self.far, count - len(found))
        return found


@pytest.fixture
def card(fake_driver: Callable[..., FakeDriver]) -> Iterator[Card]:
    needs.pty()
    made = machines.load(EXAMPLE)
    card = Card(fake_driver(made.devices["uart0"]))
    yield card
    os.close(card.far)


def test_bytes_go_both_ways(card: Card) -> None:
    """More than the FIFO holds waits in the pty, and nothing is lost or out of order."""
    text = bytes(range(256)) * 3
    os.write(card.far, text)
    assert card.receive(len(text)) == text
    assert card[LINE_STATUS] == 0x60
    assert card.driver.call("feed", "typed") == 5
    assert card.receive(5) == b"typed"
    for byte in text:
        card[DATA] = byte
    assert card.arrived(len(text)) == text


def test_interrupts(card: Card) -> None:
    """Table IV: received data comes before the empty transmitter; reading ID clears the latter only if it is named."""
    assert card[ID] == 0x01
    card[ENABLE] = 0xF2  # 8.7: the upper four bits are always 0
    assert (card[ENABLE], card[ID]) == (0x02, 0x02), "the transmitter is empty when its interrupt is enabled"
    assert card[ID] == 0x01
    card[ENABLE] = 0x03
    card[DATA] = ord("x")
    card.driver.call("feed", "y")
    until(lambda: card[LINE_STATUS] & 1, "data")
    assert (card[ID], card[ID]) == (0x04, 0x04)
    assert card[DATA] == ord("y")
    assert card.driver.device.irq.level
    assert (card[ID], card[ID]) == (0x02, 0x01)
    assert not card.driver.device.irq.level


def test_fifos_divisor_and_loop(card: Card) -> None:
    """8.5: bit 0 enables both FIFOs, and ID then has bits 6 and 7; 8.1 DLAB; 8.8: the loop that drivers test with."""
    card[ID] = 0x01
    assert card[ID] == 0xC1
    card[LINE_CONTROL] = 0x83
    card[DATA], card[ENABLE] = 0x0C, 0x01
    assert (card[DATA], card[ENABLE]) == (0x0C, 0x01)
    card[LINE_CONTROL] = 0x03
    assert card[ENABLE] == 0
    card[MODEM_CONTROL] = 0x1A
    assert card[MODEM_STATUS] & 0xF0 == 0x90
    card[DATA] = 0x55
    assert (card[LINE_STATUS], card[DATA]) == (0x61, 0x55)
    card[DATA] = 0x66
    card[ID] = 0x03  # bit 1 clears the receiver's FIFO
    assert card[LINE_STATUS] == 0x60
    card[MODEM_CONTROL] = 0x0B
    assert card[MODEM_STATUS] & 0xF0 == 0xB0


def test_what_nobody_reads_is_reported(card: Card, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(BlockingIOError):
        while True:
            os.write(card.driver.device._ours, bytes(4096))

    def lost() -> bool:
        card[DATA] = 1  # the host's kernel may make room for one once more
        return "uart0: a byte is lost: nobody reads /dev/" in caplog.text

    with caplog.at_level(logging.WARNING):
        until(lost, "the message")
    assert card.driver.device.errors == 0


def test_a_reset_while_the_fifo_is_full(card: Card) -> None:
    """The line goes on: what waits in the pty arrives after the reset."""
    os.write(card.far, bytes(40))
    until(lambda: card.driver.device._watch is None, "a full FIFO")
    card.driver.reset()
    card.driver.enable()
    os.write(card.far, b"end")
    assert card.receive(40 - 16 + 3) == bytes(24) + b"end"
