"""PCI topology: segments, buses, bridges and functions; aliases of requester ids; isolation by ACS.

The rules of aliases and ACS are those of Linux (drivers/pci/search.c, pci_for_each_dma_alias; drivers/pci/pci.c,
pci_acs_enabled), which follow the PCI Express Base Specification (6.12) and the PCI Express to PCI/PCI-X Bridge
Specification (2.3), and the exceptions of `quirks`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmodel.pci.ports import ISOLATION as ISOLATION
from vmodel.pci.ports import AcsFlags as AcsFlags
from vmodel.pci.ports import PortType as PortType
from vmodel.pci.quirks import BridgeEffect, acs_quirk, alias_quirk, bridge_quirk, missing_acs

if TYPE_CHECKING:
    from vmodel.pci.config import Identity

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


#: What bridges do with requester ids; those of other kinds do nothing.
_EFFECTS = {
    PortType.PCIE_TO_PCI: BridgeEffect.SECONDARY_ALIAS,
    PortType.PCI_TO_PCIE: BridgeEffect.OWN_ID,
    PortType.PCI_BRIDGE: BridgeEffect.OWN_ID,
}


class Function:
    """One PCI function.

    Attributes: `bdf`; `name`; `kind`; `acs`: the ACS controls that are enabled, None without the capability;
    `acs_offered`: those that it supports; `identity`: its ids, by which Linux knows its quirks, None: it has none;
    `dma_aliases`: other devfns of its bus that its DMA requests may carry, those of a quirk last;
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
        identity: Identity | None = None,
    ) -> None:
        self.bdf = bdf
        self.kind = kind
        self.name = name or str(bdf)
        self.acs = acs
        self.acs_offered = acs_offered
        self.identity = identity
        #: The quirk by which its DMA requests carry other devfns, if there is one.
        self.alias_quirk = None if identity is None else alias_quirk(identity)
        by_quirk = () if self.alias_quirk is None else self.alias_quirk.aliases(bdf.devfn)
        self.dma_aliases = tuple(dict.fromkeys((*dma_aliases, *by_quirk)))
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
        return self._acs()[0]

    @property
    def acs_by_quirk(self) -> str:
        """The function of Linux with the quirk that decided `has_acs`; "": the capability alone has that result."""
        return self._acs()[1]

    def _acs(self) -> tuple[bool, str]:
        wanted = ISOLATION & self.acs_offered
        plain = self._acs_of_capability(wanted)
        if self.identity is None:
            return plain, ""
        southbridge = self.multifunction and self.home.bridge is None and self.home.topology.has_ivrs
        quirk = acs_quirk(self.identity, self.kind, southbridge)
        if quirk is not None:
            result, by = plain if quirk.isolates is None else quirk.isolates, quirk.origin
        else:
            result = self._acs_of_capability(wanted & ~missing_acs(self.identity))
            by = "pci_disable_broken_acs_cap"
        return result, by if result is not plain else ""

    def _acs_of_capability(self, wanted: AcsFlags) -> bool:
        if self.kind in (PortType.CONVENTIONAL, PortType.PCI_BRIDGE, PortType.PCI_TO_PCIE, PortType.PCIE_TO_PCI):
            return False
        if self.kind not in (PortType.ROOT_PORT, PortType.DOWNSTREAM) and not self.multifunction:
            return True  # there are no other functions to be isolated from
        if self.acs is None:
            return False
        return self.acs & wanted == wanted

    @property
    def bridge_effect(self) -> BridgeEffect:
        """How a bridge handles the requester ids of what is behind it."""
        return self._bridge()[0]

    @property
    def bridge_quirk(self) -> str:
        """The function of Linux with the quirk that decided `bridge_effect`; "": none did."""
        return self._bridge()[1]

    def _bridge(self) -> tuple[BridgeEffect, str]:
        plain = _EFFECTS.get(self.kind, BridgeEffect.NO_ALIAS)
        quirk = None if self.identity is None or not self.kind.is_bridge else bridge_quirk(self.identity)
        if quirk is None:
            return plain, ""
        if quirk.effect is BridgeEffect.SECONDARY_ALIAS:
            # A bridge that hides that it leads from PCIe to PCI: a PCIe port leads to it, or a bridge from PCI to PCIe.
            above = self.home.bridge if self.kind is PortType.PCI_BRIDGE else None
            if above is None or above.kind in (PortType.PCI_BRIDGE, PortType.PCIE_TO_PCI):
                return plain, ""
        if quirk.effect is BridgeEffect.NO_ALIAS and self.kind is not PortType.PCIE_TO_PCI:
            return plain, ""
        return quirk.effect, quirk.origin

    def __repr__(self) -> str:
        return f"<{self.bdf} {self.kind.value} {self.name}>"

    def __str__(self) -> str:
        return str(self.bdf)


class Bus:
    """One bus: its functions, and the bridge above it (None: a root bus)."""

    def __init__(self, topology: Topology, segment: int, number: int, bridge: Function | None) -> None:
        self.topology = topology
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
    """All buses of a machine.

    `has_ivrs`: the firmware has an IVRS table, which describes an AMD IOMMU; a quirk depends on that.
    """

    def __init__(self) -> None:
        self.has_ivrs = False
        self._buses: dict[tuple[int, int], Bus] = {}
        self._functions: dict[Bdf, Function] = {}

    def add_root(self, segment: int = 0, number: int = 0) -> Bus:
        """Adds the root bus of a host bridge.  ValueError: the number is taken."""
        return self._add_bus(segment, number, None)

    def _add_bus(self, segment: int, number: int, bridge: Function | None) -> Bus:
        if (segment, number) in self._buses:
            raise ValueError(f"bus {segment:04x}:{number:02x} is there already")
        bus = self._buses[segment, number] = Bus(self, segment, number, bridge)
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
    # A root complex whose IOMMU is below a bridge to PCIe (ThunderX2).
    rooted = above is PortType.PCI_TO_PCIE and function.bridge_effect is BridgeEffect.TRANSLATION_ROOT
    if kind in (PortType.ROOT_PORT, PortType.INTEGRATED) and above is not None and not rooted:
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
        effect = bridge.bridge_effect
        if effect is BridgeEffect.TRANSLATION_ROOT:
            return
        if effect is BridgeEffect.SECONDARY_ALIAS:
            assert bridge.secondary is not None
            yield Alias(bridge, Bdf(segment, bridge.secondary.number, 0, 0))
        elif effect is BridgeEffect.OWN_ID:
            yield Alias(bridge, bridge.bdf)


def ports_beside(bridge: Function) -> list[Function]:
    """The ports whose ACS decides whether a bridge isolates: those of its switch, or itself."""
    return bridge.home.functions if bridge.kind is PortType.DOWNSTREAM else [bridge]


def isolates(bridge: Function) -> bool:
    """Whether ACS isolates the functions behind a bridge from those behind its neighbours.

    A downstream port without ACS forwards requests to all other ports of its switch, even to ports with ACS; see
    docs/decisions/0004-switches-without-acs.md.
    """
    return all(port.has_acs for port in ports_beside(bridge))


def acs_on_path(bridge: Function) -> bool:
    """Whether ACS isolates from `bridge` all the way to the root."""
    return isolates(bridge) and all(isolates(above) for above in bridges_above(bridge))
