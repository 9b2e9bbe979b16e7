"""What QEMU would abort or hang on, and what contradicts itself, is refused when the class is made."""

from __future__ import annotations

from typing import Any

import pytest

from vmodel.device import (
    Intx,
    IoBar,
    MmioBar,
    Msi,
    Msix,
    Params,
    PciDevice,
    Pcie,
    Pm,
    ResetKind,
    VendorSpecific,
    on_read,
    on_write,
)
from vmodel.pci.caps import PmRegs
from vmodel.pci.config import HeaderRegs
from vmodel.pci.extcaps import Acs, Aer, Ats, Dsn, Pasid, Pri
from vmodel.regs import RO, Reg8, Reg16, Reg32, RegisterBank, RegisterError
from vmodel.span import GiB, MiB


class Regs(RegisterBank, size=0x100):
    """Something to place."""

    A = Reg32(0)


def declare(**attributes: Any) -> type[PciDevice]:
    return type("Device", (PciDevice,), {"vendor_id": 1, "device_id": 2, "class_code": 3, **attributes})


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: MmioBar(0, size=4095), "power of two"),
        (lambda: MmioBar(0, size=8), "power of two"),
        (lambda: MmioBar(0, size=0), "power of two"),
        (lambda: MmioBar(6, size=4096), "index"),
        (lambda: MmioBar(-1, size=4096), "index"),
        (lambda: MmioBar(5, size=4096, is_64bit=True), "BAR5"),
        (lambda: MmioBar(5, size=8 * GiB), "BAR5"),
        (lambda: MmioBar(0, size=4 * GiB, is_64bit=False), "64-bit"),
        (lambda: IoBar(0, size=512), "256 ports"),
        (lambda: IoBar(0, size=2), "power of two"),
        (lambda: MmioBar(0, size=128).bank(Regs), "outside"),
        (lambda: MmioBar(0, size=4096).bank(Regs, at=-4), "outside"),
        (lambda: MmioBar(0, size=8192).ram(at=100, size=4096, mappable=True), "whole pages"),
        (lambda: IoBar(0, size=16).ram(size=16, mappable=True), "memory BAR"),
        (lambda: Msi(vectors=3), "MSI has"),
        (lambda: Msi(vectors=64), "MSI has"),
        (lambda: Msix(vectors=0), "MSI-X has"),
        (lambda: Msix(vectors=2049), "MSI-X has"),
        (lambda: Msix(vectors=4, bar=MmioBar(1, size=4096), table_offset=4064), "outside"),
        (lambda: Msix(vectors=4, bar=MmioBar(1, size=4096), pba_offset=4096), "outside"),
        (lambda: Msix(vectors=4, bar=MmioBar(1, size=4096), pba_offset=32), "overlaps"),
        (lambda: Msix(vectors=4, bar=MmioBar(1, size=4096), table_offset=4, pba_offset=1024), "aligned"),
        (lambda: Msix(vectors=4, bar=IoBar(1, size=256)), "I/O BAR"),
        (lambda: Intx(0), "pin"),
        (lambda: Intx(5), "pin"),
        (lambda: VendorSpecific(b""), "1 to 200"),
        (lambda: VendorSpecific(bytes(201)), "1 to 200"),
        (lambda: VendorSpecific(HeaderRegs), "from offset 3 on"),
        (lambda: Dsn(1 << 64), "64 bits"),
        (lambda: Acs(0x20), "egress"),
        *((lambda bit=bit: Acs(1 << bit), "bits of an endpoint") for bit in (0, 1, 4, 7)),
        (lambda: Ats(queue_depth=33), "1 to 32"),
        (lambda: Pasid(width=21), "20 bits"),
        (lambda: Pri(capacity=0), "positive"),
        (lambda: declare(vendor_id=0x10000), "16-bit"),
        (lambda: declare(class_code=None), "24-bit"),
        (lambda: declare(vendor_id=0xFFFF), "no function"),
        (lambda: declare(rom=bytes(3000)), "power of two"),
        (lambda: declare(rom=bytes(1024)), "power of two"),
        (lambda: declare(rom=bytes(32 * MiB)), "16 MiB"),
        (lambda: declare(a=MmioBar(0, size=64), b=Pcie()), "at least 128 bytes"),
        (lambda: declare(a=Pasid(), b=Pcie()), "TLP prefixes"),
        (lambda: declare(a=MmioBar(0, size=4096), b=MmioBar(0, size=4096)), "twice"),
        (lambda: declare(a=MmioBar(0, size=4096, is_64bit=True), b=MmioBar(1, size=4096)), "twice"),
        (lambda: declare(a=MmioBar(4, size=4096), b=Msix(vectors=1)), "twice"),
        (lambda: declare(a=Pm(), b=Pm()), "twice"),
        (lambda: declare(a=Intx(1), b=Intx(2)), "one interrupt pin"),
        (lambda: declare(a=Dsn(1)), "need the PCI Express"),
        (lambda: declare(**{f"v{n}": VendorSpecific(bytes(200)) for n in range(2)}), "does not fit"),
    ],
)
def test_refused(make: Any, text: str) -> None:
    with pytest.raises(RegisterError, match=text):
        make()


def test_overlapping_banks() -> None:
    bar = MmioBar(0, size=4096)
    with pytest.raises(RegisterError, match=r"BAR0: Device.ram at 0xfc..0x10b overlaps Device.regs at 0x0..0xff"):
        declare(bar=bar, regs=bar.bank(Regs), ram=bar.ram(at=0xFC, size=16))
    with pytest.raises(RegisterError, match=r"the table of Device.msix at 0x0..0x1f overlaps Device.ram at 0x10..0x1f"):
        declare(bar=bar, msix=Msix(vectors=2, bar=bar, pba_offset=0x100), ram=bar.ram(at=16, size=16))
    with pytest.raises(RegisterError, match=r"BAR1, which Device does not declare"):
        declare(bar=bar, regs=MmioBar(1, size=4096).bank(Regs))


class More(RegisterBank, size=0x100):
    """Something else to place."""

    B = Reg32(0, reset=7)


def test_a_subclass_extends_a_copy() -> None:
    """Two models may put a bank each at the same place of a BAR that they inherit, and the base stays as it is."""

    class Base(PciDevice):
        vendor_id, device_id, class_code = 1, 2, 3
        bar0 = MmioBar(0, size=4096)
        regs = bar0.bank(Regs)

    class One(Base):
        more = Base.bar0.bank(More, at=0x100)

    class Two(Base):
        other = Base.bar0.bank(More, at=0x100)

    def banks(model: type[PciDevice]) -> list[str]:
        return [bank["name"] for bank in model.declaration.describe()["bars"][0]["banks"]]

    assert (banks(Base), banks(One), banks(Two)) == (["Regs"], ["Regs", "More"], ["Regs", "More"])
    base, one = Base("base"), One("one")
    assert (base.backend.region_read(0, 0x100, 4), one.backend.region_read(0, 0x100, 4)) == (0xFFFF_FFFF, 7)

    class Bigger(One):
        bar0 = MmioBar(0, size=8192)

    assert Bigger.declaration.bars[0].size == 8192
    bigger = Bigger("bigger")
    assert bigger.backend.region_read(0, 0x100, 4) == 7
    for device in (base, one, bigger):
        device.close()


@pytest.mark.parametrize("name", ["backend", "config", "dma", "memory", "points", "defer", "after", "errors", "log"])
def test_names_of_the_framework(name: str) -> None:
    """They would replace what the framework has, or be overwritten by it."""
    with pytest.raises(RegisterError, match=rf"Device.{name}: PciDevice uses this name itself; reserved are: after, "):
        declare(**{name: 5})
    bar = MmioBar(0, size=4096)
    device = declare(bar=bar, regs=bar.bank(Regs))()
    with pytest.raises(RegisterError, match=rf"^Device.{name} is a part of the device or used by PciDevice: it cannot"):
        setattr(device, name, 5)
    with pytest.raises(RegisterError, match=r"^Device.regs is a part"):
        device.regs = 5  # type: ignore[attr-defined]
    device.other = 5  # type: ignore[attr-defined]
    device.close()


def test_a_register_that_is_not_there() -> None:
    bar = MmioBar(0, size=4096)
    device = declare(bar=bar, regs=bar.bank(Regs))()
    with pytest.raises(RegisterError, match=r"^Regs has no register AA; did you mean A\?$"):
        device.regs.AA = 5  # type: ignore[attr-defined]
    with pytest.raises(RegisterError, match=r"^Regs has no register zzz: there are A$"):
        device.regs.zzz = 5  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match=r"^Regs has no register AA; did you mean A\?$"):
        device.regs.AA  # noqa: B018
    assert not hasattr(device.regs, "__deepcopy__")
    device.close()


@pytest.mark.parametrize(("name", "instead"), [("__init__", "setup"), ("__new__", "for_params")])
def test_a_constructor_of_its_own(name: str, instead: str) -> None:
    with pytest.raises(RegisterError, match=rf"^Card.{name}: a model overrides {instead}\(\) instead$"):
        type("Card", (PciDevice,), {name: lambda self: None})


class Whole(PciDevice):
    """What the parts are called does not matter."""

    vendor_id, device_id, class_code = 1, 2, 3

    pin_a = Intx()
    power = Pm()
    own = VendorSpecific(b"abcd", writable=True)
    written: list[int]

    def setup(self) -> None:
        self.written = []
        self.resets: list[ResetKind] = []

    def on_reset(self, kind: ResetKind) -> None:
        self.resets.append(kind)

    @on_write(HeaderRegs.CACHE_LINE)
    def _cache_line(self, new: int) -> int:
        self.written.append(new)
        return new & 0xF0

    @on_read(HeaderRegs.INTERRUPT_LINE)
    def _line(self, stored: int) -> int:
        return stored ^ 0xFF

    @on_write(PmRegs.PMCSR)
    def _power(self, new: int) -> None:
        self.written.append(new)


def test_hooks_on_config_space() -> None:
    """As hooks on registers of BARs: they get the value after access modes, and say what is stored."""
    device = Whole("whole")
    read, write = device.backend.region_read, device.backend.region_write
    write(7, 0x0C, 1, 0x5A)
    assert (device.written, read(7, 0x0C, 1)) == ([0x5A], 0x50)
    write(7, 0x3C, 1, 0x0F)
    assert read(7, 0x3C, 1) == 0xF0
    write(7, 0x0C, 4, 0x0000_0020)  # with what is beside it
    assert device.written == [0x5A, 0x20]
    at = next(at for name, at, _ in device.config.places if name == "power")
    write(7, at + 4, 2, 0xFF03)  # bits that cannot be written are not: PME_Status is cleared by 1, D3hot is taken
    assert device.written[2:] == [0x0103]
    assert device.power.state == 3
    assert device.resets == [ResetKind.DEVICE]
    write(7, at + 4, 2, 0)  # back to D0 resets, as No_Soft_Reset is clear
    assert device.resets == [ResetKind.DEVICE, ResetKind.POWER]
    device.close()


def test_setup_is_before_the_first_reset() -> None:
    """A model makes its attributes there, and its parameters and parts are in place."""
    seen: list[object] = []

    class Ordered(Whole):
        def setup(self) -> None:
            super().setup()
            seen.append((self.name, self.pin_a.level, self.resets))

    device = Ordered("ordered")
    assert seen == [("ordered", False, [ResetKind.DEVICE])]  # the list itself, to which the reset has been added
    device.close()


def test_parameters_that_change_the_declaration() -> None:
    class Wide(Params):
        """Of a card that comes in two widths."""

        wide: bool = False

    class Narrow(PciDevice):
        vendor_id, device_id, class_code = 1, 2, 3
        Params = Wide
        bar0 = MmioBar(0, size=4096)

        @classmethod
        def for_params(cls, params: Wide) -> type[Narrow]:
            return WideCard if params.wide else cls

    class WideCard(Narrow):
        bar0 = MmioBar(0, size=8192)

    for params, size in (({}, 4096), ({"wide": True}, 8192), (Wide(wide=True), 8192)):
        device = Narrow("card", params)
        assert device.backend.region_infos[0].size == size
        device.close()


def test_everything_at_once() -> None:
    bar = MmioBar(0, size=1 * MiB)
    regs = bar.bank(Regs)
    device = declare(
        bar=bar,
        regs=regs,
        msix=Msix(vectors=2048, bar=bar, table_offset=0x10000, pba_offset=0x20000),
        msi=Msi(vectors=32, per_vector_mask=True, address_64=False),
        pm=Pm(),
        pcie=Pcie(),
        vendor=VendorSpecific(b"data", writable=True),
        more=VendorSpecific(b"again"),
        aer=Aer(),
        dsn=Dsn(5),
    )()
    assert device.config.size == 4096
    assert len(device.backend.region_infos) == 9
    device.close()


def test_vendor_specific_capability() -> None:
    device = declare(vendor=VendorSpecific(b"abcd", writable=True), fixed=VendorSpecific(b"efgh"))()
    assert bytes(device.config.view[0x40:0x47]) == b"\x09\x48\x07abcd"
    assert bytes(device.config.view[0x48:0x4F]) == b"\x09\0\x07efgh"
    for at in (0x44, 0x4C):
        device.backend.region_write(7, at, 2, 0x5A59)
    assert bytes(device.config.view[0x43:0x47]) == b"aYZd"
    assert bytes(device.config.view[0x4B:0x4F]) == b"efgh"
    assert device.config.size == 256
    device.close()


class OwnCap(RegisterBank, size=12):
    """Registers of a capability; PCI 3.0, appendix H: id, next and length come before them."""

    VERSION = Reg8(3, RO, reset=2)
    QUOTA = Reg16(4, reset=8)


class WithOwnCap(PciDevice):
    """A vendor-specific capability with registers and a hook."""

    vendor_id, device_id, class_code = 1, 2, 3
    cap = VendorSpecific(OwnCap)
    seen = 0

    @on_write(OwnCap.QUOTA)
    def _quota(self, new: int) -> int:
        self.seen = new
        return min(new, 64)


def test_vendor_specific_capability_with_registers() -> None:
    device = WithOwnCap()
    assert bytes(device.config.view[0x40:0x4C]) == b"\x09\0\x0c\x02\x08" + bytes(7)
    device.backend.region_write(7, 0x40, 4, 0xFFFF_FFFF)
    device.backend.region_write(7, 0x44, 4, 0x5555_1234)
    assert bytes(device.config.view[0x40:0x4C]) == b"\x09\0\x0c\x02\x40" + bytes(7)
    assert (device.seen, device.cap.regs.QUOTA) == (0x1234, 64)
    device.reset(ResetKind.DEVICE)
    assert device.cap.regs.QUOTA == 8 and device.config.view[0x42] == 12
    device.close()


def test_one_declaration_many_devices() -> None:
    bar = MmioBar(0, size=4096)
    model = declare(bar=bar, regs=bar.bank(Regs), intx=Intx())
    one, two = model("one"), model("two")
    one.regs.A = 7  # type: ignore[attr-defined]
    assert two.regs.A == 0  # type: ignore[attr-defined]
    assert one.intx is not two.intx
    one.close()
    two.close()
