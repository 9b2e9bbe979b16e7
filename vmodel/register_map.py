"""Registers by name: the bytes and region of a name, and the name of the register at an offset."""

from __future__ import annotations

from dataclasses import dataclass

from vmodel.device import PciDevice
from vmodel.span import Span
from vmodel.vfio_user.wire import Region


@dataclass(frozen=True)
class Place:
    """A register's place.  `bank` names the attribute or capability that it belongs to, "" is the header."""

    bank: str
    name: str
    region: int
    span: Span

    @property
    def full_name(self) -> str:
        """The name with its bank, as "regs.STATUS"."""
        return f"{self.bank}.{self.name}" if self.bank else self.name


class RegisterMap:
    """All registers of a device, those of config space included."""

    def __init__(self, device: PciDevice) -> None:
        self.places = [
            Place(name, register.name, region, Span.sized(at + register.offset, register.size))
            for name, (region, at, bank) in device.backend.banks.items()
            for register in bank.registers
        ]
        self.places += [
            Place(name, register.name, Region.CONFIG, Span.sized(at + register.offset, register.size))
            for name, at, bank in device.config.places
            for register in bank.registers
        ]
        self.places += [
            Place(name, what, Region.CONFIG, Span(at + n, at + n))
            for name, at, _ in device.config.places
            if 0x40 <= at < 0x100
            for n, what in enumerate(("ID", "NEXT"))
        ]
        self.places += [
            Place("", f"BAR{n}", Region.CONFIG, Span.sized(0x10 + 4 * n, 4))
            for bar in device.declaration.bars
            for n in range(bar.index, bar.index + bar.registers)
        ]

    def find(self, name: str, *, config: bool) -> list[Place]:
        """The registers of that name, "STATUS" or "regs.STATUS": in config space if `config`, else in BARs."""
        return [
            place
            for place in self.places
            if name in (place.name, place.full_name) and (place.region == Region.CONFIG) is config
        ]

    def at(self, region: int, offset: int, size: int) -> str:
        """The full name of the register at `offset`, where the access begins; "" if there is none."""
        for place in self.places:
            if place.region == region and offset in place.span:
                return place.full_name
        return ""
