"""Connections, errors of the link, and what a client is told of a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from vmodel.device import PciDevice
from vmodel.inject.action import Action, Injection
from vmodel.inject.actions.access import Ms, report
from vmodel.inject.quantity import Number
from vmodel.pci import extcaps as capability
from vmodel.pci.extcaps import Correctable, Uncorrectable
from vmodel.points import Point
from vmodel.vfio_user.commands import RegionInfo


class Disconnect(Action, name="disconnect"):
    """The device is gone, at once or `ms` later, as by surprise removal: its registers read as all ones."""

    ms: Ms = 0.0
    points: ClassVar[frozenset[Point]] = frozenset(Point) - {Point.UNPLUG}

    def run(self, at: Injection) -> bytes:
        device = at.device

        def go() -> None:
            if device.backend.hang_up is not None:
                device.backend.hang_up()
            # At once: what it has in hand must not get through before the connection's end is seen.
            device.memory.unmap_all()
            device.backend.irqs.close()

        if self.ms:
            at.later(go, ms=self.ms)
        else:
            go()
        return at.proceed()


class Unplug(Action, name="unplug"):
    """The client is asked to let the device go (the REQ interrupt), after what happens."""

    points: ClassVar[frozenset[Point]] = frozenset(Point) - {Point.UNPLUG}

    def run(self, at: Injection) -> bytes:
        data = at.proceed()
        if not at.device.backend.irqs.request_release():
            at.result = "nobody listens"
        return data


class AerError(Action, name="aer"):
    """The device's AER capability notes an error; what happens, happens."""

    error: Literal[
        "completion-timeout",
        "completer-abort",
        "unexpected-completion",
        "poisoned",
        "malformed",
        "ecrc",
        "unsupported-request",
        "receiver",
        "bad-tlp",
        "replay-timer",
    ]
    points: ClassVar[frozenset[Point]] = frozenset(Point)

    def check(self, devices: Sequence[PciDevice]) -> None:
        if not any(isinstance(c, capability.Aer) for device in devices for c in device.config.capabilities):
            raise ValueError("no such device has AER")

    def run(self, at: Injection) -> bytes:
        uncorrectable = {
            "completion-timeout": Uncorrectable.COMPLETION_TIMEOUT,
            "completer-abort": Uncorrectable.COMPLETER_ABORT,
            "unexpected-completion": Uncorrectable.UNEXPECTED_COMPLETION,
            "poisoned": Uncorrectable.POISONED_TLP,
            "malformed": Uncorrectable.MALFORMED_TLP,
            "ecrc": Uncorrectable.ECRC,
            "unsupported-request": Uncorrectable.UNSUPPORTED_REQUEST,
        }
        correctable = {
            "receiver": Correctable.RECEIVER,
            "bad-tlp": Correctable.BAD_TLP,
            "replay-timer": Correctable.REPLAY_TIMER,
        }
        at.after = self.error
        if self.error in uncorrectable:
            report(at, uncorrectable=uncorrectable[self.error].mask)
        else:
            report(at, correctable=correctable[self.error].mask)
        return at.proceed()


class NoBar(Action, name="no-bar"):
    """The client is told that the device has no such BAR."""

    bar: Number
    points: ClassVar[frozenset[Point]] = frozenset((Point.CONNECTION,))

    def check(self, devices: Sequence[PciDevice]) -> None:
        if not any(bar.index == self.bar for device in devices for bar in device.declaration.bars):
            raise ValueError(f"no such device has a BAR{self.bar}")

    def run(self, at: Injection) -> bytes:
        backend = at.device.backend
        whole = backend.region_infos
        at.before, at.after = whole[self.bar].size, 0
        backend.region_infos = [RegionInfo(0) if n == self.bar else region for n, region in enumerate(whole)]
        return at.proceed()
