"""A card that computes the CRC-32 of guest memory."""

import zlib

from vmodel.device import MmioBar, Msi, PciDevice, on_write
from vmodel.errors import DmaFault
from vmodel.regs import RO, W1C, Bit, Layout, Reg32, Reg64, RegisterBank

LARGEST = 1 << 20


class Status(Layout):
    """The result of the last command."""

    DONE = Bit(0)
    ERROR = Bit(1, doc="memory could not be read, or LENGTH was wrong")


class CrcRegs(RegisterBank, size=0x20):
    """Registers of the card."""

    ID = Reg32(0x00, RO, reset=0xC3C32001)
    LENGTH = Reg32(0x04, doc="in bytes, up to 1 MiB; writing it starts the work")
    SOURCE = Reg64(0x08, doc="bus address")
    STATUS = Reg32(0x10, W1C, layout=Status)
    RESULT = Reg32(0x14, RO)


class Crc(PciDevice):
    """CRC-32 of guest memory, with an interrupt when it is done."""

    vendor_id, device_id, class_code = 0x1234, 0xC3C3, 0x120000
    bar0 = MmioBar(0, size=4096)
    regs = bar0.bank(CrcRegs)
    msi = Msi(vectors=1)

    @on_write(CrcRegs.LENGTH)
    def start(self, new: int) -> None:
        self.defer(lambda: self.work(new))

    def work(self, length: int) -> None:
        try:
            if not 0 < length <= LARGEST:
                raise ValueError(f"a length of {length}")
            self.regs.RESULT = zlib.crc32(self.dma.read(self.regs.SOURCE, length))
            self.regs.STATUS |= Status.DONE.mask
        except (DmaFault, ValueError) as error:
            self.log.info("%s: %s", self.name, error)
            self.regs.STATUS |= Status.DONE.mask | Status.ERROR.mask
        self.msi.fire(0)
