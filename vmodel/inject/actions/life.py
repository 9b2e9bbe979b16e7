"""Actions on the connection, on errors of the link, and on the regions that a client sees."""

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
    """Removes the device by surprise, at once or `ms` later: its registers read as all ones.

    It stays if the plan is over, or healed, before that.
    """

    ms: Ms = 0.0
    points: ClassVar[frozenset[Point]] = frozenset(Point) - {Point.UNPLUG}

    def run(self, at: Injection) -> bytes:
        device = at.device

        def go() -> None:
            if self.ms and not at.engine.goes_on(at.rule):
                at.result = "not any more"
                return
            if device.backend.hang_up is not None:
                device.backend.hang_up()
            # Now: transfers under way must not complete before the end of the connection is noticed.
            device.memory.unmap_all()
            device.backend.irqs.close()

        if self.ms:
            at.later(go, ms=self.ms)
        else:
            go()
        return at.proceed()


class Unplug(Action, name="unplug"):
    """After the event, asks the client to release the device (the REQ interrupt)."""

    points: ClassVar[frozenset[Point]] = frozenset(Point) - {Point.UNPLUG}

    def run(self, at: Injection) -> bytes:
        data = at.proceed()
        if not at.device.backend.irqs.request_release():
            at.result = "no client listens"
        return data


class AerError(Action, name="aer"):
    """Records an error in the device's AER capability; the event itself is carried out."""

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
            raise ValueError("none of these devices has AER")

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
    """Hides a BAR: the client sees a region of size 0."""

    bar: Number
    points: ClassVar[frozenset[Point]] = frozenset((Point.CONNECTION,))

    def check(self, devices: Sequence[PciDevice]) -> None:
        if not any(bar.index == self.bar for device in devices for bar in device.declaration.bars):
            raise ValueError(f"none of these devices has a BAR{self.bar}")

    def run(self, at: Injection) -> bytes:
        backend = at.device.backend
        whole = backend.region_infos
        at.before, at.after = whole[self.bar].size, 0
        backend.region_infos = [RegionInfo(0) if n == self.bar else region for n, region in enumerate(whole)]
        return at.proceed()
