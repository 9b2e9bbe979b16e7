"""Registers by name: the bytes and region of a name, and the registers at an offset."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field

from vmodel.device import PciDevice
from vmodel.regs import Field
from vmodel.span import Span
from vmodel.vfio_user.wire import Region


@dataclass(frozen=True)
class Place:
    """A register's place.  `bank` names the attribute or capability that it belongs to, "" is the header."""

    bank: str
    name: str
    region: int
    span: Span
    fields: tuple[Field, ...] = ()
    #: The register's bytes in this device.
    view: memoryview = field(default_factory=lambda: memoryview(b""), repr=False, compare=False)

    @property
    def full_name(self) -> str:
        """The name with its bank, as "regs.STATUS"."""
        return f"{self.bank}.{self.name}" if self.bank else self.name

    @property
    def stored(self) -> int:
        """The stored value; no hook runs."""
        return int.from_bytes(self.view, "little")


class RegisterMap:
    """All registers of a device, those of config space included."""

    def __init__(self, device: PciDevice) -> None:
        self.places = [
            Place(
                name,
                register.name,
                region,
                Span.sized(at + register.offset, register.size),
                register.fields,
                bank.view[register.offset : register.offset + register.size],
            )
            for name, (region, at, bank) in device.backend.banks.items()
            for register in bank.registers
        ]
        config = device.config.view
        spans = [
            (name, register.name, Span.sized(at + register.offset, register.size), register.fields)
            for name, at, bank in device.config.places
            for register in bank.registers
        ]
        spans += [
            (name, what, Span(at + n, at + n), ())
            for name, at, _ in device.config.places
            if 0x40 <= at < 0x100
            for n, what in enumerate(("ID", "NEXT"))
        ]
        spans += [
            ("", f"BAR{n}", Span.sized(0x10 + 4 * n, 4), ())
            for bar in device.declaration.bars
            for n in range(bar.index, bar.index + bar.registers)
        ]
        self.places += [
            Place(bank, name, Region.CONFIG, span, fields, config[span.start : span.last + 1])
            for bank, name, span, fields in spans
        ]
        #: By region, in ascending order.
        self._sorted: dict[int, list[Place]] = {}
        for place in sorted(self.places, key=lambda place: place.span.start):
            self._sorted.setdefault(place.region, []).append(place)

    def find(self, name: str, *, config: bool) -> list[Place]:
        """The registers of that name, "STATUS" or "regs.STATUS": in config space if `config`, else in BARs."""
        return [
            place
            for place in self.places
            if name in (place.name, place.full_name) and (place.region == Region.CONFIG) is config
        ]

    def covering(self, region: int, offset: int, size: int) -> Iterator[Place]:
        """The registers that an access touches, in ascending order."""
        places = self._sorted.get(region, [])
        for place in places[bisect_left(places, offset, key=lambda place: place.span.last) :]:
            if place.span.start >= offset + size:
                break
            yield place
