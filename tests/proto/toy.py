"""A device that has a bit of everything, for the protocol tests."""

from __future__ import annotations

from vmodel.device import Intx, IoBar, MmioBar, Msi, Msix, PciDevice, Pcie, Pm, on_read, on_write
from vmodel.pci.extcaps import Acs, Aer, Ats, Dsn, Pasid, Pri
from vmodel.regs import RC, RO, W1C, W1S, Reg16, Reg32, Reg64, RegisterBank
from vmodel.span import MiB


class ToyRegs(RegisterBank, size=0x1000):
    """Registers of the toy."""

    PLAIN = Reg32(0x00, reset=0x1111_1111)
    HOOKED = Reg32(0x04, reset=0x2222_2222)
    COPY_FROM = Reg64(0x08)
    COPY_TO = Reg64(0x10)
    COPY_COUNT = Reg32(0x18)
    DOORBELL = Reg32(0x1C, ioeventfd=True)
    CLEAR = Reg16(0x20, W1C, reset=0xFFFF)
    SET = Reg16(0x22, W1S)
    READ_CLEAR = Reg32(0x24, RC, reset=0x55AA)
    FIXED = Reg32(0x28, RO, reset=0xCAFE)
    READ_DMA = Reg32(0x2C)
    BROKEN = Reg32(0x30)
    PIN = Reg32(0x34, doc="raises the pin")
    WHOLE = Reg32(0x38, sizes=(4,), doc="accesses of other sizes are refused")


class Toy(PciDevice):
    """A bit of everything."""

    vendor_id, device_id, class_code, revision = 0x1B36, 0x0F0F, 0x058000, 3
    subsystem_vendor_id, subsystem_id = 0x1AF4, 0x1100
    rom = bytes(range(256)) * 8

    bar0 = MmioBar(0, size=1 * MiB)
    regs = bar0.bank(ToyRegs)
    ram = bar0.ram(at=0x2000, size=0x2000, mappable=True)
    bar1 = IoBar(1, size=16)
    bar2 = MmioBar(2, size=8 << 30, prefetchable=True)
    big = bar2.ram(at=0, size=0x4000)
    intx = Intx()
    pm = Pm()
    msi = Msi(vectors=4, per_vector_mask=True)
    msix = Msix(vectors=70, own_bar=4)
    pcie = Pcie(tlp_prefix=True)
    aer = Aer()
    dsn = Dsn(0x0123_4567_89AB_CDEF)
    acs = Acs()
    ats = Ats()
    pasid = Pasid()
    pri = Pri()

    def setup(self) -> None:
        self.writes: list[int] = []
        self.doorbells = 0
        self.last_error: Exception | None = None
        self.resets: list[str] = []

    def on_reset(self, kind: object) -> None:
        self.resets.append(str(kind))

    @on_read(ToyRegs.HOOKED)
    def _read_hooked(self, stored: int) -> int:
        return stored ^ 0xFFFF_FFFF

    @on_write(ToyRegs.HOOKED)
    def _write_hooked(self, new: int) -> None:
        self.writes.append(new)

    @on_write(ToyRegs.COPY_COUNT)
    def _copy(self, new: int) -> None:
        try:
            self.dma.write(self.regs.COPY_TO, self.dma.read(self.regs.COPY_FROM, new))
        except Exception as error:
            self.last_error = error
            raise

    @on_write(ToyRegs.DOORBELL)
    def _ring(self, new: int) -> None:
        self.doorbells += 1

    @on_write(ToyRegs.PIN)
    def _raise(self, new: int) -> None:
        self.intx.raise_()

    @on_read(ToyRegs.READ_DMA)
    def _read_dma(self, stored: int) -> int:
        try:
            return int.from_bytes(self.dma.read(self.regs.COPY_FROM, 4), "little")
        except Exception as error:
            self.last_error = error
            raise

    @on_read(ToyRegs.BROKEN)
    def _broken(self, stored: int) -> int:
        raise RuntimeError("a bug of the model's")
