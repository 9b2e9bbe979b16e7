"""Actions on the values of registers, and on the list of capabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from vmodel.device import PciDevice
from vmodel.inject.action import Action, Injection
from vmodel.inject.actions.access import REGION_READS, REGION_WRITES
from vmodel.inject.quantity import Number
from vmodel.points import AccessEvent, Point, Transfer


class Value(Action, name="value"):
    """Replaces the value that is read or written."""

    value: Number
    points: ClassVar[frozenset[Point]] = REGION_READS | REGION_WRITES

    def run(self, at: Injection) -> bytes:
        return at.change(lambda data: self.value.to_bytes(8, "little")[: len(data)].ljust(len(data), b"\0"))


class Ones(Action, name="ones"):
    """Reads return all ones, as from a removed device."""

    points: ClassVar[frozenset[Point]] = REGION_READS

    def run(self, at: Injection) -> bytes:
        return at.change(lambda data: b"\xff" * len(data))


class Stuck(Action, name="stuck"):
    """Reads always return the first value that the rule saw; writes have no effect."""

    points: ClassVar[frozenset[Point]] = REGION_READS | REGION_WRITES

    def run(self, at: Injection) -> bytes:
        if not at.event.point.is_read:
            at.before = at.data
            at.result = "dropped"
            return b""
        return at.change(lambda data: at.memory.setdefault(_key(at.transfer), data))


def _key(event: Transfer) -> tuple[object, ...]:
    assert isinstance(event, AccessEvent)
    return event.device, event.region, event.address, event.size


class _List(Action):
    """Changes the list of capabilities in the first 256 bytes of config space when it is read."""

    #: The name of a capability, which is its attribute in the model, as "msix".
    capability: str

    points: ClassVar[frozenset[Point]] = frozenset((Point.CONFIG_READ,))

    def check(self, devices: Sequence[PciDevice]) -> None:
        known = {name for device in devices for name, _, _ in _links(device)}
        if self.capability not in known:
            text = f"capabilities are {', '.join(sorted(known))}" if known else "there are none"
            raise ValueError(f"no capability is called {self.capability!r}: {text}")

    def run(self, at: Injection) -> bytes:
        old = at.proceed()
        start = at.transfer.address
        new = bytearray(old)
        changes = {place: byte for place, byte in self._changes(at).items() if start <= place < start + len(new)}
        at.before = " ".join(f"{place:#x}={old[place - start]:#x}" for place in changes)
        at.after = " ".join(f"{place:#x}={byte:#x}" for place, byte in changes.items())
        for place, byte in changes.items():
            new[place - start] = byte
        return bytes(new)

    def _changes(self, at: Injection) -> dict[int, int]:
        """The bytes of config space to change: offset to new value."""
        raise NotImplementedError


def _links(device: PciDevice) -> list[tuple[str, int, int]]:
    """(name, offset, offset of the pointer to it) of each capability in the first 256 bytes."""
    found, link = [], 0x34
    for name, place, _ in device.config.places:
        if 0x40 <= place < 0x100:
            found.append((name, place, link))
            link = place + 1
    return found


class Hide(_List, name="hide"):
    """Removes a capability from the list."""

    def _changes(self, at: Injection) -> dict[int, int]:
        links = _links(at.device)
        following = [place for _, place, _ in links[1:]] + [0]
        return {link: after for (name, _, link), after in zip(links, following, strict=True) if name == self.capability}


class Cut(_List, name="cut"):
    """Ends the list of capabilities before this one."""

    def _changes(self, at: Injection) -> dict[int, int]:
        return {link: 0 for name, _, link in _links(at.device) if name == self.capability}
