"""The model, without a guest."""

import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from crc import Crc, CrcRegs, Status


@pytest.fixture
def card(fake_driver):
    return fake_driver(Crc("crc0"))


def crc(card, data):
    """Drives the card; returns the CRC, or None if the card reports an error."""
    card.write(CrcRegs.STATUS, Status.DONE.mask | Status.ERROR.mask)
    card.write(CrcRegs.SOURCE, card.memory.alloc(data))
    card.write(CrcRegs.LENGTH, len(data))
    assert card.interrupt() == 1
    assert card.read(CrcRegs.STATUS) & Status.DONE.mask
    return None if card.read(CrcRegs.STATUS) & Status.ERROR.mask else card.read(CrcRegs.RESULT)


@pytest.mark.parametrize("data", [b"a", b"123456789", bytes(range(256)) * 4096])
def test_results(card, data):
    assert crc(card, data) == zlib.crc32(data)
    assert card.quiet()


def test_more_than_the_card_takes(card):
    assert crc(card, bytes((1 << 20) + 1)) is None


def test_memory_that_is_not_there(card):
    card.write("SOURCE", 1 << 40)
    card.write("LENGTH", 16)
    card.interrupt()
    assert card.read("STATUS") == Status.DONE.mask | Status.ERROR.mask


def test_memory_that_cannot_be_read_this_time(card, inject):
    inject("dma.read nth=1 do=abort")
    assert crc(card, b"abc") is None
    assert crc(card, b"abc") == zlib.crc32(b"abc")
    assert [record["rule"] for record in inject.log] == ["rule1"]


def test_a_flipped_bit(card, inject):
    inject("plan.toml")
    assert crc(card, b"abc") not in (None, zlib.crc32(b"abc"))


def test_the_model_alone(fake_memory):
    """Calls a method of the model, without a driver and without a socket."""
    card = Crc("crc0")
    fake_memory.attach(card)
    card.regs.SOURCE = fake_memory.alloc(b"abc")
    card.work(3)
    result = card.regs.RESULT
    assert result == zlib.crc32(b"abc")
    card.close()


def test_the_drivers_header_is_up_to_date():
    project = Path(__file__).parent
    command = [sys.executable, "-m", "vmodel", "regs", "crc.py:Crc", "--format", "c"]
    header = subprocess.run(command, cwd=project, capture_output=True, text=True, check=True).stdout
    written = (project / "driver" / "crc_regs.h").read_text()
    assert header == written, "it is old: vmodel regs crc.py:Crc --format c > driver/crc_regs.h"
