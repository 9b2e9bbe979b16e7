"""A card with four timers, whose registers are specified in card.rdl."""

from functools import partial

from vmodel.device import Intx, MmioBar, PciDevice, ResetKind, on_write, on_write_each
from vmodel.spec import load
from vmodel.timers import Timer

CardRegs = load("card.rdl")
Repeat = CardRegs.TIMER[0].CONTROL.layout.REPEAT.values


class Timers(PciDevice):
    """A card with four timers."""

    vendor_id, device_id, class_code = 0x1234, 0xCA4D, 0x088000
    bar0 = MmioBar(0, size=4096)
    regs = bar0.bank(CardRegs)
    intx = Intx()

    def on_reset(self, kind: ResetKind) -> None:
        self.running: list[Timer | None] = [None] * 4

    @on_write_each(*(timer.CONTROL for timer in CardRegs.TIMER))
    def control(self, n: int, new: int) -> int:
        control = CardRegs.TIMER[n].CONTROL.layout(new)
        if control.START:
            self.start(n)
            control.RUNNING = 1
        return int(control)

    def start(self, n: int) -> None:
        if (running := self.running[n]) is not None:
            running.cancel()
        self.running[n] = self.after(max(self.regs.TIMER[n].PERIOD, 100) / 1e6, partial(self.expired, n))

    def expired(self, n: int) -> None:
        timer = self.regs.TIMER[n]
        timer.COUNT = min(timer.COUNT + 1, 0xFFFF)
        if timer.fields.CONTROL.REPEAT == Repeat.PERIODIC:
            self.start(n)
        else:
            timer.fields.CONTROL.RUNNING = 0
        self.regs.STATUS |= 1 << n
        self.interrupt()

    @on_write(CardRegs.STATUS)
    def acknowledge(self, new: int) -> None:
        self.regs.STATUS = new  # what remains; otherwise it would be stored after the hook
        self.interrupt()

    @on_write(CardRegs.ENABLE)
    def enable(self, new: int) -> None:
        self.regs.ENABLE = new
        self.interrupt()

    def interrupt(self) -> None:
        self.intx.drive(self.regs.STATUS & self.regs.ENABLE)
