"""Registers: what a declaration allows, and that all ways of access agree with an obvious model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.examples import examples
from vmodel._shim import FunctionRegions
from vmodel.device import MmioBar, PciDevice, on_read, on_read_each, on_write, on_write_each
from vmodel.regs import (
    RC,
    RESERVED,
    RO,
    RW,
    W1C,
    W1S,
    WO,
    Bit,
    Bits,
    Layout,
    Reg8,
    Reg16,
    Reg32,
    Reg64,
    RegisterBank,
    RegisterError,
    Values,
)

# ---- declarations ------------------------------------------------------------------------------------


def test_wrong_registers_fail_at_definition() -> None:
    class Wide(Layout):
        TOP = Bit(32)

    for wrong, text in (
        ({"A": Reg32(2)}, "no multiple"),
        ({"A": Reg32(-4)}, "no multiple"),
        ({"A": Reg32(16)}, "past the bank"),
        ({"A": Reg64(0), "B": Reg32(4)}, "overlap"),
        ({"A": Reg8(0, reset=256)}, "wider"),
        ({"A": Reg8(0, reset=-1)}, "wider"),
        ({"A": Reg32(0, layout=Wide)}, "outside"),
        ({"A": Reg32(0, RO, ioeventfd=True)}, "cannot be written"),
    ):
        with pytest.raises(RegisterError, match=text):
            type("Bank", (RegisterBank,), wrong, size=16)
    with pytest.raises(RegisterError, match="sizes"):
        type("Bank", (RegisterBank,), {}, size=16, sizes=(3,))
    with pytest.raises(RegisterError, match="not positive"):
        type("Bank", (RegisterBank,), {}, size=0)


class Speed(Values):
    """Speeds."""

    SLOW = 0
    FAST = 2, "only with a short cable"
    FASTEST = 4


def test_names_of_values() -> None:
    layout: Any = type("L", (Layout,), {"SPEED": Bits(4, 7, values=Speed), "ON": Bit(0)})
    assert [layout.SPEED.value_name(value) for value in (0x00, 0x20, 0x21, 0x30)] == ["SLOW", "FAST", "FAST", ""]
    assert layout.ON.value_name(1) == "" and Speed.FAST.doc == "only with a short cable" and Speed.SLOW.doc == ""
    assert int(layout(SPEED=Speed.FAST, ON=1)) == 0x21 and layout(0x40).SPEED is not Speed.SLOW
    assert layout(0x40).SPEED == Speed.FASTEST


MODES = "RO, RW, WO, W1C, W1S, RC, RESERVED or another Mode of vmodel.regs"


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (lambda: Reg32(0x28, "RO"), f"Reg32 at 0x28: mode must be {MODES}, not 'RO'"),
        (lambda: Reg32(0, 0xC0DE), f"Reg32 at 0x0: mode must be {MODES}, not 49374"),
        (lambda: Reg16("2"), "Reg16: offset must be a number, not '2'"),
        (lambda: Reg16(2, reset="1"), "Reg16 at 0x2: reset must be a number, not '1'"),
        (lambda: Reg16(2, reset=None), "Reg16 at 0x2: reset must be a number, not None"),
        (lambda: Reg8(2, doc=1), "Reg8 at 0x2: doc must be a text, not 1"),
        (lambda: Reg8(2, layout="Control"), "Reg8 at 0x2: layout must be a class derived from Layout, not 'Control'"),
        (lambda: Reg8(2, sizes=4), "Reg8 at 0x2: sizes must be some of 1, 2, 4 and 8, such as (4, 8), not 4"),
        (lambda: Reg8(2, sizes=(3,)), "Reg8 at 0x2: sizes must be some of 1, 2, 4 and 8, such as (4, 8), not (3,)"),
        (lambda: Reg8(2, sizes=([],)), "Reg8 at 0x2: sizes must be some of 1, 2, 4 and 8, such as (4, 8), not ([],)"),
        (lambda: Reg8(2, sticky="no"), "Reg8 at 0x2: sticky must be True or False, not 'no'"),
        (lambda: Reg8(2, ioeventfd=1), "Reg8 at 0x2: ioeventfd must be True or False, not 1"),
        (lambda: Bit("3"), "a field of bits 3..3: lo must be a number, not '3'"),
        (
            lambda: Bit(3, "W1C"),
            f"a field of bits 3..3: mode must be {MODES}, not 'W1C'",
        ),
        (lambda: Bits(3, 4.5), "a field of bits 3..4.5: hi must be a number, not 4.5"),
        (lambda: Bits(3, 4, doc=b""), "a field of bits 3..4: doc must be a text, not b''"),
        (
            lambda: Bits(3, 4, values={"A": 1}),
            "a field of bits 3..4: values must be a class derived from vmodel.regs.Values, not {'A': 1}",
        ),
        (
            lambda: Bits(3, 4, values=Values),
            f"a field of bits 3..4: values must be a class derived from vmodel.regs.Values, not {Values!r}",
        ),
        (lambda: Bits(3, 4, values=Speed), "a field of bits 3..4: Speed.FASTEST = 4 does not fit"),
        (lambda: Bit(3, values=Values("Odd", {"LESS": -1})), "a field of bits 3..3: Odd.LESS = -1 does not fit"),
        (lambda: type("Bank", (RegisterBank,), {}, size="16"), "Bank: size must be a number, not '16'"),
        (
            lambda: type("Bank", (RegisterBank,), {}, size=16, sizes=4),
            "Bank: sizes must be some of 1, 2, 4 and 8, such as (4, 8), not 4",
        ),
    ],
)  # fmt: skip
def test_arguments_of_a_wrong_type(wrong: Any, text: str) -> None:
    """They are refused where they are written, not by an exception somewhere that uses them."""
    with pytest.raises(RegisterError) as caught:
        wrong()
    assert str(caught.value) == text


def test_wrong_layouts_fail_at_definition() -> None:
    with pytest.raises(RegisterError, match="overlap"):
        type("L", (Layout,), {"A": Bits(0, 4), "B": Bit(4)})
    for field in (Bits(4, 0), Bit(64), Bit(-1)):
        with pytest.raises(RegisterError, match=r"not within 0\.\.63"):
            type("L", (Layout,), {"A": field})


class Control(Layout):
    """Some fields."""

    RUN = Bit(0)
    MODE = Bits(4, 6)


def test_fields() -> None:
    assert Control(0x51).RUN == 1
    assert Control(0x51).MODE == 5
    assert Control.MODE.put(0x51, 2) == 0x21
    assert Control.MODE.mask == 0x70
    for wrong in (8, -9):
        with pytest.raises(ValueError, match="does not fit"):
            Control.MODE.put(0, wrong)


class Regs(RegisterBank, size=0x10):
    """For hooks."""

    A = Reg32(0)
    B = Reg32(4)


class Other(RegisterBank, size=0x10):
    """Not in any BAR."""

    A = Reg32(0)


def declare(**attributes: Any) -> type:
    """A device class with these attributes."""
    return type("Device", (PciDevice,), {"vendor_id": 1, "device_id": 2, "class_code": 3, **attributes})


def hooked(register: Any) -> Any:
    def hook(self: Any, new: int) -> None:
        pass

    return on_write(register)(hook)


def test_wrong_hooks_fail_at_definition() -> None:
    bar = MmioBar(0, size=4096)
    regs = bar.bank(Regs)
    with pytest.raises(RegisterError, match="two on_write hooks"):
        declare(bar=bar, regs=regs, one=hooked(Regs.A), two=hooked(Regs.A))
    with pytest.raises(RegisterError, match="in no BAR and no capability"):
        declare(bar=bar, regs=regs, one=hooked(Other.A))
    for wrong in ("A", 0, Reg32(0)):
        with pytest.raises(RegisterError, match="registers of a bank"):
            on_read(wrong)  # type: ignore[arg-type]
    base = declare(bar=bar, regs=regs, hook=hooked(Regs.A))
    type("Better", (base,), {"hook": hooked(Regs.A)})  # overriding is no second hook


@pytest.mark.parametrize(
    ("mark", "method", "said"),
    [
        (on_read(Regs.A), lambda self: 0, r"Device.hook: must be hook\(self, stored: int\): too many positional"),
        (on_write(Regs.A), lambda self, old, new: None, r"must be hook\(self, new: int\): missing a required"),
        (on_read_each(Regs.A), lambda self, stored: 0, r"must be hook\(self, index: int, stored: int\): too many"),
        (on_write_each(Regs.A), lambda self, new: None, r"must be hook\(self, index: int, new: int\): too many"),
    ],
)
def test_hooks_with_other_arguments_fail_at_definition(
    mark: Callable[[Any], Any], method: Callable[..., Any], said: str
) -> None:
    bar = MmioBar(0, size=4096)
    parts = {"bar": bar, "regs": bar.bank(Regs), "hook": mark(method)}
    with pytest.raises(RegisterError, match=said):
        declare(**parts)


@pytest.mark.parametrize(
    ("name", "method", "said"),
    [
        ("on_reset", lambda self: None, r"on_reset: must be on_reset\(self, kind: ResetKind\): too many"),
        ("setup", lambda self, params: None, r"setup: must be setup\(self\): missing a required argument: 'params'"),
        ("restore_extra", lambda self: None, r"must be restore_extra\(self, data: bytes\)"),
    ],
)
def test_methods_with_other_arguments_fail_at_definition(name: str, method: object, said: str) -> None:
    with pytest.raises(RegisterError, match=said):
        declare(**{name: method})


# ---- accesses, against an obvious model --------------------------------------------------------------


class Mixed(Layout):
    """All modes in one register."""

    LOW = Bits(0, 7, RW)
    CLEAR = Bits(8, 15, W1C)
    SET = Bits(16, 19, W1S)
    FIXED = Bits(20, 23, RO)
    GONE = Bits(24, 27, RESERVED)
    ONCE = Bits(28, 31, RC)


class All(RegisterBank, size=0x20):
    """Registers of every mode and width, with and without hooks."""

    PLAIN = Reg32(0x00, reset=0x0102_0304)
    HOOKED = Reg32(0x04, reset=0x1111_1111)
    MIXED = Reg32(0x08, layout=Mixed, reset=0xFFF5_FF5A)
    MIXED_HOOKED = Reg32(0x0C, layout=Mixed, reset=0xFFF5_FF5A)
    BYTE = Reg8(0x10, W1C, reset=0xFF)
    BYTE_HOOKED = Reg8(0x11, reset=0x42)
    WORD = Reg16(0x12, RC, reset=0xBEEF)
    COMMAND = Reg32(0x14, WO, reset=0x5555_5555)
    LONG = Reg64(0x18, reset=0x8877_6655_4433_2211)


class AllDevice(PciDevice):
    """Its hooks change nothing, so that a plain model is enough."""

    vendor_id, device_id, class_code = 1, 2, 3
    bar0 = MmioBar(0, size=4096)
    regs = bar0.bank(All)

    def setup(self) -> None:
        self.commands: list[int] = []

    @on_read(All.HOOKED, All.MIXED_HOOKED)
    def _read(self, stored: int) -> int:
        return stored

    @on_write(All.HOOKED, All.MIXED_HOOKED, All.BYTE_HOOKED)
    def _write(self, new: int) -> None:
        pass

    @on_write(All.COMMAND)
    def _command(self, new: int) -> int:
        self.commands.append(new)
        return 0


class Model:
    """Bytes, and for each bit what it does."""

    def __init__(self) -> None:
        self.bytes = bytearray(b"\xff" * 0x20)
        self.masks = {mode: bytearray(0x20) for mode in (RW, W1C, W1S, RC)}
        for register in All.registers:
            at = slice(register.offset, register.offset + register.size)
            self.bytes[at] = register.reset.to_bytes(register.size, "little")
            for mode, mask in self.masks.items():
                mask[at] = register.mask(mode).to_bytes(register.size, "little")

    def read(self, offset: int, count: int) -> bytes:
        data = bytes(self.bytes[offset : offset + count])
        for at in range(offset, offset + count):
            self.bytes[at] &= ~self.masks[RC][at]
        return data

    def write(self, offset: int, data: bytes) -> None:
        for at, byte in enumerate(data, offset):
            stored = self.bytes[at] & ~self.masks[RW][at] | byte & self.masks[RW][at]
            self.bytes[at] = stored & ~(byte & self.masks[W1C][at]) | byte & self.masks[W1S][at]


accesses = st.tuples(st.booleans(), st.integers(0, 0x1F), st.integers(1, 8), st.integers(0, 2**64 - 1))


@settings(max_examples=examples(300), deadline=None)
@given(st.lists(accesses, max_size=30))
def test_accesses_agree_with_a_model(steps: list[tuple[bool, int, int, int]]) -> None:
    """Any access, whole, partial or across registers, hooked or not, does what the modes say bit by bit."""
    device, model = AllDevice(), Model()
    for writing, offset, count, value in steps:
        count = min(count, 0x20 - offset)
        value &= (1 << 8 * count) - 1
        if writing:
            device.backend.region_write(0, offset, count, value)
            model.write(offset, value.to_bytes(count, "little"))
        else:
            seen = device.backend.region_read(0, offset, count)
            assert seen == int.from_bytes(model.read(offset, count), "little")
    assert bytes(device.regs.view) == bytes(model.bytes)
    assert device.errors == 0
    device.close()


def test_write_only_registers(device: AllDevice | None = None) -> None:
    device = AllDevice()
    device.backend.region_write(0, 0x14, 4, 0xCAFE)
    device.backend.region_write(0, 0x15, 1, 0x12)
    assert device.commands == [0xCAFE, 0x5555_1255]
    assert device.regs.COMMAND == 0x5555_5555
    device.close()


def test_raw_access_has_no_hooks() -> None:
    device = AllDevice()
    device.regs.COMMAND = 7
    device.regs.WORD = 0x1234
    assert (device.regs.WORD, device.regs.WORD, device.commands) == (0x1234, 0x1234, [])
    device.close()


def test_banks_know_the_function(tmp_path: object) -> None:
    """The backing store outlives the objects that it came from."""
    function = FunctionRegions()
    function.define_region(0, 4096)
    view = function.add_bank(0, 0, 16)
    del function
    view[3] = 9
    assert view[3] == 9
