"""What a hook stores in its own register stays: an access takes effect after its hook, unless the hook has decided."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vmodel.device import MmioBar, PciDevice, ResetKind, VendorSpecific, on_read, on_write, on_write_each
from vmodel.errors import GuestError
from vmodel.register_files import Array, FileArray
from vmodel.regs import RC, RO, W1C, WO, Bit, Bits, Layout, Mode, Reg32, RegisterBank
from vmodel.vfio_user.wire import Region


class Control(Layout):
    START = Bit(0)
    MODE = Bits(4, 7)
    KEY = Bits(16, 31, WO)


class Channel(RegisterBank, size=8):
    CONTROL = Reg32(0, layout=Control)
    OTHER = Reg32(4)


class Regs(RegisterBank, size=0x100):
    CONTROL = Reg32(0x00, layout=Control)
    PLAIN = Reg32(0x04)
    STATUS = Reg32(0x08, W1C)
    EVENTS = Reg32(0x0C, RC)
    SETS = Reg32(0x10, Mode.RS)
    STICKY = Reg32(0x14, sticky=True)
    VERSION = Reg32(0x18, RO, reset=1)
    CHANNEL = FileArray(Channel, 2, at=0x20)
    BELL = Array(Reg32(0x40), 2)


class Card(PciDevice):
    """A card whose hooks run what a test has put into `does`."""

    vendor_id, device_id, class_code = 0x1234, 0x0001, 0xFF0000
    bar0 = MmioBar(0, size=0x1000)
    regs = bar0.bank(Regs)

    def setup(self) -> None:
        self.does: Callable[[Any, int], int | None] = lambda regs, new: None

    @on_write(Regs.CONTROL, Regs.PLAIN, Regs.STATUS, Regs.STICKY)
    def written(self, new: int) -> int | None:
        return self.does(self.regs, new)

    @on_write_each(Regs.CHANNEL[0].CONTROL, Regs.CHANNEL[1].CONTROL, *Regs.BELL)
    def written_each(self, index: int, new: int) -> int | None:
        return self.does(self.regs, new)

    @on_read(Regs.EVENTS, Regs.SETS, Regs.PLAIN)
    def read(self, stored: int) -> int:
        self.does(self.regs, stored)
        return stored


def set_plain(regs: Any, value: int) -> None:
    regs.PLAIN = value


# The register was 0x30 before, and 0x51 is written.
PLAIN: dict[str, tuple[Callable[[Any, int], int | None], int]] = {
    "nothing": (lambda regs, new: None, 0x51),
    "sets another value": (lambda regs, new: set_plain(regs, 0x99), 0x99),
    "sets the value from before": (lambda regs, new: set_plain(regs, 0x30), 0x30),
    "sets a part of what was written": (lambda regs, new: set_plain(regs, new & ~1), 0x50),
    "it still has its old value": (lambda regs, new: set_plain(regs, regs.PLAIN | new), 0x71),
    "sets, and returns": (lambda regs, new: set_plain(regs, 0x99) or 0x12, 0x12),
    "sets twice": (lambda regs, new: set_plain(regs, new) or set_plain(regs, regs.PLAIN | 8), 0x59),
}


@pytest.mark.parametrize("how", PLAIN)
def test_a_write_hook_sets_its_register(how: str) -> None:
    card, (card_does, after) = Card(), PLAIN[how]
    card.regs.PLAIN = 0x30
    card.does = card_does
    card.backend.region_write(0, 4, 4, 0x51)  # a whole register
    assert (card.regs.PLAIN, card.errors) == (after, 0)
    card.regs.PLAIN = 0x30
    card.backend.region_write(0, 4, 1, 0x51)  # a part of one
    assert (card.regs.PLAIN, card.errors) == (after, 0)


def test_outside_of_hooks_a_set_has_no_such_effect() -> None:
    card = Card()
    card.does = lambda regs, new: setattr(regs, "STATUS", 1)
    card.regs.PLAIN = 5
    card.backend.region_write(0, 4, 4, 0x51)
    assert card.regs.PLAIN == 0x51
    card.regs.fields.CONTROL.MODE = 3
    assert card.regs.CONTROL == 0x30


@pytest.mark.parametrize(("offset", "path"), [(0, "CONTROL"), (0x28, "CHANNEL[1].CONTROL")])
def test_a_field_set_in_the_hook_leaves_the_others_as_written(offset: int, path: str) -> None:
    """A command bit that clears itself; bits that are write-only are never stored."""
    card = Card()

    def bank() -> Any:
        return card.regs.CHANNEL[1] if "." in path else card.regs

    card.does = lambda regs, new: setattr(bank().fields.CONTROL, "START", 0)
    for size, value in ((4, 0xABCD_0051), (1, 0x51)):
        bank().CONTROL = 0x20
        card.backend.region_write(0, offset, size, value)
        assert (bank().CONTROL, card.errors) == (0x50, 0)
        assert card.backend.region_read(0, offset, 4) == 0x50


def test_an_element_of_an_array() -> None:
    card = Card()
    card.does = lambda regs, new: regs.BELL.__setitem__(1, 0x77)
    card.backend.region_write(0, 0x44, 4, 0x51)
    assert card.regs.BELL[1] == 0x77
    card.backend.region_write(0, 0x45, 1, 0x51)
    assert card.regs.BELL[1] == 0x5177, "set to what it was is not seen"
    card.does = lambda regs, new: None
    card.backend.region_write(0, 0x44, 4, 0x51)
    assert card.regs.BELL[1] == 0x51


def test_a_cause_that_comes_while_it_is_acknowledged_is_not_lost() -> None:
    """W1C: `new` is what remains.  A hook that stores it first, and then raises a cause again, keeps that."""
    card = Card()
    card.regs.STATUS = 0b11

    def again(regs: Any, new: int) -> None:
        regs.STATUS = new
        regs.STATUS |= 0b01

    card.does = again
    card.backend.region_write(0, 8, 4, 0b11)
    assert card.regs.STATUS == 0b01
    card.does = lambda regs, new: setattr(regs, "STATUS", regs.STATUS | 0b100)
    card.backend.region_write(0, 8, 4, 0b01)
    assert card.regs.STATUS == 0b101


@pytest.mark.parametrize(("offset", "name", "read"), [(0x0C, "EVENTS", 0), (0x10, "SETS", 0xFFFF_FFFF)])
def test_a_read_hook_sets_its_register(offset: int, name: str, read: int) -> None:
    """Of a register that a read changes: the read's effect comes after the hook, unless the hook has set it."""
    card = Card()
    setattr(card.regs, name, 5)
    assert card.backend.region_read(0, offset, 4) == 5
    assert getattr(card.regs, name) == read
    setattr(card.regs, name, 5)
    card.does = lambda regs, stored: setattr(regs, name, stored + 1)
    assert card.backend.region_read(0, offset, 4) == 5
    assert getattr(card.regs, name) == 6
    card.does = lambda regs, stored: setattr(regs, name, stored)
    assert card.backend.region_read(0, offset, 2) == 6
    assert getattr(card.regs, name) == 6


def test_a_read_hook_of_a_plain_register() -> None:
    card = Card()
    card.does = lambda regs, stored: set_plain(regs, stored + 1)
    assert [card.backend.region_read(0, 4, 4) for _ in range(3)] == [0, 1, 2]


@pytest.mark.parametrize(("offset", "name", "after"), [(0, "CONTROL", 0), (0x14, "STICKY", 0x51)])
def test_a_hook_that_resets_the_device(offset: int, name: str, after: int) -> None:
    """The register that resets the card has its reset value afterwards; a sticky one was not reset."""
    card = Card()
    card.does = lambda regs, new: card.reset(ResetKind.DEVICE if name == "CONTROL" else ResetKind.FUNCTION)
    card.backend.region_write(0, offset, 4, 0x51)
    assert (getattr(card.regs, name), card.errors) == (after, 0)


def test_after_an_exception_the_register_is_as_the_hook_left_it() -> None:
    card = Card()

    def refuses(regs: Any, new: int) -> None:
        raise GuestError("no")

    def sets_and_refuses(regs: Any, new: int) -> None:
        set_plain(regs, 9)
        raise GuestError("no")

    card.does = refuses
    card.backend.region_write(0, 4, 4, 0x51)
    assert (card.regs.PLAIN, card.errors) == (0, 1)
    card.does = sets_and_refuses
    card.backend.region_write(0, 4, 4, 0x51)
    assert (card.regs.PLAIN, card.errors) == (9, 2)
    card.does = lambda regs, new: None
    card.backend.region_write(0, 4, 4, 0x51)
    assert card.regs.PLAIN == 0x51


class Quota(RegisterBank, size=8):
    QUOTA = Reg32(4, reset=8)


class WithCapability(PciDevice):
    vendor_id, device_id, class_code = 0x1234, 0x0001, 0xFF0000
    cap = VendorSpecific(Quota)

    @on_write(Quota.QUOTA)
    def quota(self, new: int) -> None:
        self.cap.regs.QUOTA = min(new, 8)


def test_a_register_of_config_space() -> None:
    card = WithCapability()
    (at,) = [at for name, at, _ in card.config.places if name == "cap"]
    for value, stored in ((70, 8), (5, 5), (0x100, 8)):
        card.backend.region_write(Region.CONFIG, at + 4, 4, value)
        assert card.cap.regs.QUOTA == stored == card.backend.region_read(Region.CONFIG, at + 4, 4)
    assert card.errors == 0
