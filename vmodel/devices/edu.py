"""QEMU's educational device (QEMU's docs/specs/edu.rst), and the tutorial for writing a model.

A model has three parts: its registers, its declaration, and the hooks that run on accesses.  Read this file from top to
bottom; all of vmodel's models are built this way.
"""

from __future__ import annotations

from pydantic import Field

from vmodel.device import Intx, MmioBar, Msi, PciDevice, ResetKind, on_write, on_write_each
from vmodel.device import Params as BaseParams
from vmodel.errors import GuestError
from vmodel.regs import RO, WO, Bit, Layout, Reg32, Reg64, RegisterBank
from vmodel.span import KiB, MiB

# ---- 1. The registers ---------------------------------------------------------------------------
#
# A Layout names the bits of a register.  A field may have an access mode of its own: here, software cannot
# set COMPUTING.


class EduStatus(Layout):
    """Status register."""

    COMPUTING = Bit(0, RO, doc="a factorial is being computed")
    IRQ_FACTORIAL = Bit(7, doc="raise an interrupt when it is done")


class DmaCmd(Layout):
    """DMA command register."""

    RUN = Bit(0, doc="start; reads as 1 until the transfer is done")
    TO_RAM = Bit(1, doc="0: from guest memory to the buffer, 1: from the buffer to guest memory")
    IRQ = Bit(2, doc="raise interrupt 0x100 when done")


# A bank is a range of registers.  Everything else follows from this declaration: what the guest reads and writes,
# reset values, `vmodel regs edu`, and which accesses never reach Python (here those to ID and IRQ_STATUS, and all
# reads: no hook below is for them).
#
# The specification allows 4-byte accesses everywhere and 8-byte ones from 0x80 on.  Other accesses, and addresses
# without a register, read as all ones.


class EduRegs(RegisterBank, size=0x100, sizes=(4, 8), misaligned=False):
    """Registers of edu, at the start of BAR0."""

    ID = Reg32(0x00, RO, reset=0x0100_00ED, sizes=(4,), doc="version 1.0, 'edu'")
    LIVENESS = Reg32(0x04, sizes=(4,), doc="reads as the inverse of what was written")
    FACTORIAL = Reg32(0x08, sizes=(4,), doc="write n, read n! (mod 2**32) once COMPUTING is clear")
    STATUS = Reg32(0x20, layout=EduStatus, sizes=(4,))
    IRQ_STATUS = Reg32(0x24, RO, sizes=(4,), doc="the causes that have raised the interrupt")
    IRQ_RAISE = Reg32(0x60, WO, reset=0xFFFF_FFFF, sizes=(4,), doc="sets bits of IRQ_STATUS")
    IRQ_ACK = Reg32(0x64, WO, reset=0xFFFF_FFFF, sizes=(4,), doc="clears bits of IRQ_STATUS")
    DMA_SRC = Reg64(0x80)
    DMA_DST = Reg64(0x88)
    DMA_COUNT = Reg64(0x90, doc="in bytes")
    DMA_CMD = Reg64(0x98, layout=DmaCmd)


IRQ_FACTORIAL_DONE = 0x001
IRQ_DMA_DONE = 0x100
BUFFER_AT, BUFFER_SIZE = 0x40000, 4 * KiB


# ---- 2. The device ------------------------------------------------------------------------------


class Edu(PciDevice):
    """QEMU's educational PCI device."""

    vendor_id, device_id, class_code, revision = 0x1234, 0x11E8, 0x00FF00, 0x10
    subsystem_vendor_id, subsystem_id = 0x1AF4, 0x1100

    # Parts are declared as attributes.  On an instance, `regs` is its own bank (self.regs.ID reads a register),
    # `intx` its interrupt pin, and so on.
    bar0 = MmioBar(0, size=1 * MiB)
    regs = bar0.bank(EduRegs, at=0)
    intx = Intx(pin=1)
    msi = Msi(vectors=1)

    # The keys that a machine file may set under `params`.  pydantic checks their values and writes the error messages.
    class Params(BaseParams):
        """Parameters of edu."""

        dma_mask: int = Field(default=(1 << 28) - 1, ge=0, lt=1 << 64, description="address lines for DMA")

    # The buffer that DMA moves data to and from.  The guest cannot access it through the BAR, so it is a plain
    # bytearray and not a RAM area.  `on_reset` also runs once when the device is made.  A model has no `__init__`: it
    # makes state that resets do not change in `setup`, which runs once, before the first `on_reset`.
    def on_reset(self, kind: ResetKind) -> None:
        self.buffer = bytearray(BUFFER_SIZE)

    # ---- 3. What happens on an access -----------------------------------------------------------
    #
    # A hook names its register by object: a typo is an error when this file is imported.  `new` is the value about to
    # be stored; the value that the hook returns is stored instead.

    @on_write(EduRegs.LIVENESS)
    def _liveness(self, new: int) -> int:
        return ~new & 0xFFFF_FFFF

    # `fields` reads and sets single fields; `EduStatus(value).COMPUTING` is a field of a value.
    #
    # A hook must be short, as a guest CPU waits for it.  `defer` runs work after the access has been answered, so the
    # guest can read COMPUTING as set.  `self.after(0.010, call)` would run it 10 ms later, unless a reset cancels it.
    @on_write(EduRegs.FACTORIAL)
    def _factorial(self, new: int) -> int:
        if self.regs.fields.STATUS.COMPUTING:
            return self.regs.FACTORIAL  # busy: the write is ignored
        self.regs.fields.STATUS.COMPUTING = 1
        self.defer(lambda: self._compute(new))
        return new

    def _compute(self, n: int) -> None:
        result = 1
        while n > 1 and result:  # 34! is 0 modulo 2**32, and so are all larger factorials
            result = result * n & 0xFFFF_FFFF
            n -= 1
        self.regs.FACTORIAL = result
        self.regs.fields.STATUS.COMPUTING = 0
        if self.regs.fields.STATUS.IRQ_FACTORIAL:
            self._raise(IRQ_FACTORIAL_DONE)

    @on_write(EduRegs.IRQ_RAISE)
    def _irq_raise(self, new: int) -> None:
        self._raise(new)

    @on_write(EduRegs.IRQ_ACK)
    def _irq_ack(self, new: int) -> None:
        self.regs.IRQ_STATUS &= ~new
        self.intx.drive(self.regs.IRQ_STATUS)
        if not self.regs.IRQ_STATUS:
            self.msi.withdraw()  # a message that is still pending has lost its cause

    def _raise(self, bits: int) -> None:
        self.regs.IRQ_STATUS |= bits
        if not self.msi.enabled:
            self.intx.drive(self.regs.IRQ_STATUS)  # a level, until the guest acknowledges all bits
        elif self.regs.IRQ_STATUS:
            self.msi.fire(0)  # an edge: one message

    # One hook for several registers: `n` is the written one's position.  They must not change during a transfer.
    @on_write_each(EduRegs.DMA_SRC, EduRegs.DMA_DST, EduRegs.DMA_COUNT)
    def _dma_what(self, n: int, new: int) -> int:
        kept = (self.regs.DMA_SRC, self.regs.DMA_DST, self.regs.DMA_COUNT)[n]
        return kept if self.regs.fields.DMA_CMD.RUN else new

    @on_write(EduRegs.DMA_CMD)
    def _dma_cmd(self, new: int) -> int:
        if self.regs.fields.DMA_CMD.RUN:
            return self.regs.DMA_CMD
        if DmaCmd(new).RUN:
            self.defer(self._transfer)
        return new

    # `self.dma` accesses guest memory: through the IOMMU, if there is one, and only while the guest has set
    # Command.BusMaster.  An access that fails raises DmaFault.  There is no need to catch it here: vmodel logs and
    # counts exceptions of hooks, and the `finally` keeps the device usable.
    def _transfer(self) -> None:
        command = DmaCmd(self.regs.DMA_CMD)
        source, target, count = self.regs.DMA_SRC, self.regs.DMA_DST, self.regs.DMA_COUNT
        done = False
        try:
            if command.TO_RAM:
                at = self._in_buffer(source, count)
                self.dma.write(target & self.params.dma_mask, bytes(self.buffer[at : at + count]))
            else:
                at = self._in_buffer(target, count)
                self.buffer[at : at + count] = self.dma.read(source & self.params.dma_mask, count)
            done = True
        finally:
            self.regs.fields.DMA_CMD.RUN = 0
            if done and command.IRQ:
                self._raise(IRQ_DMA_DONE)

    def _in_buffer(self, address: int, count: int) -> int:
        """The offset of `address` in the buffer.  Never trust a value that the guest has written."""
        if not BUFFER_AT <= address <= BUFFER_AT + BUFFER_SIZE - count:
            # The guest's mistake, for which the specification defines no behaviour: nothing is moved.
            raise GuestError(f"DMA of {count:#x} bytes at {address:#x} is outside the buffer")
        return address - BUFFER_AT
