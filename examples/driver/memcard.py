"""A memory card: 16 blocks of 4 KiB, which the card reads and writes by DMA, one command at a time.

A command has a tag, a block and an address; its completion goes to the next of 16 entries of a ring in guest memory,
with the CRC-32 of the block's number and data.  The phase bit of an entry says whether it is new: it is 1 in the first
lap after a restart, 0 in the second, and so on.
"""

import struct
import zlib

from vmodel.device import MmioBar, Msi, PciDevice, ResetKind, on_write
from vmodel.errors import DmaFault
from vmodel.points import CompletionEvent
from vmodel.regs import RO, WO, Bit, Layout, Reg32, Reg64, RegisterBank
from vmodel.span import KiB

BLOCK, BLOCKS, ENTRIES, PAGE_LINES = 4 * KiB, 16, 16, 28
READ, WRITE = 1, 2
GOOD, WRONG_COMMAND, WRONG_BLOCK, NO_MEMORY = 0, 1, 2, 3
#: Seconds that a command takes, and a reset.
COMMAND_TIME, RESET_TIME = 0.002, 0.001


class Control(Layout):
    """Control register."""

    ENABLE = Bit(0, doc="take commands")
    RESTART = Bit(1, doc="end all commands, start again with the first entry of the ring; reads as 0")


class CardStatus(Layout):
    """Status register."""

    READY = Bit(0, doc="the card takes commands")
    BUSY = Bit(1, doc="a command or a reset is being worked on")


class MemcardRegs(RegisterBank, size=0x40):
    """Registers of the card."""

    ID = Reg32(0x00, RO, reset=0x4D43_0001, doc="which card this is, and which version")
    CONTROL = Reg32(0x04, layout=Control)
    STATUS = Reg32(0x08, RO, layout=CardStatus)
    BLOCKS = Reg32(0x0C, RO, reset=BLOCKS, doc="the number of blocks, of 4 KiB each")
    RING = Reg64(0x10, doc="bus address of 16 completions, of 16 bytes each; its upper half counts for nothing")
    DATA = Reg64(0x18, doc="bus address of the block's data")
    BLOCK = Reg32(0x20)
    TAG = Reg32(0x24, doc="for the completion, which has it in 8 bits")
    DOORBELL = Reg32(0x28, WO, doc="starts a command: 1 reads a block, 2 writes it")
    PAGE_LINES = Reg32(0x2C, RO, reset=PAGE_LINES, doc="bits of DATA that the card has, above the lower 12")


class Memcard(PciDevice):
    """A memory card with 64 KiB."""

    vendor_id, device_id, class_code = 0x1234, 0x3E3C, 0x018000
    bar0 = MmioBar(0, size=4 * KiB)
    regs = bar0.bank(MemcardRegs)
    msi = Msi(vectors=1)

    def setup(self) -> None:
        """The card's memory, which no reset changes; block 0 begins with a label."""
        self.flash = bytearray(BLOCK * BLOCKS)
        label = b"MEMCARD 64 KiB"
        self.flash[: len(label)] = label

    def on_reset(self, kind: ResetKind) -> None:
        """The card drops its commands, and starts with the first entry of the ring."""
        self._forget()

    def _forget(self) -> None:
        self.entry, self.phase = 0, 1
        self.epoch = getattr(self, "epoch", 0) + 1  # commands of earlier ones end without a completion

    @on_write(MemcardRegs.CONTROL)
    def _control(self, new: int) -> int:
        status = self.regs.fields.STATUS
        if Control(new).RESTART:
            self._forget()
            status.READY, status.BUSY = 0, 1
            self.after(RESET_TIME, self._has_reset)
        elif not status.BUSY:
            status.READY = Control(new).ENABLE
        return new & ~Control(RESTART=1).value

    def _has_reset(self) -> None:
        self.regs.fields.STATUS.BUSY = 0

    @on_write(MemcardRegs.DOORBELL)
    def _doorbell(self, new: int) -> None:
        self.points.doorbell(lambda _: self._start(new), queue=0)

    def _start(self, opcode: int) -> None:
        status = self.regs.fields.STATUS
        if not status.READY or status.BUSY:
            self.log.info("%s: a command, but the card is not ready", self.name)
            return
        status.BUSY = 1
        epoch, block, tag, address = (
            self.epoch,
            self.regs.BLOCK,
            self.regs.TAG & 0xFF,
            self.regs.DATA & ((1 << 12 + PAGE_LINES) - 1),
        )
        self.after(COMMAND_TIME, lambda: self._work(epoch, opcode, block, tag, address))

    def _work(self, epoch: int, opcode: int, block: int, tag: int, address: int) -> None:
        if epoch != self.epoch:
            return
        result, crc = self._move(opcode, block, address)
        self.regs.fields.STATUS.BUSY = 0
        self.points.completion(
            lambda said: self._complete(said, block, crc, opcode), queue=0, id=tag, status=result, opcode=opcode
        )

    def _move(self, opcode: int, block: int, address: int) -> tuple[int, int]:
        """Carries out a command; returns its status and the CRC."""
        if opcode not in (READ, WRITE):
            return WRONG_COMMAND, 0
        if block >= BLOCKS:
            return WRONG_BLOCK, 0
        at = slice(block * BLOCK, (block + 1) * BLOCK)
        data = bytes(self.flash[at])
        try:
            if opcode == WRITE:
                data = self.dma.read(address, BLOCK)
                self.flash[at] = data
            else:
                self.dma.write(address, data)
        except DmaFault as error:
            self.log.info("%s: block %d: %s", self.name, block, error)
            return NO_MEMORY, 0
        return GOOD, zlib.crc32(struct.pack("<I", block) + data)

    def _complete(self, said: CompletionEvent, block: int, crc: int, opcode: int) -> None:
        status = (said.status or 0) << 1 | self.phase
        address = (self.regs.RING & 0xFFFF_FFFF) + 16 * self.entry
        self.entry = (self.entry + 1) % ENTRIES
        self.phase ^= self.entry == 0
        try:
            self.dma.write(address, struct.pack("<IIBBH4x", crc, block, opcode, said.id & 0xFF, status & 0xFFFF))
        except DmaFault as error:
            self.log.info("%s: its ring: %s", self.name, error)
        self.msi.fire(0)
