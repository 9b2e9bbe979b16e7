"""The driver without a kernel, on vmodel's own models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vmodel.devices.edu import Edu, EduRegs
from vmodel.devices.idio16 import Idio16
from vmodel.testing.fakes import FakeDriver, FakeMemory


@pytest.fixture
def memory() -> Iterator[FakeMemory]:
    with FakeMemory(1 << 20) as made:
        yield made


@pytest.fixture
def driver(memory: FakeMemory) -> Iterator[FakeDriver]:
    device = Edu("edu0")
    with FakeDriver(device, memory) as made:
        yield made
    device.close()


def test_registers_by_each_name(driver: FakeDriver) -> None:
    driver.write(EduRegs.LIVENESS, 0x1234)
    assert driver.read("LIVENESS") == driver.read("regs.LIVENESS") == driver.read((0, 4)) == 0xFFFF_EDCB
    assert driver.read(EduRegs.ID) == 0x0100_00ED
    assert driver.config_read(0, 2) == 0x1234


def test_dma_and_an_interrupt(driver: FakeDriver) -> None:
    source, target = driver.memory.alloc(b"from the driver"), driver.memory.alloc(15)
    assert 0 < source < target and not target % 4096
    for start, end, command in ((source, 0x40000, 0b101), (0x40000, target, 0b111)):
        driver.write("DMA_SRC", start)
        driver.write("DMA_DST", end)
        driver.write("DMA_COUNT", 15)
        driver.write("DMA_CMD", command)
        assert driver.interrupt() == 1
        driver.write("IRQ_ACK", 0x100)
    assert driver.memory.read(target, 15) == b"from the driver"
    assert driver.quiet()


def test_an_interrupt_that_is_left(driver: FakeDriver) -> None:
    driver.write("IRQ_RAISE", 1, posted=True)
    assert not driver.quiet() and not driver.quiet([0])


def test_intx(memory: FakeMemory) -> None:
    """A card with nothing but a pin, in I/O space."""
    card = Idio16("card")
    with FakeDriver(card, memory) as driver:
        driver.write("OUT_LOW", 0x5A)
        assert card.outputs == 0x5A and len(driver.interrupts) == 1
        driver.read("IRQ_CTL")
        card.set_inputs(1)
        assert driver.interrupt() == 1
    card.close()


def test_not_enabled(memory: FakeMemory) -> None:
    device = Edu("edu0")
    with FakeDriver(device, memory, enable=False) as driver:
        assert driver.config_read(4, 2) == 0 and driver.interrupts == []
        driver.enable()
        assert driver.config_read(4, 2) == 7
        driver.reset()
        assert driver.config_read(4, 2) == 0
    device.close()


def test_mistakes(driver: FakeDriver) -> None:
    with pytest.raises(LookupError, match="edu0 has no register STATE"):
        driver.read("STATE")
    with pytest.raises(TimeoutError):
        driver.interrupt(timeout=0.01)
    with pytest.raises(TimeoutError):
        driver.wait(lambda: False, 0.01)
    with pytest.raises(ValueError, match="outside the memory"):
        driver.memory.read((1 << 20) - 1, 2)
    with pytest.raises(MemoryError, match="does not fit: 0xff000 bytes are left"):
        driver.memory.alloc(1 << 20)


def test_memory_alone(memory: FakeMemory) -> None:
    """A model's own methods, with nobody connected."""
    device = Edu("edu0")
    memory.attach(device)
    address = memory.alloc(b"abc", align=16)
    assert device.dma.read(address, 3) == b"abc"
    device.dma.write(address + 1, b"x")
    assert memory.read(address, 3) == b"axc"
    device.close()
