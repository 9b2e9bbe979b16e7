"""A card that computes the CRC-32 of guest memory.  Its registers are specified in crc.rdl."""

import zlib

from vmodel.device import MmioBar, Msi, PciDevice, on_write
from vmodel.errors import DmaFault
from vmodel.spec import load

LARGEST = 1 << 20
#: The card's registers.
CrcRegs = load("crc.rdl")
Status = CrcRegs.STATUS.layout


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
            self.regs.STATUS = Status(DONE=1)
        except (DmaFault, ValueError) as error:
            self.log.info("%s: %s", self.name, error)
            self.regs.STATUS = Status(DONE=1, ERROR=1)
        self.msi.fire(0)
