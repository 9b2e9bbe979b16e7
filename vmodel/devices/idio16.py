"""ACCES PCI-IDIO-16: 16 isolated inputs and 16 FET outputs, driven by Linux's gpio-pci-idio-16.

Registers as in the card's manual: eight 8-bit ports in BAR2.  Some have different functions on read and on write.
"""

from __future__ import annotations

from collections.abc import Callable

from vmodel.device import Intx, IoBar, PciDevice, ResetKind, on_read, on_write
from vmodel.regs import RO, WO, Bit, Layout, Reg8, RegisterBank


class IrqStatus(Layout):
    """Interrupt status."""

    LOW = Bit(0, doc="one of inputs 0-7 has changed")
    HIGH = Bit(1, doc="one of inputs 8-15 has changed")
    PENDING = Bit(2, doc="the interrupt is asserted")


class Idio16Regs(RegisterBank, size=8, sizes=(1,)):
    """Ports of the card."""

    OUT_LOW = Reg8(0, doc="FET outputs 0-7")
    IN_LOW = Reg8(1, RO, doc="read: inputs 0-7; write: clear the interrupt")
    IRQ_CTL = Reg8(2, RO, doc="read: enable interrupts; write: disable them")
    FILTER_CTL = Reg8(3, RO, doc="read: activate the input filters; write: deactivate them")
    OUT_HIGH = Reg8(4, doc="FET outputs 8-15")
    IN_HIGH = Reg8(5, RO, doc="inputs 8-15")
    IRQ_STATUS = Reg8(6, RO, layout=IrqStatus)
    UNUSED = Reg8(7, WO)


class Idio16(PciDevice):
    """ACCES PCI-IDIO-16 isolated digital I/O card."""

    vendor_id, device_id, class_code = 0x494F, 0x0DC8, 0x110000
    subsystem_vendor_id, subsystem_id = vendor_id, device_id

    bar2 = IoBar(2, size=8)
    regs = bar2.bank(Idio16Regs, at=0)
    intx = Intx(pin=1)

    #: Called with all 16 outputs when one changes, on the device's thread.
    on_output: Callable[[int], None] | None = None

    irq_enabled = False
    filtered = True

    def on_reset(self, kind: ResetKind) -> None:
        self.irq_enabled = False
        self.filtered = True

    # ---- the outside world ----------------------------------------------------------------------

    @property
    def outputs(self) -> int:
        """All 16 outputs, output 0 in bit 0."""
        return self.regs.OUT_LOW | self.regs.OUT_HIGH << 8

    @property
    def inputs(self) -> int:
        """All 16 inputs, input 0 in bit 0."""
        return self.regs.IN_LOW | self.regs.IN_HIGH << 8

    def set_inputs(self, value: int) -> None:
        """Sets the levels of all 16 inputs, input 0 in bit 0.  Any thread.  ValueError: more than 16 bits."""
        if not 0 <= value < 1 << 16:
            raise ValueError(f"inputs {value:#x} are more than 16 bits")
        self.defer(lambda: self._drive(value))

    def _drive(self, value: int) -> None:
        changed = value ^ self.inputs
        self.regs.IN_LOW, self.regs.IN_HIGH = value & 0xFF, value >> 8
        if changed and self.irq_enabled:
            self.regs.IRQ_STATUS = IrqStatus(LOW=bool(changed & 0xFF), HIGH=bool(changed >> 8), PENDING=1)
            self.intx.raise_()

    # ---- the guest's side -----------------------------------------------------------------------

    @on_write(Idio16Regs.OUT_LOW)
    def _out_low(self, new: int) -> None:
        self.regs.OUT_LOW = new
        self._report_outputs()

    @on_write(Idio16Regs.OUT_HIGH)
    def _out_high(self, new: int) -> None:
        self.regs.OUT_HIGH = new
        self._report_outputs()

    def _report_outputs(self) -> None:
        if self.on_output:
            self.on_output(self.outputs)

    @on_write(Idio16Regs.IN_LOW)
    def _clear(self, new: int) -> None:
        self.regs.IRQ_STATUS = 0
        self.intx.lower()

    @on_read(Idio16Regs.IRQ_CTL)
    def _enable(self, stored: int) -> int:
        self.irq_enabled = True
        return 0

    @on_write(Idio16Regs.IRQ_CTL)
    def _disable(self, new: int) -> None:
        self.irq_enabled = False

    @on_read(Idio16Regs.FILTER_CTL)
    def _filter(self, stored: int) -> int:
        self.filtered = True
        return 0

    @on_write(Idio16Regs.FILTER_CTL)
    def _no_filter(self, new: int) -> None:
        self.filtered = False
