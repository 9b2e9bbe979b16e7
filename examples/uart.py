"""A serial card with one 16550A, whose line is a pty of the host.  Linux's 8250_pci takes it for QEMU's pci-serial.

    vmodel guest examples/uart.toml -i -- sh        # ls /sys/bus/pci/devices/0000:00:03.0/tty names the port
    vmodel call examples/uart.toml uart0.line       # the other end, as /dev/pts/5, for screen or minicom
    vmodel call examples/uart.toml uart0.feed '"hello\\n"'

Registers and interrupts: the data sheet of TI's PC16550D, section 8.  The line takes no time.
"""

from __future__ import annotations

import os
import tty
from collections import deque

from vmodel.device import Intx, IoBar, PciDevice, ResetKind, on_read, on_write, outside
from vmodel.device.watches import Watch
from vmodel.regs import RESERVED, RO, RW, Bit, Bits, Layout, Reg8, RegisterBank

#: Bytes of the receiver's FIFO.
FIFO = 16


class Enable(Layout):
    RECEIVED = Bit(0, doc="interrupt: there is data")
    EMPTY = Bit(1, doc="interrupt: the transmitter is empty")
    LINE = Bit(2, doc="interrupt: errors of the line")
    MODEM = Bit(3, doc="interrupt: signals of the modem")
    ZERO = Bits(4, 7, RESERVED)


class LineControl(Layout):
    DIVISOR = Bit(7, doc="the first two registers are the divisor of the baud rate")


class ModemControl(Layout):
    DTR = Bit(0)
    RTS = Bit(1)
    OUT1 = Bit(2)
    OUT2 = Bit(3)
    LOOP = Bit(4, doc="what is sent is received, and outputs are inputs")
    ZERO = Bits(5, 7, RESERVED)


class LineStatus(Layout):
    READY = Bit(0, doc="there is data")
    EMPTY = Bit(5, doc="the transmitter takes a byte")
    IDLE = Bit(6, doc="all bytes are sent")


class UartRegs(RegisterBank, size=8, sizes=(1,)):
    DATA = Reg8(0, RW, doc="read: takes the next byte; write: sends one; or the divisor's low byte")
    ENABLE = Reg8(1, RW, layout=Enable, doc="or the divisor's high byte")
    ID = Reg8(2, RW, reset=0x01, doc="read: which interrupt; write: the FIFOs")
    LINE_CONTROL = Reg8(3, RW, layout=LineControl)
    MODEM_CONTROL = Reg8(4, RW, layout=ModemControl)
    LINE_STATUS = Reg8(5, RO, reset=0x60, layout=LineStatus)
    MODEM_STATUS = Reg8(6, RO, reset=0xB0)
    SCRATCH = Reg8(7, RW)


class Uart(PciDevice):
    """A serial card with a 16550A."""

    vendor_id, device_id, class_code = 0x1B36, 0x0002, 0x070002
    subsystem_vendor_id, subsystem_id = 0x1AF4, 0x1100
    bar0 = IoBar(0, size=8)
    regs = bar0.bank(UartRegs)
    irq = Intx()

    _ours = _theirs = -1
    _watch: Watch | None = None

    def on_reset(self, kind: ResetKind) -> None:
        self.received: deque[int] = deque()
        self.divisor = 0
        self.has_fifos = False
        #: The transmitter has become empty, and no interrupt has said so yet.
        self.news = False
        self._listen()

    # ---- the line -------------------------------------------------------------------------------

    def open(self) -> None:
        # Our fd of the other end keeps the line up while nobody else has it open.
        self._ours, self._theirs = os.openpty()
        tty.setraw(self._theirs)
        for end in (self._ours, self._theirs):
            os.set_blocking(end, False)
        self._listen()

    def close(self) -> None:
        super().close()
        for end in (self._ours, self._theirs):
            if end >= 0:
                os.close(end)
        self._ours = self._theirs = -1

    @outside
    def line(self) -> str:
        """The path of the other end."""
        return os.ttyname(self._theirs)

    @outside
    def feed(self, text: str) -> int:
        """Text arrives, as if it were typed at the other end; returns how many bytes there was room for."""
        try:
            return os.write(self._theirs, text.encode())
        except BlockingIOError:
            return 0

    def _listen(self) -> None:
        if self._watch is None and self._ours >= 0:
            self._watch = self.watch(self._ours, self._incoming)

    def _incoming(self) -> None:
        """Fills the FIFO.  What it has no room for waits in the pty, which is not watched until then."""
        room = FIFO - len(self.received)
        self.received.extend(os.read(self._ours, room) if room else b"")
        if len(self.received) == FIFO and self._watch is not None:
            self._watch.cancel()
            self._watch = None
        self._update()

    def _send(self, byte: int) -> None:
        if self.regs.fields.MODEM_CONTROL.LOOP:
            if len(self.received) < FIFO:
                self.received.append(byte)
            return
        try:
            os.write(self._ours, bytes([byte]))
        except BlockingIOError:
            self.log.warning("%s: a byte is lost: nobody reads %s", self.name, self.line())

    # ---- the guest's side -----------------------------------------------------------------------

    def _update(self) -> None:
        """Status, interrupt and its cause, the most important first."""
        enable = self.regs.fields.ENABLE
        self.regs.LINE_STATUS = LineStatus(READY=bool(self.received), EMPTY=1, IDLE=1)
        cause = 0x04 if self.received and enable.RECEIVED else 0x02 if self.news and enable.EMPTY else 0x01
        self.regs.ID = cause | (0xC0 if self.has_fifos else 0)
        self.irq.drive(cause != 0x01)

    @on_read(UartRegs.DATA)
    def _take(self, stored: int) -> int:
        if self.regs.fields.LINE_CONTROL.DIVISOR:
            return self.divisor & 0xFF
        value = self.received.popleft() if self.received else 0
        self._listen()
        self._update()
        return value

    @on_write(UartRegs.DATA)
    def _put(self, new: int) -> None:
        if self.regs.fields.LINE_CONTROL.DIVISOR:
            self.divisor = self.divisor & 0xFF00 | new
            return
        self._send(new)
        self.news = True
        self._update()

    @on_read(UartRegs.ENABLE)
    def _enabled(self, stored: int) -> int:
        return self.divisor >> 8 if self.regs.fields.LINE_CONTROL.DIVISOR else stored

    @on_write(UartRegs.ENABLE)
    def _enable(self, new: int) -> int | None:
        before = self.regs.ENABLE
        if self.regs.fields.LINE_CONTROL.DIVISOR:
            self.divisor = self.divisor & 0xFF | new << 8
            return before
        self.news |= bool(new & ~before & Enable.EMPTY.mask)
        self.regs.ENABLE = new
        self._update()
        return None

    @on_read(UartRegs.ID)
    def _identify(self, stored: int) -> int:
        if stored & 0x0F == 0x02:
            self.news = False
            self._update()
        return stored

    @on_write(UartRegs.ID)
    def _control_fifos(self, new: int) -> None:
        if (new & 1) != self.has_fifos or new & 2:
            self.received.clear()
            self._listen()
        self.has_fifos = bool(new & 1)
        self._update()

    @on_write(UartRegs.MODEM_CONTROL)
    def _control_modem(self, new: int) -> None:
        self.regs.MODEM_CONTROL = new
        control = self.regs.fields.MODEM_CONTROL
        looped = control.RTS << 4 | control.DTR << 5 | control.OUT1 << 6 | control.OUT2 << 7
        self.regs.MODEM_STATUS = looped if control.LOOP else 0xB0  # the other end is there: CTS, DSR, DCD
