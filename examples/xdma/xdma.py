"""AMD's (Xilinx's) XDMA: the DMA engine of many FPGA cards, "DMA/Bridge Subsystem for PCI Express" (PG195).

A card of this kind has a memory of its own, which the FPGA's logic reaches over AXI.  Channels copy between it and the
host's memory: H2C (host to card) and C2H (card to host).  A driver writes a list of descriptors into the host's memory
and starts a channel.  When the list is done the channel interrupts, or writes into the host's memory (writeback).

Left out, as the driver's tests do not use it: AXI-Stream, credits, performance counters, the bypass BAR, addresses that
do not increment, alignment, migration while a channel runs.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from pydantic import Field

from vmodel.device import (
    Intx,
    MmioBar,
    Msi,
    Msix,
    PciDevice,
    Pcie,
    ResetKind,
    on_read_each,
    on_write,
    on_write_each,
    outside,
)
from vmodel.device import Params as BaseParams
from vmodel.errors import DmaFault, GuestError, Reason
from vmodel.register_files import Array, FileArray, RegisterFile
from vmodel.regs import RO, W1C, WO, Bit, Bits, Layout, Reg8, Reg32, RegisterBank
from vmodel.span import KiB, MiB

# ---- The registers: BAR1.  Bits 15 to 12 of an offset are the block, bits 11 to 8 the channel ------------------------

#: What a block's identifier consists of: this, the number of the block, the channel, and the version of the hardware.
ID, VERSION = 0x1FC0_0000, 6
MOST_CHANNELS = 4
MOST_LINES = 16


class Status(Layout):
    """What a channel does, and what has happened.  Bits 1 to 23 are events."""

    BUSY = Bit(0, RO)
    DESCRIPTOR_STOPPED = Bit(1, doc="a descriptor with Stop is done")
    DESCRIPTOR_COMPLETED = Bit(2, doc="a descriptor with Completed is done")
    ALIGN_MISMATCH = Bit(3)
    MAGIC_STOPPED = Bit(4, doc="a descriptor lacks the magic number")
    INVALID_LENGTH = Bit(5)
    IDLE_STOPPED = Bit(6, doc="Run was cleared, and the channel has stopped")
    READ_ERROR = Bits(9, 13, doc="of the source: H2C as DESCRIPTOR_ERROR, C2H as WRITE_ERROR")
    WRITE_ERROR = Bits(14, 18, doc="of the target, H2C only: 1 no such address, 2 it is not for writing")
    DESCRIPTOR_ERROR = Bits(19, 23, doc="of a fetch: 1 unsupported request, 2 completer abort, 8 poisoned")


EVENTS = 0xFF_FFFE
NO_SUCH_ADDRESS = 1


class Control(Layout):
    """How a channel runs."""

    RUN = Bit(0)
    RECORDED = Bits(1, 23, doc="the events that Status gets")
    WRITEBACK = Bit(26, doc="the number of completed descriptors is written into the host's memory")


class Channel(RegisterBank, size=0x100):
    """A channel."""

    ID = Reg32(0x00, RO)
    CONTROL = Reg32(0x04, layout=Control)
    CONTROL_SET = Reg32(0x08, WO)
    CONTROL_CLEAR = Reg32(0x0C, WO)
    STATUS = Reg32(0x40, W1C, layout=Status)
    STATUS_TAKE = Reg32(0x44, RO, doc="Status, whose events are cleared by the read")
    COMPLETED = Reg32(0x48, RO, doc="descriptors since Run was set")
    ALIGNMENTS = Reg32(0x4C, RO, reset=0x0001_0140, doc="addresses and lengths: any; bits of an address: 64")
    WRITEBACK_LOW = Reg32(0x88)
    WRITEBACK_HIGH = Reg32(0x8C)
    INTERRUPT = Reg32(0x90, doc="the events that interrupt")
    INTERRUPT_SET = Reg32(0x94, WO)
    INTERRUPT_CLEAR = Reg32(0x98, WO)


class Sgdma(RegisterBank, size=0x100):
    """Where a channel's list begins."""

    ID = Reg32(0x00, RO)
    FIRST_LOW = Reg32(0x80)
    FIRST_HIGH = Reg32(0x84)
    ADJACENT = Reg32(0x88, doc="the number of descriptors that follow the first one directly")


class IrqBlock(RegisterBank, size=0x100):
    """Interrupts: lines of the card's own logic (user), and one for each channel, H2C first."""

    ID = Reg32(0x00, RO, reset=ID | 2 << 16 | VERSION)
    USER_ENABLE = Reg32(0x04)
    USER_ENABLE_SET = Reg32(0x08, WO)
    USER_ENABLE_CLEAR = Reg32(0x0C, WO)
    CHANNEL_ENABLE = Reg32(0x10)
    CHANNEL_ENABLE_SET = Reg32(0x14, WO)
    CHANNEL_ENABLE_CLEAR = Reg32(0x18, WO)
    USER_REQUEST = Reg32(0x40, RO, doc="pending and enabled")
    CHANNEL_REQUEST = Reg32(0x44, RO, doc="pending and enabled")
    USER_PENDING = Reg32(0x48, RO)
    CHANNEL_PENDING = Reg32(0x4C, RO)
    USER_VECTOR = Array(Reg8(0x80), MOST_LINES)
    CHANNEL_VECTOR = Array(Reg8(0xA0), 2 * MOST_CHANNELS)


class ConfigBlock(RegisterBank, size=0x100):
    """The driver knows BAR1 by this identifier."""

    ID = Reg32(0x00, RO, reset=ID | 3 << 16 | VERSION)


class XdmaRegs(RegisterBank, size=0x8000):
    """XDMA's registers."""

    H2C = FileArray(Channel, MOST_CHANNELS, at=0x0000)
    C2H = FileArray(Channel, MOST_CHANNELS, at=0x1000)
    IRQ = RegisterFile(IrqBlock, at=0x2000)
    CONFIG = RegisterFile(ConfigBlock, at=0x3000)
    H2C_SGDMA = FileArray(Sgdma, MOST_CHANNELS, at=0x4000)
    C2H_SGDMA = FileArray(Sgdma, MOST_CHANNELS, at=0x5000)


class UserRegs(RegisterBank, size=0x10):
    """BAR0, the FPGA's own logic.  It differs from card to card; here it is just enough for tests."""

    SCRATCH = Reg32(0x00)
    LINES = Reg32(0x04, doc="the levels of the user interrupt lines")


CHANNELS = (*XdmaRegs.H2C, *XdmaRegs.C2H)

# ---- A channel at work ----------------------------------------------------------------------------------------------

MAGIC = 0xAD4B
#: Bytes that a channel moves before others have their turn, and what a short descriptor counts for.
TURN, LEAST = 1 * MiB, 4 * KiB
#: A request that fails, as the channel gets to know it; an IOMMU that refuses one answers with Unsupported Request.
ANSWERS = {Reason.COMPLETER_ABORT: 2, Reason.POISONED: 8}
UNSUPPORTED_REQUEST = 1


#: A descriptor in the host's memory, and its flags.
DESCRIPTOR = struct.Struct("<IIQQQ")
STOP, COMPLETED = 1 << 0, 1 << 1


class Descriptor(NamedTuple):
    """A copy that a channel is to make."""

    control: int  # flags in bits 0 to 7; how many adjacent ones follow the next one; the magic number in bits 16 to 31
    length: int
    source: int
    target: int
    next: int

    @property
    def adjacent(self) -> int:
        return self.control >> 8 & 0x3F


class Stopped(Exception):
    """A channel cannot go on; the argument has the bits for Status."""

    def __init__(self, events: int) -> None:
        super().__init__(f"{events:#x}")
        self.events = events


class Engine:
    """A channel of a card."""

    def __init__(self, card: Xdma, regs: Channel, sgdma: Sgdma, *, to_card: bool) -> None:
        self.card, self.regs, self.sgdma, self.to_card = card, regs, sgdma, to_card
        self.reset()

    def reset(self) -> None:
        self.scheduled = False
        self.block: list[Descriptor] = []
        self.address = self.adjacent = 0

    @property
    def busy(self) -> bool:
        return bool(Status(self.regs.STATUS).BUSY)

    def control(self, new: int) -> None:
        """Stores a new value of Control: starts or stops the channel."""
        old, self.regs.CONTROL = self.regs.CONTROL, new
        if Control(new).RUN and not Control(old).RUN:
            self.regs.STATUS = Status.BUSY.mask  # events of the last list are gone
            self.regs.COMPLETED = 0
            self.card.interrupts()
            self.block = []
            self.address = self.sgdma.FIRST_HIGH << 32 | self.sgdma.FIRST_LOW
            self.adjacent = self.sgdma.ADJACENT & 0x3F
            self.schedule()
        elif Control(old).RUN and not Control(new).RUN and self.busy:
            self.record(Status.IDLE_STOPPED.mask, busy=False)

    def schedule(self) -> None:
        if not self.scheduled:
            self.scheduled = True
            self.card.defer(self.work)

    def work(self) -> None:
        """Carries out descriptors until the list ends or others have their turn: a list may be a circle."""
        self.scheduled = False
        moved = 0
        while self.busy and moved < TURN:
            try:
                descriptor = self.fetch()
                self.copy(descriptor)
            except Stopped as error:
                self.record(error.events, busy=False)
                self.write_back(failed=True)
                return
            moved += max(descriptor.length, LEAST)
            self.complete(descriptor)
        if self.busy:
            self.schedule()

    def fetch(self) -> Descriptor:
        """The next descriptor.  Those that are adjacent are read at once."""
        if not self.block:
            try:
                data = self.card.dma.read(self.address, (1 + self.adjacent) * DESCRIPTOR.size)
            except DmaFault as fault:
                code = ANSWERS.get(fault.reason, UNSUPPORTED_REQUEST)
                raise Stopped(Status.DESCRIPTOR_ERROR.put(0, code)) from fault
            self.block = [Descriptor(*fields) for fields in DESCRIPTOR.iter_unpack(data)]
        descriptor = self.block.pop(0)
        if descriptor.control >> 16 != MAGIC:
            raise Stopped(Status.MAGIC_STOPPED.mask)
        self.address, self.adjacent = descriptor.next, descriptor.adjacent
        return descriptor._replace(length=descriptor.length & 0xFFF_FFFF)

    def copy(self, descriptor: Descriptor) -> None:
        length, memory, dma = descriptor.length, self.card.axi, self.card.dma
        at = descriptor.target if self.to_card else descriptor.source
        if at + length > len(memory):
            error = Status.WRITE_ERROR if self.to_card else Status.READ_ERROR
            raise Stopped(error.put(0, NO_SUCH_ADDRESS))
        if self.to_card:
            try:
                memory[at : at + length] = dma.read(descriptor.source, length)
            except DmaFault as fault:
                code = ANSWERS.get(fault.reason, UNSUPPORTED_REQUEST)
                raise Stopped(Status.READ_ERROR.put(0, code)) from fault
        else:
            self.post(descriptor.target, memory[at : at + length])

    def post(self, address: int, data: bytes | bytearray) -> None:
        """Writes into the host's memory.  A write on PCI Express has no answer: a card never learns that one failed."""
        try:
            self.card.dma.write(address, data)
        except DmaFault as fault:
            self.card.log.info("%s: a write is lost: %s", self.card.name, fault)

    def complete(self, descriptor: Descriptor) -> None:
        self.regs.COMPLETED = self.regs.COMPLETED + 1 & 0xFFFF_FFFF
        stops, completed = descriptor.control & STOP, descriptor.control & COMPLETED
        events = Status.DESCRIPTOR_STOPPED.mask if stops else 0
        if completed:
            events |= Status.DESCRIPTOR_COMPLETED.mask
        if events:
            self.record(events, busy=not stops)
        if completed:
            self.write_back()

    def record(self, events: int, *, busy: bool) -> None:
        regs = self.regs
        regs.STATUS = Status.BUSY.put(regs.STATUS, int(busy)) | events & Control.RECORDED.mask & regs.CONTROL
        self.card.interrupts()

    def write_back(self, *, failed: bool = False) -> None:
        regs = self.regs
        if Control(regs.CONTROL).WRITEBACK:
            count = regs.COMPLETED & 0xFF_FFFF | failed << 31
            self.post(regs.WRITEBACK_HIGH << 32 | regs.WRITEBACK_LOW, count.to_bytes(4, "little"))


# ---- The card -------------------------------------------------------------------------------------------------------


class Xdma(PciDevice):
    """An FPGA card with AMD's XDMA, memory mapped."""

    vendor_id, device_id, class_code = 0x10EE, 0x903F, 0x058000
    subsystem_vendor_id, subsystem_id = 0x10EE, 0x0007

    bar0 = MmioBar(0, size=4 * KiB, fill=0)
    user = bar0.bank(UserRegs)
    bar1 = MmioBar(1, size=64 * KiB, fill=0)
    regs = bar1.bank(XdmaRegs)
    pcie = Pcie()
    msix = Msix(vectors=32, bar=bar1, table_offset=0x8000, pba_offset=0x8FE0)
    msi = Msi(vectors=1)
    intx = Intx()

    class Params(BaseParams):
        """Parameters of XDMA."""

        channels: int = Field(default=2, ge=1, le=MOST_CHANNELS, description="of each direction")
        memory: int = Field(default=16 * MiB, ge=4 * KiB, le=256 * MiB, description="the card's own, in bytes")

    def setup(self) -> None:
        regs, there = self.regs, range(self.params.channels)
        h2c = [Engine(self, regs.H2C[n], regs.H2C_SGDMA[n], to_card=True) for n in there]
        c2h = [Engine(self, regs.C2H[n], regs.C2H_SGDMA[n], to_card=False) for n in there]
        #: In the order of their interrupts.
        self.engines = h2c + c2h
        #: By number in CHANNELS; the others are not there.
        self.by_channel = dict(enumerate(h2c)) | dict(enumerate(c2h, MOST_CHANNELS))

    def on_reset(self, kind: ResetKind) -> None:
        for number, engine in self.by_channel.items():
            block, channel = divmod(number, MOST_CHANNELS)
            engine.reset()
            engine.regs.ID = ID | block << 16 | channel << 8 | VERSION
            engine.sgdma.ID = ID | 4 + block << 16 | channel << 8 | VERSION
        if kind is ResetKind.DEVICE:
            self.axi = bytearray(self.params.memory)

    # Registers of channels

    @on_write_each(*(channel.CONTROL for channel in CHANNELS))
    def _control(self, n: int, new: int) -> int:
        if n not in self.by_channel:
            return 0
        self.by_channel[n].control(new)
        return new

    @on_write_each(*(channel.CONTROL_SET for channel in CHANNELS))
    def _control_set(self, n: int, new: int) -> None:
        if n in self.by_channel:
            self.by_channel[n].control(self.by_channel[n].regs.CONTROL | new)

    @on_write_each(*(channel.CONTROL_CLEAR for channel in CHANNELS))
    def _control_clear(self, n: int, new: int) -> None:
        if n in self.by_channel:
            self.by_channel[n].control(self.by_channel[n].regs.CONTROL & ~new)

    @on_write_each(*(channel.STATUS for channel in CHANNELS))
    def _status(self, n: int, new: int) -> None:
        self._channel(n).STATUS = new
        self.interrupts()

    @on_read_each(*(channel.STATUS_TAKE for channel in CHANNELS))
    def _status_take(self, n: int, stored: int) -> int:
        channel = self._channel(n)
        status, channel.STATUS = channel.STATUS, channel.STATUS & ~EVENTS
        self.interrupts()
        return status

    @on_write_each(*(channel.INTERRUPT for channel in CHANNELS))
    def _interrupt(self, n: int, new: int) -> None:
        self._channel(n).INTERRUPT = new
        self.interrupts()

    @on_write_each(*(channel.INTERRUPT_SET for channel in CHANNELS))
    def _interrupt_set(self, n: int, new: int) -> None:
        self._interrupt(n, self._channel(n).INTERRUPT | new)

    @on_write_each(*(channel.INTERRUPT_CLEAR for channel in CHANNELS))
    def _interrupt_clear(self, n: int, new: int) -> None:
        self._interrupt(n, self._channel(n).INTERRUPT & ~new)

    def _channel(self, n: int) -> Channel:
        return (*self.regs.H2C, *self.regs.C2H)[n]

    # Interrupts

    @on_write(XdmaRegs.IRQ.USER_ENABLE)
    def _user_enable(self, new: int) -> None:
        self.regs.IRQ.USER_ENABLE = new
        self.interrupts()

    @on_write(XdmaRegs.IRQ.USER_ENABLE_SET)
    def _user_enable_set(self, new: int) -> None:
        self._user_enable(self.regs.IRQ.USER_ENABLE | new)

    @on_write(XdmaRegs.IRQ.USER_ENABLE_CLEAR)
    def _user_enable_clear(self, new: int) -> None:
        self._user_enable(self.regs.IRQ.USER_ENABLE & ~new)

    @on_write(XdmaRegs.IRQ.CHANNEL_ENABLE)
    def _channel_enable(self, new: int) -> None:
        self.regs.IRQ.CHANNEL_ENABLE = new
        self.interrupts()

    @on_write(XdmaRegs.IRQ.CHANNEL_ENABLE_SET)
    def _channel_enable_set(self, new: int) -> None:
        self._channel_enable(self.regs.IRQ.CHANNEL_ENABLE | new)

    @on_write(XdmaRegs.IRQ.CHANNEL_ENABLE_CLEAR)
    def _channel_enable_clear(self, new: int) -> None:
        self._channel_enable(self.regs.IRQ.CHANNEL_ENABLE & ~new)

    @on_write(UserRegs.LINES)
    def _lines(self, new: int) -> int:
        self.user.LINES = new & (1 << MOST_LINES) - 1
        self.interrupts()
        return self.user.LINES

    @outside
    def line(self, number: int, level: bool) -> None:
        """Sets the level of a user interrupt line."""
        if not 0 <= number < MOST_LINES:
            raise GuestError(f"line {number}")
        self._lines(self.user.LINES & ~(1 << number) | level << number)

    def interrupts(self) -> None:
        """Recomputes the interrupts, all of which are levels; a message is sent when a request appears."""
        irq = self.regs.IRQ
        irq.USER_PENDING = self.user.LINES
        irq.CHANNEL_PENDING = sum(
            1 << n for n, engine in enumerate(self.engines) if engine.regs.STATUS & engine.regs.INTERRUPT & EVENTS
        )
        before, irq.USER_REQUEST = irq.USER_REQUEST, irq.USER_PENDING & irq.USER_ENABLE
        self._messages(before, irq.USER_REQUEST, irq.USER_VECTOR)
        before, irq.CHANNEL_REQUEST = irq.CHANNEL_REQUEST, irq.CHANNEL_PENDING & irq.CHANNEL_ENABLE
        self._messages(before, irq.CHANNEL_REQUEST, irq.CHANNEL_VECTOR)
        messages = self.msix.enabled or self.msi.enabled
        self.intx.drive(0 if messages else irq.USER_REQUEST | irq.CHANNEL_REQUEST)

    def _messages(self, before: int, now: int, vectors: memoryview) -> None:
        for n, vector in enumerate(vectors):
            if not (before ^ now) >> n & 1:
                continue
            requested = now >> n & 1
            if self.msix.enabled:
                (self.msix.fire if requested else self.msix.withdraw)(vector & 0x1F)
            elif self.msi.enabled and requested:
                self.msi.fire(0)
