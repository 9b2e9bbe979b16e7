"""The model of the memory card (examples/driver), without a guest; tests/guest/test_memcard.py tests its driver."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.commands import vmodel
from tests.waiting import until
from vmodel.machine.models import load_model
from vmodel.testing.fakes import FakeDriver

FOLDER = Path(__file__).parents[2] / "examples" / "driver"
Memcard: Any = load_model("memcard.py:Memcard", FOLDER)
READ, WRITE, READY = 1, 2, 1


class Driver:
    """Gives the card commands, one after the other."""

    def __init__(self, card: FakeDriver) -> None:
        self.card, self.entries = card, 0
        self.ring = card.memory.alloc(bytes(256))
        self.data = card.memory.alloc(bytes(4096))
        card.write("RING", self.ring)
        card.write("CONTROL", 1)

    def command(self, opcode: int, block: int, address: int | None = None) -> tuple[int, ...]:
        """Its completion: CRC, block, opcode, tag, status."""
        for name, value in (("DATA", address or self.data), ("BLOCK", block), ("TAG", 7), ("DOORBELL", opcode)):
            self.card.write(name, value)
        assert self.card.interrupt() == 1
        at = self.ring + 16 * (self.entries % 16)
        self.entries += 1
        return struct.unpack("<IIBBH", self.card.memory.read(at, 12))


@pytest.fixture
def driver(fake_driver: Callable[..., FakeDriver]) -> Driver:
    return Driver(fake_driver(Memcard("memcard0")))


def test_blocks_keep_their_data(driver: Driver) -> None:
    data = b"x" * 4096
    driver.card.memory.write(driver.data, data)
    crc = zlib.crc32(struct.pack("<I", 5) + data)
    assert driver.command(WRITE, 5) == (crc, 5, WRITE, 7, 1)
    driver.card.memory.write(driver.data, bytes(4096))
    assert driver.command(READ, 5) == (crc, 5, READ, 7, 1)
    assert driver.card.memory.read(driver.data, 4096) == data
    driver.command(READ, 0)
    assert driver.card.memory.read(driver.data, 15) == b"MEMCARD 64 KiB\0"


def test_errors(driver: Driver) -> None:
    assert driver.command(3, 0) == (0, 0, 3, 7, 1 << 1 | 1)
    assert driver.command(READ, 16) == (0, 16, READ, 7, 2 << 1 | 1)
    assert driver.command(READ, 0, 1 << 39) == (0, 0, READ, 7, 3 << 1 | 1)


def test_the_phase_bit_says_what_is_new(driver: Driver) -> None:
    """1 in the first lap, 0 in the second."""
    assert [driver.command(READ, 0)[4] for _ in range(18)] == [1] * 16 + [0] * 2


def test_a_restart_ends_the_command_and_begins_with_the_first_entry(driver: Driver) -> None:
    driver.command(READ, 0)
    driver.card.write("DOORBELL", READ)
    driver.card.write("CONTROL", 2)
    assert driver.card.quiet()
    until(lambda: driver.card.read("STATUS") == 0, "the restart")
    driver.card.write("CONTROL", 1)
    assert driver.card.read("STATUS") == READY
    driver.entries = 0
    driver.card.memory.write(driver.ring, bytes(256))
    assert driver.command(READ, 1)[1:] == (1, READ, 7, 1)


def test_a_command_that_is_too_early_is_none(driver: Driver) -> None:
    driver.card.write("CONTROL", 0)
    driver.card.write("DOORBELL", READ)
    assert driver.card.quiet()


def test_the_drivers_header_is_that_of_the_model() -> None:
    done = vmodel("regs", "memcard.py:Memcard", "--format", "c", cwd=FOLDER)
    assert done.stdout == (FOLDER / "driver" / "memcard_regs.h").read_text()
