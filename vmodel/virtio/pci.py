"""The modern PCI transport (VIRTIO 1.3, 4.1): `VirtioDevice` is the base class of virtio models."""

from __future__ import annotations

import struct
from typing import Any, ClassVar

from vmodel.device import Intx, MmioBar, Msix, PciDevice, ResetKind, on_read, on_write
from vmodel.errors import GuestError
from vmodel.pci.caps import Capability, VendorSpecific
from vmodel.points import Point
from vmodel.regs import RO, Bit, Layout, Reg8, Reg16, Reg32, Register, RegisterBank
from vmodel.span import KiB
from vmodel.virtio.queue import QueueError, Virtqueue

VENDOR = 0x1AF4
NO_VECTOR = 0xFFFF

#: Feature bits of the transport, the same for all devices (6).
INDIRECT_DESC, EVENT_IDX, VERSION_1 = 1 << 28, 1 << 29, 1 << 32

#: Offsets of the configuration structures in the BAR.
_COMMON, _ISR, DEVICE_CONFIG, _NOTIFY, _SIZE = 0x0000, 0x1000, 0x2000, 0x3000, 16 * KiB
#: Most queues of one device: the doorbells that are declared.
MAX_QUEUES = 64


class DeviceStatus(Layout):
    """device_status (2.1)."""

    ACKNOWLEDGE = Bit(0)
    DRIVER = Bit(1)
    DRIVER_OK = Bit(2)
    FEATURES_OK = Bit(3)
    NEEDS_RESET = Bit(6)
    FAILED = Bit(7)


class CommonRegs(RegisterBank, size=0x40):
    """Common configuration (4.1.4.3).  The registers from QUEUE_SIZE on are those of queue QUEUE_SELECT."""

    DEVICE_FEATURE_SELECT = Reg32(0x00)
    DEVICE_FEATURE = Reg32(0x04, RO)
    DRIVER_FEATURE_SELECT = Reg32(0x08)
    DRIVER_FEATURE = Reg32(0x0C)
    CONFIG_VECTOR = Reg16(0x10, reset=NO_VECTOR)
    NUM_QUEUES = Reg16(0x12, RO)
    DEVICE_STATUS = Reg8(0x14, layout=DeviceStatus)
    CONFIG_GENERATION = Reg8(0x15, RO)
    QUEUE_SELECT = Reg16(0x16)
    QUEUE_SIZE = Reg16(0x18)
    QUEUE_VECTOR = Reg16(0x1A, reset=NO_VECTOR)
    QUEUE_ENABLE = Reg16(0x1C)
    QUEUE_NOTIFY_OFF = Reg16(0x1E, RO)
    QUEUE_DESC_LOW = Reg32(0x20)
    QUEUE_DESC_HIGH = Reg32(0x24)
    QUEUE_DRIVER_LOW = Reg32(0x28)
    QUEUE_DRIVER_HIGH = Reg32(0x2C)
    QUEUE_DEVICE_LOW = Reg32(0x30)
    QUEUE_DEVICE_HIGH = Reg32(0x34)
    QUEUE_NOTIFY_DATA = Reg16(0x38, RO)
    QUEUE_RESET = Reg16(0x3A, RO)


class IsrStatus(Layout):
    """ISR status (4.1.4.5); a read clears it."""

    QUEUE = Bit(0)
    CONFIG = Bit(1)


class IsrRegs(RegisterBank, size=4, sizes=(1, 2, 4)):
    """ISR status."""

    STATUS = Reg8(0, RO, layout=IsrStatus)


class NotifyRegs(RegisterBank, size=4 * MAX_QUEUES, sizes=(2, 4)):
    """A 16-bit doorbell for each queue; the written value is ignored (4.1.4.4)."""

    locals().update({f"QUEUE{n}": Reg16(4 * n) for n in range(MAX_QUEUES)})


class PciCap(VendorSpecific[RegisterBank]):
    """struct virtio_pci_cap (4.1.4): structure `part` is at `at` of BAR0; `more`: fields that follow in some parts."""

    def __init__(self, part: int, at: int, size: int, more: bytes = b"") -> None:
        super().__init__(struct.pack("<BBB2xII", part, 0, 0, at, size) + more)


class CfgAccessRegs(RegisterBank, size=20):
    """struct virtio_pci_cfg_cap (4.1.4.9)."""

    LENGTH = Reg8(2, RO, reset=20)
    TYPE = Reg8(3, RO, reset=5)
    BAR = Reg8(4)
    OFFSET = Reg32(8)
    SIZE = Reg32(12)
    DATA = Reg32(16)


class CfgAccessCap(Capability):
    """Access to the BAR through config space (4.1.4.9): an access to DATA is forwarded to the BAR."""

    id = VendorSpecific.id
    bank = CfgAccessRegs
    hooked = read_hooked = (CfgAccessRegs.DATA,)
    regs: CfgAccessRegs

    def _window(self) -> tuple[int, int] | None:
        """(offset, size) of the access in the BAR; None: the registers describe no valid access."""
        offset, size = self.regs.OFFSET, self.regs.SIZE
        good = size in (1, 2, 4) and self.regs.BAR == 0 and offset % size == 0 and offset + size <= _SIZE
        return (offset, size) if good else None

    def written(self) -> None:
        if (window := self._window()) is not None:
            value = self.regs.DATA & (1 << 8 * window[1]) - 1
            self.owner.region_write(0, *window, value)

    def reading(self) -> None:
        if (window := self._window()) is not None:
            value = self.owner.region_read(0, *window)
            assert isinstance(value, int)
            self.regs.DATA = value


class VirtioDevice(PciDevice):
    """A virtio device.

    A model declares `vendor_id, device_id = VENDOR, 0x1040 + its device type (5)`, `msix`, `queue_sizes` and `offered`,
    and puts its configuration at `DEVICE_CONFIG` of `bar0`.  It overrides `on_queue`, and other `on_...` methods as
    needed.
    """

    revision = 1
    #: 4.1.2.1: legacy drivers do not bind to a subsystem id of 0x40 or higher.
    subsystem_vendor_id, subsystem_id = VENDOR, 0x40
    #: Size of each queue.
    queue_sizes: ClassVar[tuple[int, ...]]
    #: Feature bits that the model offers, without those of the transport.
    offered: ClassVar[int] = 0

    bar0 = MmioBar(0, size=_SIZE, is_64bit=True, fill=0)
    common = bar0.bank(CommonRegs, at=_COMMON)
    isr = bar0.bank(IsrRegs, at=_ISR)
    doorbells = bar0.bank(NotifyRegs, at=_NOTIFY)
    intx = Intx()
    cap_common = PciCap(1, _COMMON, CommonRegs.size)
    cap_isr = PciCap(3, _ISR, IsrRegs.size)
    cap_device = PciCap(4, DEVICE_CONFIG, 0x1000)
    cap_notify = PciCap(2, _NOTIFY, NotifyRegs.size, struct.pack("<I", 4))
    cap_cfg = CfgAccessCap()
    msix: Msix

    def setup(self) -> None:
        #: By queue index.
        self.queues = [Virtqueue(self.dma, n, size, self.points) for n, size in enumerate(self.queue_sizes)]
        #: Feature bits that the driver has accepted.
        self.features = 0
        #: Whether the device configuration has changed since the driver last read CONFIG_GENERATION.
        self._config_is_new = False

    # ---- for models ------------------------------------------------------------------------

    def on_queue(self, queue: Virtqueue) -> None:
        """Serves a queue's requests: pop and answer them until `pop` returns None.

        If the turn's budget ended before the queue was empty, this is called again later.  After a QueueError or any
        other GuestError the device needs a reset (2.1.2).
        """

    def on_driver_ok(self) -> None:
        """Called when the driver sets DRIVER_OK."""

    def on_driver_reset(self) -> None:
        """Called when the driver has reset the device by writing 0 to DEVICE_STATUS (2.1)."""

    @property
    def driver_ok(self) -> bool:
        """Whether the driver has set DRIVER_OK, and the device does not need a reset."""
        status = DeviceStatus(self.common.DEVICE_STATUS)
        return bool(status.DRIVER_OK) and not status.NEEDS_RESET

    def interrupt(self, queue: Virtqueue) -> None:
        """Raises a queue's interrupt, unless the driver suppresses it or nothing was answered (2.7.7)."""
        if queue.wants_interrupt():
            self._signal(queue.vector, IsrStatus.QUEUE.mask)

    def config_changed(self) -> None:
        """Notifies the driver that the device configuration has changed (4.1.5.1.3)."""
        self._config_is_new = True
        if self.driver_ok:
            self._signal(self.common.CONFIG_VECTOR, IsrStatus.CONFIG.mask)

    def _signal(self, vector: int, cause: int) -> None:
        if self.msix.enabled:
            self.isr.STATUS |= cause & IsrStatus.CONFIG.mask  # 4.1.4.5.1: with MSI-X the queue bit is not used
            if vector != NO_VECTOR:
                self.msix.fire(vector)
        else:
            self.isr.STATUS |= cause
            self.intx.raise_()

    def broken(self, error: GuestError) -> None:
        """Sets NEEDS_RESET after an error of the driver: queues stop until the driver resets the device (2.1.2)."""
        self.log.warning("%s: needs a reset: %s", self.name, error)
        was_ok = self.driver_ok
        self.common.DEVICE_STATUS |= DeviceStatus.NEEDS_RESET.mask
        if was_ok:
            self._signal(self.common.CONFIG_VECTOR, IsrStatus.CONFIG.mask)

    # ---- reset and features ----------------------------------------------------------------

    def on_reset(self, kind: ResetKind) -> None:
        self._reset_transport()

    def _reset_transport(self) -> None:
        self.features = 0
        self._config_is_new = False
        for queue in self.queues:
            queue.reset()
        self.common.load_reset()
        self.isr.STATUS = 0
        self.intx.lower()
        self.common.NUM_QUEUES = len(self.queues)
        self._update_features()
        self._update_selected_queue()

    @property
    def all_offered(self) -> int:
        """The feature bits that are offered: the model's and the transport's."""
        return self.offered | INDIRECT_DESC | EVENT_IDX | VERSION_1

    def _update_features(self) -> None:
        word = self.common.DEVICE_FEATURE_SELECT
        self.common.DEVICE_FEATURE = self.all_offered >> 32 * word & 0xFFFF_FFFF if word < 2 else 0

    @on_write(CommonRegs.DEVICE_FEATURE_SELECT)
    def _select_device_feature(self, new: int) -> int:
        self.common.DEVICE_FEATURE_SELECT = new
        self._update_features()
        return new

    @on_write(CommonRegs.DRIVER_FEATURE_SELECT)
    def _select_driver_feature(self, new: int) -> int:
        self.common.DRIVER_FEATURE = self.features >> 32 * new & 0xFFFF_FFFF if new < 2 else 0
        return new

    @on_write(CommonRegs.DRIVER_FEATURE)
    def _driver_feature(self, new: int) -> int:
        word = self.common.DRIVER_FEATURE_SELECT
        if word >= 2:
            return 0
        if not DeviceStatus(self.common.DEVICE_STATUS).FEATURES_OK:
            self.features = self.features & ~(0xFFFF_FFFF << 32 * word) | new << 32 * word
        return self.features >> 32 * word & 0xFFFF_FFFF

    @on_write(CommonRegs.DEVICE_STATUS)
    def _device_status(self, new: int) -> int:
        old = DeviceStatus(self.common.DEVICE_STATUS)
        if not new:
            self._reset_transport()
            self.on_driver_reset()
            return 0
        status = DeviceStatus(new)
        # The driver must not clear bits (2.1.1).  FEATURES_OK stays clear if the driver accepts features that were not
        # offered, or does not accept VERSION_1.
        new |= old.value
        acceptable = not self.features & ~self.all_offered and self.features & VERSION_1
        if status.FEATURES_OK and not old.FEATURES_OK and not acceptable:
            new &= ~DeviceStatus.FEATURES_OK.mask
            self.log.warning(
                "%s: no FEATURES_OK: the driver accepts %#x of %#x", self.name, self.features, self.all_offered
            )
        if status.DRIVER_OK and not old.DRIVER_OK:
            if new & DeviceStatus.FEATURES_OK.mask:
                self.common.DEVICE_STATUS = new
                self.on_driver_ok()
            else:  # 3.1.1: FEATURES_OK has to be set first
                new &= ~DeviceStatus.DRIVER_OK.mask
                self.log.warning("%s: no DRIVER_OK: FEATURES_OK is not set", self.name)
        return new

    @on_read(CommonRegs.CONFIG_GENERATION)
    def _generation(self, stored: int) -> int:
        """Changes once if the configuration has changed since the last read, however often (4.1.4.3.1)."""
        if self._config_is_new:
            self._config_is_new = False
            self.common.CONFIG_GENERATION = (stored + 1) % 256
        return self.common.CONFIG_GENERATION

    # ---- queues ----------------------------------------------------------------------------

    @property
    def _selected(self) -> Virtqueue | None:
        n = self.common.QUEUE_SELECT
        return self.queues[n] if n < len(self.queues) else None

    def _update_selected_queue(self) -> None:
        queue, regs = self._selected, self.common
        regs.QUEUE_SIZE = queue.size if queue else 0
        regs.QUEUE_VECTOR = queue.vector if queue else NO_VECTOR
        regs.QUEUE_ENABLE = int(queue.enabled) if queue else 0
        regs.QUEUE_NOTIFY_OFF = queue.index if queue else 0
        for low, high, address in (
            (CommonRegs.QUEUE_DESC_LOW, CommonRegs.QUEUE_DESC_HIGH, queue.descriptors if queue else 0),
            (CommonRegs.QUEUE_DRIVER_LOW, CommonRegs.QUEUE_DRIVER_HIGH, queue.driver if queue else 0),
            (CommonRegs.QUEUE_DEVICE_LOW, CommonRegs.QUEUE_DEVICE_HIGH, queue.device if queue else 0),
        ):
            low.__set__(regs, address & 0xFFFF_FFFF)
            high.__set__(regs, address >> 32)

    @on_write(CommonRegs.QUEUE_SELECT)
    def _select_queue(self, new: int) -> int:
        self.common.QUEUE_SELECT = new
        self._update_selected_queue()
        return new

    @on_write(CommonRegs.QUEUE_SIZE)
    def _queue_size(self, new: int) -> int:
        queue = self._selected
        if queue is None or queue.enabled or not 0 < new <= queue.max_size or new & (new - 1):
            return self.common.QUEUE_SIZE
        queue.size = new
        return new

    @on_write(CommonRegs.CONFIG_VECTOR)
    def _config_vector(self, new: int) -> int:
        return self._vector(new)

    @on_write(CommonRegs.QUEUE_VECTOR)
    def _queue_vector(self, new: int) -> int:
        queue = self._selected
        if queue is None:
            return NO_VECTOR
        queue.vector = self._vector(new)
        return queue.vector

    def _vector(self, wanted: int) -> int:
        """A vector that does not exist reads back as NO_VECTOR (4.1.5.1.2)."""
        return wanted if wanted < self.msix.vectors else NO_VECTOR

    def _address(self, name: str, shift: int, new: int, stored: int) -> int:
        queue = self._selected
        if queue is None or queue.enabled:
            return stored
        setattr(queue, name, getattr(queue, name) & ~(0xFFFF_FFFF << shift) | new << shift)
        return new

    @on_write(CommonRegs.QUEUE_DESC_LOW)
    def _desc_low(self, new: int) -> int:
        return self._address("descriptors", 0, new, self.common.QUEUE_DESC_LOW)

    @on_write(CommonRegs.QUEUE_DESC_HIGH)
    def _desc_high(self, new: int) -> int:
        return self._address("descriptors", 32, new, self.common.QUEUE_DESC_HIGH)

    @on_write(CommonRegs.QUEUE_DRIVER_LOW)
    def _driver_low(self, new: int) -> int:
        return self._address("driver", 0, new, self.common.QUEUE_DRIVER_LOW)

    @on_write(CommonRegs.QUEUE_DRIVER_HIGH)
    def _driver_high(self, new: int) -> int:
        return self._address("driver", 32, new, self.common.QUEUE_DRIVER_HIGH)

    @on_write(CommonRegs.QUEUE_DEVICE_LOW)
    def _device_low(self, new: int) -> int:
        return self._address("device", 0, new, self.common.QUEUE_DEVICE_LOW)

    @on_write(CommonRegs.QUEUE_DEVICE_HIGH)
    def _device_high(self, new: int) -> int:
        return self._address("device", 32, new, self.common.QUEUE_DEVICE_HIGH)

    @on_write(CommonRegs.QUEUE_ENABLE)
    def _queue_enable(self, new: int) -> int:
        queue = self._selected
        if queue is None:
            return 0
        if new == 1 and not queue.enabled:
            try:
                wanted = self.features
                queue.enable(event_index=bool(wanted & EVENT_IDX), indirect=bool(wanted & INDIRECT_DESC))
            except QueueError as error:
                self.broken(error)
        return int(queue.enabled)

    def _notified(self, index: int) -> None:
        """The driver has written a doorbell.  If a turn is due already, that turn will find the new requests."""
        if index < len(self.queues) and not self.queues[index].due:
            self._turn(self.queues[index])

    def _turn(self, queue: Virtqueue) -> None:
        """Serves a queue for a bounded time.

        Remaining requests are served in a later turn, so that other accesses and a stop of the server come in between.
        """
        queue.due = False
        if not queue.enabled or not self.driver_ok or not queue.begin():
            return
        life = queue.life
        try:
            self.on_queue(queue)
            if life == queue.life:
                self.interrupt(queue)
        except GuestError as error:
            self.broken(error)
        finally:
            if queue.end():
                self.defer(lambda: self._turn(queue))

    @on_read(IsrRegs.STATUS)
    def _isr(self, stored: int) -> int:
        self.isr.STATUS = 0
        self.intx.lower()
        return stored


def _doorbell(index: int, register: Register) -> Any:
    def ring(self: VirtioDevice, new: int) -> int:
        if self.points.armed(Point.DOORBELL):
            self.points.doorbell(lambda e: self._notified(e.queue), queue=index)
        else:
            self._notified(index)
        return 0

    return on_write(register)(ring)


# One hook for each doorbell.  They must exist before subclasses are made, which collect the hooks of this class.
for _n, _register in enumerate(NotifyRegs.registers):
    setattr(VirtioDevice, f"_doorbell{_n}", _doorbell(_n, _register))
