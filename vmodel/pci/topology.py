"""PCI topology: segments, buses, bridges and functions; aliases of requester ids; isolation by ACS.

The rules of aliases and ACS are those of Linux (drivers/pci/search.c, pci_for_each_dma_alias; drivers/pci/pci.c,
pci_acs_enabled), which follow the PCI Express Base Specification (6.12) and the PCI Express to PCI/PCI-X Bridge
Specification (2.3).
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator
from dataclasses import dataclass

_TEXT = re.compile(r"([0-9a-f]{4}):([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])", re.IGNORECASE)


@dataclass(frozen=True, order=True, slots=True)
class Bdf:
    """Segment, bus (0-255), device (0-31) and function (0-7)."""

    segment: int
    bus: int
    device: int
    function: int

    def __post_init__(self) -> None:
        ranges = ((self.segment, 1 << 16), (self.bus, 256), (self.device, 32), (self.function, 8))
        if not all(0 <= value < limit for value, limit in ranges):
            raise ValueError(f"no such PCI address: {self}")

    @classmethod
    def parse(cls, text: str) -> Bdf:
        """Parses "SSSS:BB:DD.F", as Linux writes an address.  ValueError."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is no PCI address: must be SSSS:BB:DD.F, as 0000:00:03.0")
        return cls(*(int(part, 16) for part in match.groups()))

    @classmethod
    def of(cls, segment: int, rid: int) -> Bdf:
        """Makes an address of a segment and a 16-bit requester id."""
        return cls(segment, rid >> 8, rid >> 3 & 31, rid & 7)

    @property
    def devfn(self) -> int:
        """Device and function in 8 bits."""
        return self.device << 3 | self.function

    @property
    def rid(self) -> int:
        """The 16-bit requester id: bus and devfn."""
        return self.bus << 8 | self.devfn

    @property
    def slot(self) -> tuple[int, int, int]:
        """(segment, bus, device): equal for all functions of one device."""
        return self.segment, self.bus, self.device

    def __str__(self) -> str:
        return f"{self.segment:04x}:{self.bus:02x}:{self.device:02x}.{self.function:x}"


class PortType(enum.Enum):
    """What a function is on the fabric (PCIe 7.5.3.2, Device/Port Type)."""

    ENDPOINT = "PCIe endpoint"
    INTEGRATED = "root complex integrated endpoint"
    CONVENTIONAL = "conventional PCI device"
    ROOT_PORT = "root port"
    UPSTREAM = "switch upstream port"
    DOWNSTREAM = "switch downstream port"
    PCIE_TO_PCI = "PCIe-to-PCI bridge"
    PCI_TO_PCIE = "PCI-to-PCIe bridge"
    PCI_BRIDGE = "conventional PCI bridge"

    @property
    def is_bridge(self) -> bool:
        """Whether there is a secondary bus."""
        return self not in (PortType.ENDPOINT, PortType.INTEGRATED, PortType.CONVENTIONAL)


class AcsFlags(enum.IntFlag):
    """Bits of the ACS control register (PCIe 7.7.11.3)."""

    NONE = 0
    SOURCE_VALIDATION = 1
    TRANSLATION_BLOCKING = 2
    REQUEST_REDIRECT = 4
    COMPLETION_REDIRECT = 8
    UPSTREAM_FORWARDING = 16
    EGRESS_CONTROL = 32
    DIRECT_TRANSLATED = 64


#: The controls that isolation needs, as far as the port supports them; Linux's REQ_ACS_FLAGS.
ISOLATION = (
    AcsFlags.SOURCE_VALIDATION | AcsFlags.REQUEST_REDIRECT | AcsFlags.COMPLETION_REDIRECT | AcsFlags.UPSTREAM_FORWARDING
)


class Function:
    """One PCI function.

    Attributes: `bdf`; `name`; `kind`; `acs`: the ACS controls that are enabled, None without the capability;
    `acs_offered`: those that it supports; `dma_aliases`: other devfns of its bus that its DMA requests may carry;
    `physical`: the physical function of a virtual one (SR-IOV); `group_mf`: all functions of its device share a group,
    whatever ACS they have; `secondary`: the bus below a bridge.
    """

    def __init__(
        self,
        bdf: Bdf,
        kind: PortType = PortType.INTEGRATED,
        *,
        name: str = "",
        acs: AcsFlags | None = None,
        acs_offered: AcsFlags = ISOLATION,
        dma_aliases: tuple[int, ...] = (),
        physical: Function | None = None,
        group_mf: bool = False,
    ) -> None:
        self.bdf = bdf
        self.kind = kind
        self.name = name or str(bdf)
        self.acs = acs
        self.acs_offered = acs_offered
        self.dma_aliases = dma_aliases
        self.physical = physical
        self.group_mf = group_mf
        self.secondary: Bus | None = None
        self.bus: Bus | None = None

    @property
    def home(self) -> Bus:
        """The bus that the function is on.  ValueError: it is in no topology."""
        if self.bus is None:
            raise ValueError(f"{self} is in no topology")
        return self.bus

    @property
    def multifunction(self) -> bool:
        """Whether its device has other functions; virtual ones do not count."""
        if self.physical is not None:
            return False
        return any(f is not self and f.bdf.slot == self.bdf.slot and not f.physical for f in self.home.functions)

    @property
    def has_acs(self) -> bool:
        """Whether peer-to-peer requests cannot bypass the IOMMU here (PCIe 6.12.1; pci_acs_enabled)."""
        if self.kind in (PortType.CONVENTIONAL, PortType.PCI_BRIDGE, PortType.PCI_TO_PCIE, PortType.PCIE_TO_PCI):
            return False
        if self.kind not in (PortType.ROOT_PORT, PortType.DOWNSTREAM) and not self.multifunction:
            return True  # there are no other functions to be isolated from
        if self.acs is None:
            return False
        wanted = ISOLATION & self.acs_offered
        return self.acs & wanted == wanted

    def __repr__(self) -> str:
        return f"<{self.bdf} {self.kind.value} {self.name}>"

    def __str__(self) -> str:
        return str(self.bdf)


class Bus:
    """One bus: its functions, and the bridge above it (None: a root bus)."""

    def __init__(self, segment: int, number: int, bridge: Function | None) -> None:
        self.segment = segment
        self.number = number
        self.bridge = bridge
        self.functions: list[Function] = []

    def __repr__(self) -> str:
        return f"<bus {self.segment:04x}:{self.number:02x}>"


@dataclass(frozen=True)
class Alias:
    """A requester id that a function's DMA may carry; `by`: the function or bridge that sets it."""

    by: Function
    bdf: Bdf


class Topology:
    """All buses of a machine."""

    def __init__(self) -> None:
        self._buses: dict[tuple[int, int], Bus] = {}
        self._functions: dict[Bdf, Function] = {}

    def add_root(self, segment: int = 0, number: int = 0) -> Bus:
        """Adds the root bus of a host bridge.  ValueError: the number is taken."""
        return self._add_bus(segment, number, None)

    def _add_bus(self, segment: int, number: int, bridge: Function | None) -> Bus:
        if (segment, number) in self._buses:
            raise ValueError(f"bus {segment:04x}:{number:02x} is there already")
        bus = self._buses[segment, number] = Bus(segment, number, bridge)
        return bus

    def add(self, function: Function, secondary: int | None = None) -> Function:
        """Adds a function to its bus; a bridge also adds bus `secondary`.

        ValueError: there is no such bus, the address or bus number is taken, a bridge has no secondary bus or another
        function has one, or this port type cannot be on this bus.
        """
        bdf, kind = function.bdf, function.kind
        bus = self._buses.get((bdf.segment, bdf.bus))
        if bus is None:
            raise ValueError(f"{bdf}: there is no bus {bdf.segment:04x}:{bdf.bus:02x}")
        if bdf in self._functions:
            raise ValueError(f"{bdf} is taken by {self._functions[bdf].name!r}")
        if kind.is_bridge != (secondary is not None):
            raise ValueError(f"{bdf}: a {kind.value} {'needs a' if kind.is_bridge else 'has no'} secondary bus")
        if (text := _misplaced(function, bus)) is not None:
            raise ValueError(f"{bdf}: a {kind.value} {text}")
        if function.physical is not None and function.physical.bdf not in self._functions:
            raise ValueError(f"{bdf}: its physical function {function.physical} is not there")
        if secondary is not None:
            if secondary <= bdf.bus:
                raise ValueError(f"{bdf}: its secondary bus {secondary:02x} must come after its own, {bdf.bus:02x}")
            function.secondary = self._add_bus(bdf.segment, secondary, function)
        function.bus = bus
        bus.functions.append(function)
        bus.functions.sort(key=lambda f: f.bdf)
        self._functions[bdf] = function
        return function

    def remove(self, function: Function) -> None:
        """Removes a function.  ValueError: it is not there, has virtual functions, or its lower bus is not empty."""
        if self._functions.get(function.bdf) is not function:
            raise ValueError(f"{function} is not there")
        if function.secondary is not None and function.secondary.functions:
            raise ValueError(f"{function}: there are functions on its secondary bus")
        if any(f.physical is function for f in self._functions.values()):
            raise ValueError(f"{function}: it has virtual functions")
        if function.secondary is not None:
            del self._buses[function.secondary.segment, function.secondary.number]
            function.secondary = None
        function.home.functions.remove(function)
        function.bus = None
        del self._functions[function.bdf]

    def __getitem__(self, bdf: Bdf) -> Function:
        return self._functions[bdf]

    def bus(self, segment: int, number: int) -> Bus:
        """The bus of that number.  KeyError: there is none."""
        return self._buses[segment, number]

    def __contains__(self, place: object) -> bool:
        """Whether `place` exists: a function's Bdf, or a bus as (segment, number)."""
        return place in self._functions or place in self._buses

    @property
    def roots(self) -> list[Bus]:
        """The root buses, by segment and number."""
        return [bus for _, bus in sorted(self._buses.items()) if bus.bridge is None]

    def functions(self) -> Iterator[Function]:
        """All functions in the guest's order of enumeration: a bridge, then the functions behind it."""

        def below(bus: Bus) -> Iterator[Function]:
            for function in bus.functions:
                yield function
                if function.secondary is not None:
                    yield from below(function.secondary)

        for root in self.roots:
            yield from below(root)


def _misplaced(function: Function, bus: Bus) -> str | None:
    kind = function.kind
    above = None if bus.bridge is None else bus.bridge.kind
    conventional = above in (PortType.PCI_BRIDGE, PortType.PCIE_TO_PCI)
    if kind in (PortType.ROOT_PORT, PortType.INTEGRATED) and above is not None:
        return "must be on a root bus"
    if kind is PortType.UPSTREAM and above not in (PortType.ROOT_PORT, PortType.DOWNSTREAM, PortType.PCI_TO_PCIE):
        return "must be behind a root port or a downstream port"
    if kind is PortType.DOWNSTREAM and above is not PortType.UPSTREAM:
        return "must be behind an upstream port"
    if above is PortType.UPSTREAM and kind is not PortType.DOWNSTREAM:
        return "cannot be behind an upstream port: only downstream ports are"
    if kind in (PortType.ENDPOINT, PortType.PCIE_TO_PCI) and conventional:
        return "cannot be on a conventional bus"
    if kind is PortType.PCI_TO_PCIE and not conventional and above is not None:
        return "must be on a conventional bus"
    if above in (PortType.ROOT_PORT, PortType.DOWNSTREAM) and function.bdf.device and not function.physical:
        return f"must have device number 00: a {above.value} leads to one device only"
    return None


def bridges_above(function: Function) -> Iterator[Function]:
    """The bridges between a function and its root bus, from the nearest up."""
    bridge = function.home.bridge
    while bridge is not None:
        yield bridge
        bridge = bridge.home.bridge


def dma_aliases(function: Function) -> Iterator[Alias]:
    """The requester ids that a function's DMA may carry: its own first, the one nearest to the root last."""
    yield Alias(function, function.bdf)
    segment, bus = function.bdf.segment, function.bdf.bus
    for devfn in function.dma_aliases:
        yield Alias(function, Bdf.of(segment, bus << 8 | devfn))
    for bridge in bridges_above(function):
        if bridge.kind is PortType.PCIE_TO_PCI:  # replaces the requester id by (secondary bus, devfn 0)
            assert bridge.secondary is not None
            yield Alias(bridge, Bdf(segment, bridge.secondary.number, 0, 0))
        elif bridge.kind in (PortType.PCI_TO_PCIE, PortType.PCI_BRIDGE):
            yield Alias(bridge, bridge.bdf)


def isolates(bridge: Function) -> bool:
    """Whether ACS isolates the functions behind a bridge from those behind its neighbours.

    A downstream port without ACS forwards requests to all other ports of its switch, even to ports with ACS; see
    docs/decisions/0004-switches-without-acs.md.
    """
    ports = bridge.home.functions if bridge.kind is PortType.DOWNSTREAM else [bridge]
    return all(port.has_acs for port in ports)


def acs_on_path(bridge: Function) -> bool:
    """Whether ACS isolates from `bridge` all the way to the root."""
    return isolates(bridge) and all(isolates(above) for above in bridges_above(bridge))


#: Vendor and device ids of functions whose DMA carries the requester id of function 0, or 1, of their slot (Linux
#: drivers/pci/quirks.c, quirk_dma_func0_alias and quirk_dma_func1_alias).
_AS_FUNCTION_0 = {0x1180: (0xE476, 0xE832), 0x6766: (0x3D40, 0x3D41)}  # Ricoh, Glenfly
_AS_FUNCTION_1 = {  # Marvell SATA controllers and relatives
    0x1B4B: (0x9120, 0x9123, 0x9125, 0x9128, 0x9130, 0x9170, 0x9172, 0x917A)  # noqa: RUF005
    + (0x9182, 0x9183, 0x91A0, 0x9215, 0x9220, 0x9230, 0x9235),
    0x1103: (0x0642, 0x0645),
    0x197B: (0x2392,),
    0x1C28: (0x0122,),
}


def quirk_aliases(vendor: int, device: int, bdf: Bdf) -> tuple[int, ...]:
    """The devfns that DMA of this hardware carries besides its own; empty for most."""
    for table, function in ((_AS_FUNCTION_0, 0), (_AS_FUNCTION_1, 1)):
        if device in table.get(vendor, ()) and bdf.function != function:
            return (bdf.device << 3 | function,)
    return ()
