"""The edu device by itself: no socket, no QEMU."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
from pydantic import ValidationError

from vmodel.devices.edu import BUFFER_AT, Edu

ID, LIVENESS, FACTORIAL, STATUS, IRQ_STATUS, RAISE, ACK = 0x00, 0x04, 0x08, 0x20, 0x24, 0x60, 0x64
SRC, DST, COUNT, CMD = 0x80, 0x88, 0x90, 0x98
RAM = 1 << 20


@pytest.fixture
def ram() -> Iterator[int]:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, RAM)
    yield fd
    os.close(fd)


@pytest.fixture
def edu(ram: int) -> Iterator[Edu]:
    edu = Edu("edu0")
    edu.memory.map(0, RAM, fd=ram)
    edu.backend.region_write(7, 4, 2, 6)  # memory space and bus mastering
    yield edu
    edu.close()


def run(edu: Edu) -> None:
    """Lets the device do what it has deferred."""
    edu.backend.run_due(time.monotonic_ns())


@pytest.mark.parametrize(("n", "expected"), [(0, 1), (1, 1), (10, 3628800), (13, 1932053504), (34, 0), (2**32 - 1, 0)])
def test_factorial(edu: Edu, n: int, expected: int) -> None:
    edu.backend.region_write(0, FACTORIAL, 4, n)
    assert edu.regs.STATUS & 1
    edu.backend.region_write(0, FACTORIAL, 4, 5)  # busy: ignored
    run(edu)
    assert (edu.regs.FACTORIAL, edu.regs.STATUS & 1, edu.intx.level) == (expected, 0, False)


def test_interrupts(edu: Edu) -> None:
    edu.backend.region_write(0, STATUS, 4, 0x80)
    edu.backend.region_write(0, FACTORIAL, 4, 3)
    run(edu)
    edu.backend.region_write(0, RAISE, 4, 0x10)
    assert (edu.regs.IRQ_STATUS, edu.intx.level) == (0x11, True)
    edu.backend.region_write(0, ACK, 4, 0x01)
    assert edu.intx.level
    edu.backend.region_write(0, ACK, 4, 0x10)
    assert not edu.intx.level


def transfer(edu: Edu, source: int, target: int, count: int, command: int) -> None:
    for register, value in ((SRC, source), (DST, target), (COUNT, count), (CMD, command)):
        edu.backend.region_write(0, register, 8, value)
    run(edu)


def test_dma_both_ways(edu: Edu, ram: int) -> None:
    os.pwrite(ram, b"to the device", 0x1000)
    transfer(edu, 0x1000, BUFFER_AT + 8, 13, 1)
    assert edu.regs.IRQ_STATUS == 0
    transfer(edu, BUFFER_AT + 8, 0x2000, 13, 1 | 2 | 4)
    assert os.pread(ram, 13, 0x2000) == b"to the device"
    assert edu.regs.IRQ_STATUS == 0x100
    assert edu.regs.DMA_CMD & 1 == 0


def test_addresses_are_cut_to_28_bits(edu: Edu, ram: int) -> None:
    os.pwrite(ram, b"low", 0x3000)
    transfer(edu, (1 << 40) + 0x3000, BUFFER_AT, 3, 1)
    assert edu.buffer[:3] == b"low"


@pytest.mark.parametrize(
    ("target", "count"),
    [(BUFFER_AT, 4097), (BUFFER_AT + 4095, 2), (BUFFER_AT - 1, 1), (0, 1), (2**64 - 1, 1), (BUFFER_AT, 2**64 - 1)],
)
def test_outside_the_buffer_nothing_moves(edu: Edu, target: int, count: int) -> None:
    transfer(edu, 0, target, count, 1 | 4)
    assert edu.errors == 1
    assert (edu.regs.DMA_CMD & 1, edu.regs.IRQ_STATUS) == (0, 0)
    assert edu.dma.stats.read_ops == 0
    transfer(edu, 0, BUFFER_AT, 4096, 1 | 4)  # and it works on
    assert edu.regs.IRQ_STATUS == 0x100


def test_registers_are_locked_while_dma_runs(edu: Edu) -> None:
    for register, value in ((SRC, 0x1000), (DST, BUFFER_AT), (COUNT, 16), (CMD, 1)):
        edu.backend.region_write(0, register, 8, value)
    for register in (SRC, DST, COUNT, CMD):
        edu.backend.region_write(0, register, 8, 0xFFFF)
    assert (edu.regs.DMA_SRC, edu.regs.DMA_DST, edu.regs.DMA_COUNT, edu.regs.DMA_CMD) == (0x1000, BUFFER_AT, 16, 1)
    run(edu)


def test_a_fault_leaves_the_device_usable(edu: Edu) -> None:
    transfer(edu, 0x800_0000, BUFFER_AT, 16, 1 | 4)
    assert (edu.errors, edu.dma.stats.faults, edu.regs.DMA_CMD & 1, edu.regs.IRQ_STATUS) == (1, 1, 0, 0)


def test_parameters() -> None:
    assert Edu("edu", {"dma_mask": 0xFFFF}).params.dma_mask == 0xFFFF
    for wrong in ({"dma_mask": -1}, {"mask": 1}, {"dma_mask": "x"}):
        with pytest.raises(ValidationError):
            Edu("edu", wrong)
