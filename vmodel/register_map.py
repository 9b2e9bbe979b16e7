"""Registers by name: which bytes of which region a name stands for, and which names an access touches."""

from __future__ import annotations

from dataclasses import dataclass

from vmodel.device import PciDevice
from vmodel.span import Span
from vmodel.vfio_user.wire import Region


@dataclass(frozen=True)
class Place:
    """A register: `bank` is the name of the attribute or capability that it belongs to, "" for the header's."""

    bank: str
    name: str
    region: int
    span: Span

    @property
    def full_name(self) -> str:
        """As "regs.STATUS"."""
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
        """The registers called so, as "STATUS" or "regs.STATUS", in config space or in BARs."""
        return [
            place
            for place in self.places
            if name in (place.name, place.full_name) and (place.region == Region.CONFIG) is config
        ]

    def at(self, region: int, offset: int, size: int) -> str:
        """The register that an access begins in; "" in none."""
        for place in self.places:
            if place.region == region and offset in place.span:
                return place.full_name
        return ""
