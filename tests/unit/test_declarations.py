"""What QEMU would abort or hang on, and what contradicts itself, is refused when the class is made."""

from __future__ import annotations

from typing import Any

import pytest

from vmodel.device import Intx, IoBar, MmioBar, Msi, Msix, PciDevice, Pcie, Pm, VendorSpecific
from vmodel.pci.extcaps import Acs, Aer, Ats, Dsn, Pasid, Pri
from vmodel.regs import Reg32, RegisterBank, RegisterError
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
        (lambda: Dsn(1 << 64), "64 bits"),
        (lambda: Acs(0x20), "egress"),
        (lambda: Ats(queue_depth=33), "1 to 32"),
        (lambda: Pasid(width=21), "20 bits"),
        (lambda: Pri(capacity=0), "positive"),
        (lambda: declare(vendor_id=0x10000), "16-bit"),
        (lambda: declare(class_code=None), "24-bit"),
        (lambda: declare(rom=bytes(3000)), "power of two"),
        (lambda: declare(a=MmioBar(0, size=4096), b=MmioBar(0, size=4096)), "twice"),
        (lambda: declare(a=MmioBar(0, size=4096, is_64bit=True), b=MmioBar(1, size=4096)), "twice"),
        (lambda: declare(a=MmioBar(4, size=4096), b=Msix(vectors=1)), "twice"),
        (lambda: declare(a=Pm(), b=Pm()), "twice"),
        (lambda: declare(a=Dsn(1)), "need the PCI Express"),
        (lambda: declare(**{f"v{n}": VendorSpecific(bytes(200)) for n in range(2)}), "does not fit"),
    ],
)
def test_refused(make: Any, text: str) -> None:
    with pytest.raises(RegisterError, match=text):
        make()


def test_overlapping_banks() -> None:
    bar = MmioBar(0, size=4096)
    bar.bank(Regs, at=0)
    with pytest.raises(RegisterError, match="overlaps"):
        bar.ram(at=0xFC, size=16)


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
    assert len(device.regions) == 9
    device.close()


def test_vendor_specific_capability() -> None:
    written: list[bytes] = []
    device = declare(vendor=VendorSpecific(b"abcd", writable=True, on_write=written.append))()
    assert bytes(device.config.view[0x40:0x47]) == b"\x09\0\x07abcd"
    device.region_write(7, 0x44, 2, 0x5A59)
    assert written == [b"aYZd"]
    assert device.config.size == 256
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
