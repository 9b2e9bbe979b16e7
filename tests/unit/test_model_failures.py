"""Whatever a model raises is counted and named, and its device goes on."""

from __future__ import annotations

import pytest

from tests.waiting import until
from vmodel.device import MmioBar, PciDevice, ResetKind, on_read, on_write
from vmodel.regs import Reg32, RegisterBank
from vmodel.testing.fakes import FakeDriver, FakeMemory


class Wordless(Exception):
    """An exception whose text is a bug, too."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


class Leaves(BaseException):
    """As pytest.fail and sys.exit raise: no Exception."""


class Regs(RegisterBank, size=0x1000):
    READ = Reg32(0)
    WRITE = Reg32(4)
    DEFER = Reg32(8)
    AFTER = Reg32(12)
    FINE = Reg32(16)


class Card(PciDevice):
    """A card that raises what a test puts into `error`."""

    vendor_id, device_id, class_code = 0x1234, 0x0001, 0xFF0000
    bar0 = MmioBar(0, size=0x1000)
    regs = bar0.bank(Regs)
    error: type[BaseException] | None = None

    def fail(self) -> None:
        if self.error is not None:
            raise self.error

    @on_read(Regs.READ)
    def on_a_read(self, stored: int) -> int:
        self.fail()
        return stored

    @on_write(Regs.WRITE)
    def on_a_write(self, new: int) -> None:
        self.fail()

    @on_write(Regs.DEFER)
    def on_defer(self, new: int) -> None:
        self.defer(self.fail)

    @on_write(Regs.AFTER)
    def on_after(self, new: int) -> None:
        self.after(0.001, self.fail)

    def on_reset(self, kind: ResetKind) -> None:
        self.fail()


@pytest.mark.parametrize("error", [Wordless, Leaves, SystemExit, KeyboardInterrupt, GeneratorExit, StopIteration])
@pytest.mark.parametrize("where", ["READ", "WRITE", "DEFER", "AFTER"])
def test_a_failure(where: str, error: type[BaseException]) -> None:
    card = Card()
    with FakeMemory() as memory, FakeDriver(card, memory) as driver:
        card.error = error
        if where == "READ":
            assert driver.read("READ") == 0xFFFF_FFFF
        else:
            driver.write(where, 1)
        until(lambda: card.backend.bugs == 1, "the model's failure")
        assert error.__name__ in str(card.backend.model_errors[0])
        driver.write("FINE", 7)
        assert driver.read("FINE") == 7
        card.error = None


def test_ctrl_c_is_the_users() -> None:
    """On the main thread, where Python raises it, it is no failure of the model's."""
    card = Card()
    card.error = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        card.backend.region_write(0, 4, 4, 1)
