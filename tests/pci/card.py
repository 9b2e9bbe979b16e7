"""A function with all that may signal an interrupt, driven as a kernel does it."""

from __future__ import annotations

from typing import ClassVar

from vmodel.device import Intx, IoBar, MmioBar, Msi, Msix, PciDevice, Pcie, Pm
from vmodel.pci.extcaps import Acs, Aer, Ats, Dsn, Pasid, Pri
from vmodel.regs import Reg32, RegisterBank
from vmodel.testing.fakes import FakeDriver, FakeMemory
from vmodel.vfio_user.client import EventFd
from vmodel.vfio_user.wire import Irq, IrqSetFlags

IO, MEMORY, MASTER, INTX_DISABLE = 1, 2, 4, 1 << 10
D0, D3HOT = 0, 3
MSI, MSIX = 0x05, 0x11


class CardRegs(RegisterBank, size=0x1000):
    """One plain register."""

    PLAIN = Reg32(0, reset=0x1234_5678)


class Card(PciDevice):
    """PM (a context that D3hot keeps), INTx, MSI with masks, MSI-X."""

    vendor_id, device_id, class_code = 0x1B36, 0x0F10, 0x058000
    bar0 = MmioBar(0, size=0x1000, fill=0)
    regs = bar0.bank(CardRegs)
    intx: Intx = Intx()
    pm = Pm(no_soft_reset=True)
    msi = Msi(vectors=4, per_vector_mask=True)
    msix = Msix(vectors=16, own_bar=4)
    pcie = Pcie()


class SoftResetCard(Card):
    """Whose way from D3hot to D0 is a reset."""

    pm = Pm()


class Endpoint(PciDevice):
    """Each kind of BAR and each capability; no register does anything."""

    vendor_id, device_id, class_code, revision = 0x1B36, 0x0F11, 0x058012, 0x34
    subsystem_vendor_id, subsystem_id = 0x1AF4, 0x1101
    rom = bytes(range(256)) * 64
    bar0 = MmioBar(0, size=0x80, fill=0)
    bar1 = IoBar(1, size=4, fill=0)
    bar2 = MmioBar(2, size=1 << 33, prefetchable=True)
    bar4 = IoBar(4, size=256)
    intx = Intx(pin=2)
    pm = Pm()
    msi = Msi(vectors=4, per_vector_mask=True)
    pcie = Pcie(tlp_prefix=True)
    aer = Aer()
    dsn = Dsn(0x0123_4567_89AB_CDEF)
    acs = Acs()
    ats = Ats(queue_depth=32)
    pasid = Pasid(width=16, execute=True)
    pri = Pri(capacity=64, pasid=True)


class Bare(PciDevice):
    """Nothing but an identity, and the capability that a function on PCI Express has."""

    vendor_id, device_id, class_code = 0x1B36, 0x0F12, 0x058000
    pcie = Pcie(flr=False)


class Integrated(PciDevice):
    """On the root complex itself."""

    vendor_id, device_id, class_code = 0x1B36, 0x0F13, 0x058000
    pcie = Pcie(integrated=True)


class Rig(FakeDriver):
    """Its driver; interrupts are signalled on the device's thread."""

    device: Card  # for what asks it; others are driven by their config space
    KINDS: ClassVar = {MSI: Irq.MSI, MSIX: Irq.MSIX}

    def __init__(self, card: PciDevice, memory: FakeMemory) -> None:
        super().__init__(card, memory, enable=False)
        self.events: list[EventFd] = []

    def at(self, capability: int) -> int:
        """Where a capability is."""
        at = self.config_read(0x34, 1)
        while self.config_read(at, 1) != capability:
            at = self.config_read(at + 1, 1)
        return at

    def extended(self, capability: int) -> int:
        """Where an extended capability is."""
        at = 0x100
        while (head := self.config_read(at, 4)) & 0xFFFF != capability:
            at = head >> 20
            assert at
        return at

    def command(self, value: int) -> None:
        self.config_write(4, 2, value)

    def power(self, state: int) -> None:
        self.config_write(self.at(1) + 4, 2, state)

    def control(self, kind: int, value: int) -> None:
        """Message Control."""
        self.config_write(self.at(kind) + 2, 2, value)

    def open(self, irq: Irq, count: int) -> list[EventFd]:
        """Eventfds of the first vectors."""
        events = self.client.eventfds(irq, count)
        self.events += events
        return events

    def fire(self, kind: int, vector: int = 0) -> None:
        capability = self.device.msi if kind == MSI else self.device.msix
        self.do(lambda: capability.fire(vector))

    def do(self, call: object) -> None:
        """Runs something on the device's thread."""
        self.device.post(call)  # type: ignore[arg-type]
        self.settle()

    def pending(self, kind: int, vector: int = 0) -> bool:
        """The bit that the guest can read."""
        if kind == MSI:
            return bool(self.config_read(self.at(MSI) + 0x14, 4) >> vector & 1)
        command = self.config_read(4, 2)
        self.command(command | MEMORY)
        word = self.read((4, self.device.msix.pba_offset + vector // 32 * 4))
        self.command(command)
        return bool(word >> vector % 32 & 1)

    def unmask_intx(self) -> None:
        self.client.set_irqs(Irq.INTX, IrqSetFlags.DATA_NONE | IrqSetFlags.UNMASK)

    def close(self) -> None:
        for event in self.events:
            event.close()
        super().close()
