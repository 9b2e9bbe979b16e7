"""One rule for values of registers, fields and results of hooks: they fit, or are `~x` of a number that fits."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vmodel.device import MmioBar, PciDevice, on_read, on_write
from vmodel.fields import fit
from vmodel.regs import Bits, Layout, Reg8, Reg32, RegisterBank


class Flags(Layout):
    MODE = Bits(4, 7)


class Regs(RegisterBank, size=0x1000):
    A = Reg32(0, layout=Flags)
    B = Reg32(4)
    C = Reg8(8)


class Card(PciDevice):
    """A card whose hooks return what a test has put into `result`."""

    vendor_id, device_id, class_code = 0x1234, 0x0001, 0xFF0000
    bar0 = MmioBar(0, size=0x1000)
    regs = bar0.bank(Regs)
    result: int = 0

    @on_read(Regs.A)
    def on_a(self, stored: int) -> int:
        return self.result

    @on_write(Regs.B)
    def on_b(self, new: int) -> int:
        return self.result


def written(card: Card, value: int, offset: int, count: int) -> None:
    card.result = value
    card.backend.region_write(0, offset, count, 1)


STORES: dict[str, Callable[[Card, int], object]] = {
    "a register": lambda card, value: setattr(card.regs, "B", value),
    "by its descriptor": lambda card, value: Regs.B.__set__(card.regs, value),
    "a write hook": lambda card, value: written(card, value, 4, 4),
    "a part of a write": lambda card, value: written(card, value, 5, 1),
}


@pytest.mark.parametrize("how", STORES)
@pytest.mark.parametrize(
    ("value", "stored"),
    [(0, 0), (0xFFFF_FFFF, 0xFFFF_FFFF), (~0, 0xFFFF_FFFF), (~0x0F, 0xFFFF_FFF0), (~0xFFFF_FFFF, 0), (True, 1)],
)
def test_what_fits(how: str, value: int, stored: int) -> None:
    card = Card()
    STORES[how](card, value)
    assert (card.regs.B, card.errors) == (stored, 0)
    card.result = value
    assert card.backend.region_read(0, 0, 4) == stored
    assert card.backend.region_read(0, 1, 1) == stored >> 8 & 0xFF


@pytest.mark.parametrize("value", [1 << 32, ~(1 << 32), 1 << 70])
def test_what_does_not_fit(value: int) -> None:
    """A hook's result is an error of the model: a read gives all ones, a write leaves the register as it was."""
    card = Card()
    card.regs.B = 7
    for how in ("a register", "by its descriptor"):
        with pytest.raises(ValueError, match=rf"{value:#x} does not fit into Regs\.B \(32 bits\)"):
            STORES[how](card, value)
    for how in ("a write hook", "a part of a write"):
        STORES[how](card, value)
    assert card.backend.region_read(0, 0, 4) == 0xFFFF_FFFF
    assert card.backend.region_read(0, 0, 1) == 0xFF
    assert card.regs.B == 7
    found = [str(error) for error in card.backend.model_errors]
    for text, name in zip(found, ["B", "B", "A", "A"], strict=True):
        assert f"ValueError: {value:#x} does not fit into Regs.{name} (32 bits)" in text


def test_no_number() -> None:
    card = Card()
    card.result = None  # type: ignore[assignment]
    assert card.backend.region_read(0, 0, 4) == 0xFFFF_FFFF
    assert "Regs.A (32 bits): must be a number, not None" in str(card.backend.model_errors[0])
    with pytest.raises(TypeError, match=r"Regs\.C \(8 bits\): must be a number, not 1\.5"):
        card.regs.C = 1.5  # type: ignore[assignment]


def test_fields() -> None:
    assert Flags.MODE.put(0xFF, ~0x5) == 0xAF
    for value in (16, ~16):
        with pytest.raises(ValueError, match=r"does not fit into MODE \(4 bits\)"):
            Flags.MODE.put(0, value)
    assert fit(~0, 64, "x") == 2**64 - 1
