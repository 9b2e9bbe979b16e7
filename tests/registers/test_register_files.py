"""Arrays of registers, register files and memories."""

from __future__ import annotations

from typing import Any

import pytest

from vmodel.device import MmioBar, PciDevice, ResetKind, on_read_each, on_write, on_write_each
from vmodel.register_files import Array, FileArray, RamArea, RegisterFile
from vmodel.register_map import RegisterMap
from vmodel.regs import RO, WO, Bit, Layout, Reg16, Reg32, Reg64, RegisterBank, RegisterError


class Control(Layout):
    """Control of a channel."""

    RUN = Bit(0)
    ERROR = Bit(4, RO)


class Channel(RegisterBank, size=0x20):
    """A channel."""

    CONTROL = Reg32(0x00, layout=Control, reset=0x10)
    ADDRESS = Reg64(0x08)
    TAG = Array(Reg16(0x10), 2)
    NOTES = RamArea(0x18, size=8)


class Card(RegisterBank, size=0x400):
    """A card."""

    ID = Reg32(0x00, RO, reset=0xCA4D)
    DOORBELL = Array(Reg32(0x40, WO), 4, stride=8)
    GRID = Array(Reg32(0x80), (2, 3))
    CHANNEL = FileArray(Channel, 3, at=0x100, stride=0x40)
    DEBUG = RegisterFile(Channel, at=0x200)
    TABLE = RamArea(0x300, size=0x80)
    ROM = RamArea(0x380, size=0x80, mode=RO)


class Device(PciDevice):
    """Remembers what its hooks got."""

    vendor_id, device_id, class_code = 1, 2, 3
    bar0 = MmioBar(0, size=4096)
    regs = bar0.bank(Card)

    def setup(self) -> None:
        self.seen: list[Any] = []

    @on_write_each(*Card.DOORBELL)
    def _bell(self, n: int, new: int) -> None:
        self.seen.append(("bell", n, new))

    @on_write_each(*(channel.CONTROL for channel in Card.CHANNEL))
    def _control(self, n: int, new: int) -> None:
        self.seen.append(("control", n, new))

    @on_read_each(*(channel.ADDRESS for channel in Card.CHANNEL))
    def _address(self, n: int, stored: int) -> int:
        return stored + n

    @on_write(Card.DEBUG.CONTROL, Card.GRID[1][2], Card.CHANNEL[2].TAG[1])
    def _other(self, new: int) -> None:
        self.seen.append(new)


@pytest.fixture
def device() -> Any:
    device = Device()
    yield device
    assert device.errors == 0
    device.close()


def test_names_and_offsets() -> None:
    assert [(r.name, r.offset) for r in Card.registers] == [
        ("ID", 0),
        *((f"DOORBELL[{n}]", 0x40 + 8 * n) for n in range(4)),
        *((f"GRID[{n}][{m}]", 0x80 + 4 * (3 * n + m)) for n in range(2) for m in range(3)),
        *(
            (f"{name}.{register}", base + at)
            for name, base in (*((f"CHANNEL[{n}]", 0x100 + 0x40 * n) for n in range(3)), ("DEBUG", 0x200))
            for register, at in (("CONTROL", 0), ("ADDRESS", 8), ("TAG[0]", 0x10), ("TAG[1]", 0x12))
        ),
    ]
    assert all(register.bank is Card for register in Card.registers)
    assert [(m.name, m.offset, m.size) for m in Card.memories] == [
        *((f"CHANNEL[{n}].NOTES", 0x118 + 0x40 * n, 8) for n in range(3)),
        ("DEBUG.NOTES", 0x218, 8),
        ("TABLE", 0x300, 0x80),
        ("ROM", 0x380, 0x80),
    ]


def test_the_guest_and_the_model_see_the_same(device: Any) -> None:
    regs, write, read = device.regs, device.backend.region_write, device.backend.region_read
    assert regs.CHANNEL[2].CONTROL == 0x10 and read(0, 0x180, 4) == 0x10
    regs.CHANNEL[1].ADDRESS = 0x1122334455667788
    assert read(0, 0x148, 8) == 0x1122334455667788 + 1  # by its read hook
    regs.GRID[1][0] = 7
    assert read(0, 0x8C, 4) == 7
    write(0, 0x92, 2, 0xABCD)
    assert regs.GRID[1][1] == 0xABCD0000
    regs.DEBUG.TAG[1] = 5
    assert read(0, 0x212, 2) == 5 and list(regs.DEBUG.TAG) == [0, 5]
    regs.CHANNEL[0].fields.CONTROL.RUN = 1
    assert read(0, 0x100, 4) == 0x11


def test_hooks_of_elements(device: Any) -> None:
    for at, value in ((0x58, 1), (0x140, 2), (0x200, 3), (0x94, 4), (0x192, 5)):
        device.backend.region_write(0, at, 2, value)
    assert device.seen == [("bell", 3, 1), ("control", 1, 0x10 | 2), 0x10 | 3, 4, 5]


def test_memories(device: Any) -> None:
    write, read = device.backend.region_write, device.backend.region_read
    assert bytes(device.regs.TABLE) == bytes(0x80)
    write(0, 0x37E, 8, 0x0807060504030201)
    assert bytes(device.regs.TABLE[-2:]) == b"\1\2" and bytes(device.regs.ROM[:6]) == bytes(6)
    device.regs.ROM[:3] = b"abc"
    assert read(0, 0x380, 3) == 0x636261
    device.regs.CHANNEL[1].NOTES[:] = b"channel1"
    assert read(0, 0x158, 8) == int.from_bytes(b"channel1", "little")
    device.reset(ResetKind.DEVICE)
    assert bytes(device.regs.TABLE[-2:]) == b"\1\2" and device.regs.CHANNEL[0].CONTROL == 0x10


def test_a_register_has_its_full_name(device: Any) -> None:
    names = RegisterMap(device)
    assert [place.full_name for place in names.covering(0, 0x149, 1)] == ["regs.CHANNEL[1].ADDRESS"]
    assert [place.span.start for place in names.find("CHANNEL[1].TAG[1]", config=False)] == [0x152]


def test_names_that_are_not_there(device: Any) -> None:
    for call, said in (
        (lambda: Card.CHANEL, "Card has no register CHANEL; did you mean CHANNEL?"),
        (lambda: Card.CHANNEL[0].CONTRL, "Channel has no register CONTRL; did you mean CONTROL?"),
        (lambda: device.regs.CHANNEL[0].CONTRL, "Channel has no register CONTRL; did you mean CONTROL?"),
        (lambda: device.regs.fields.IDD, "Card has no register IDD; did you mean ID?"),
        (
            lambda: device.regs.DEBUG.fields.CONTROL.RUNN,
            "<Channel.CONTROL at 0x0> has no field RUNN; did you mean RUN?",
        ),
    ):
        with pytest.raises(AttributeError) as caught:
            call()
        assert str(caught.value) == said
    with pytest.raises(RegisterError, match="Card has no register CHANNEL"):
        device.regs.CHANNEL = 3
    with pytest.raises(IndexError):
        _ = Card.CHANNEL[3]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: {"A": Array(Reg32(0), 4), "B": Reg32(0xC)}, "overlap"),
        (lambda: {"A": FileArray(Channel, 2, at=0, stride=0x10)}, "overlap"),
        (lambda: {"A": RegisterFile(Channel, at=0xF0)}, "Bank.A: ends past the bank's size 0x100"),
        (lambda: {"A": FileArray(Channel, 9, at=0)}, "Bank.A: ends past the bank's size 0x100"),
        (lambda: {"A": RamArea(0xFF, size=2)}, "Bank.A: ends past the bank's size 0x100"),
        (lambda: {"A": RamArea(0, size=9), "B": Reg32(8)}, "Bank: A and B overlap"),
        (lambda: {"A": Array(Reg32(0), 2, stride=6)}, "Bank.A: stride 0x6 is no multiple of its size 4"),
        (lambda: {"A": Array(Reg32(0), 65)}, r"A\[64\]: ends past"),
        (lambda: {"A": RegisterFile(Channel, at=2)}, "no multiple of its size"),
        (lambda: {"A": Array(Reg32(0), 1 << 40)}, "Array: more than 65536 elements"),
        (lambda: {"A": Array(Reg32(0), (1 << 20, 1 << 20, 1 << 20))}, "Array: more than 65536 elements"),
        (lambda: {"A": FileArray(Channel, 1 << 15, at=0)}, "more than 65536 registers"),
        (lambda: {"A": Array(Reg32(0), 0)}, "Array: a count of 0"),
        (lambda: {"A": Array(Reg32(0), ())}, "Array: a count of nothing"),
        (lambda: {"A": Array(Channel, 3)}, "an Array is of a register"),
        (lambda: {"A": RegisterFile(Reg32(0), at=0)}, "RegisterFile: of must be a class"),
        (lambda: {"A": RamArea(0, size=8, mode=WO)}, "mode must be RO or RW"),
        (lambda: {"A": RamArea(0, size=0)}, "RamArea at 0x0: 0 bytes"),
        (lambda: {"A": FileArray(Channel, 2, at="0")}, "FileArray: at must be a number, not '0'"),
    ],
)  # fmt: skip
def test_wrong_declarations(wrong: Any, said: str) -> None:
    with pytest.raises(RegisterError, match=said):
        type(RegisterBank)("Bank", (RegisterBank,), wrong(), size=0x100)


def test_values_of_a_layout(device: Any) -> None:
    value = Control(RUN=1)
    assert (
        int(value) == 1 and value == Control(1) and value != Control(0) and repr(value) == "Control(RUN=0x1, ERROR=0x0)"
    )
    value.ERROR = 1
    device.regs.DEBUG.CONTROL = value
    assert device.regs.DEBUG.CONTROL == 0x11
    assert int(Control(0x11, RUN=0)) == 0x10
    with pytest.raises(ValueError, match=r"0x2 does not fit into RUN \(1 bits\)"):
        Control(RUN=2)
    with pytest.raises(TypeError, match="Control has no field RUNN; did you mean RUN"):
        Control(RUNN=1)
