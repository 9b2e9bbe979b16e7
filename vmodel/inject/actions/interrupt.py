"""Actions that raise wrong or additional interrupts."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from vmodel.device import PciDevice
from vmodel.inject.action import Action, Injection
from vmodel.inject.actions.access import Ms
from vmodel.inject.quantity import Number
from vmodel.pci.caps import Msi, Msix
from vmodel.points import InterruptEvent, Point


class OtherVector(Action, name="vector"):
    """Raises another vector instead."""

    vector: Number
    points: ClassVar[frozenset[Point]] = frozenset((Point.IRQ,))

    def run(self, at: Injection) -> bytes:
        event = at.event
        assert isinstance(event, InterruptEvent)
        at.before, at.after = event.vector, self.vector
        if self.vector >= vectors(at.device):
            at.result = "no such vector"
            return b""
        return at.proceed(replace(event, vector=self.vector))


class Storm(Action, name="storm"):
    """Repeats the interrupt `count` times, every `ms`."""

    count: Number = Field(default=1000, ge=1, le=1_000_000)
    ms: Ms = Field(default=1.0, gt=0)
    points: ClassVar[frozenset[Point]] = frozenset((Point.IRQ,))

    def run(self, at: Injection) -> bytes:
        at.after = self.count
        at.proceed()
        device, event = at.device, at.event
        assert isinstance(event, InterruptEvent)
        vector = event.vector

        def again(left: int) -> None:
            if not at.engine.goes_on(at.rule):
                return
            fire(device, vector)
            if left > 1:
                device.after(self.ms / 1000, lambda: again(left - 1))

        device.after(self.ms / 1000, lambda: again(self.count))
        return b""


class Spurious(Action, name="spurious"):
    """Raises an interrupt without a cause, `ms` after the event."""

    vector: Number = 0
    ms: Ms = 0.0
    points: ClassVar[frozenset[Point]] = frozenset(Point) - {Point.UNPLUG, Point.RESET}

    def run(self, at: Injection) -> bytes:
        data = at.proceed()
        at.after = self.vector
        # At an IOMMU's point, the devices that the event concerns raise it.
        names = at.event.others or (at.event.device,)
        for device in [at.engine.devices[name] for name in names if name in at.engine.devices]:
            if self.vector >= vectors(device):
                at.result = "no such vector"
            elif self.ms:
                device.after(self.ms / 1000, lambda device=device: fire(device, self.vector))  # type: ignore[misc]
            elif device is at.device:
                fire(device, self.vector)
            else:  # an IOMMU's thread is not the device's
                device.defer(lambda device=device: fire(device, self.vector))  # type: ignore[misc]
        return data


def vectors(device: PciDevice) -> int:
    """The number of interrupts that a device may raise, of the kind (MSI-X, MSI, pin) that its driver has enabled."""
    for capability in device.config.capabilities:
        if isinstance(capability, Msi | Msix) and capability.enabled:
            return capability.allocated
    return 0 if device.backend.pin is None else 1


def fire(device: PciDevice, vector: int) -> None:
    """Raises an interrupt without the model, and without firing rules; on the pin, a pulse."""
    for capability in device.config.capabilities:
        if isinstance(capability, Msi | Msix) and capability.enabled:
            if vector < capability.allocated:
                capability.fire_untapped(vector)
            return
    pin = device.backend.pin
    if pin is not None:
        level = pin.level
        pin.raise_untapped()
        if not level:
            pin.lower()
