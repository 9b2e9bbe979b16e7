"""Checks of a machine file that involve more than one key.

All mistakes are found in one run: a mistake in one table does not stop the checks of others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vmodel.device import Params, PciDevice
from vmodel.devices import IOMMUS
from vmodel.errors import ConfigError
from vmodel.iommu.driver import Driver
from vmodel.iommu.drivers import KINDS
from vmodel.machine.models import load_model
from vmodel.machine.schema import BRIDGES, MachineFile
from vmodel.mistakes import Location, explain, guess
from vmodel.pci.express import Pcie
from vmodel.pci.extcaps import Acs
from vmodel.pci.topology import ISOLATION, AcsFlags, Bdf, Function, PortType, Topology

_SECTIONS = ("machine", "limits", "iommu", "bridge", "device", "group")


class Check:
    """Finds the mistakes in a parsed file; `errors` are ordered by section, then by table."""

    def __init__(self, raw: Mapping[str, Any], file: Path) -> None:
        self.file = file
        self.content: MachineFile | None = None
        self.models: dict[int, type[PciDevice]] = {}
        #: The validated parameters of each device.
        self.params: dict[int, Params] = {}
        self.drivers: dict[int, Driver] = {}
        self.topology = Topology()
        #: The function of each bridge and device, by name.
        self.functions: dict[str, Function] = {}
        self._found: list[ConfigError] = []
        #: Keys whose own value is wrong.
        self._wrong: set[Location] = set()
        try:
            self.content = MachineFile.model_validate(raw)
        except ValidationError as error:
            self._wrong = {detail["loc"][:3] for detail in error.errors(include_url=False)}
            self._found += explain(error, file, MachineFile)
        #: The valid keys of each table, by section: keys whose own value is wrong are left out.
        self.sound = {section: self._sound(section, raw.get(section)) for section in _SECTIONS[2:]}
        for n, table in enumerate(self.sound["device"]):
            if "model" in table:
                self._model(n, table)
        for n, table in enumerate(self.sound["iommu"]):
            if "kind" in table:
                self._driver(n, table)
            if "address" in table and "kind" in table:
                self._served_iommu(n, table)
        self._names()
        self._addresses()
        if not self._found:
            self._lay_out()

    def _sound(self, section: str, tables: object) -> list[dict[str, Any]]:
        found = []
        for n, table in enumerate(tables if isinstance(tables, list) else []):
            known = table if isinstance(table, dict) else {}
            sound = {k: v for k, v in known.items() if (section, n, k) not in self._wrong}
            if "address" in sound:
                sound["address"] = sound["address"].lower()
            found.append(sound)
        return found

    @property
    def errors(self) -> list[ConfigError]:
        """The mistakes, ordered by section and table."""

        def place(error: ConfigError) -> tuple[int, int]:
            match = re.match(r"(\w+)\[(\d+)\]", error.key)
            section = match[1] if match else error.key.partition(".")[0]
            # Unknown sections, and mistakes that concern the whole file, come first.
            rank = _SECTIONS.index(section) if section in _SECTIONS else -1
            return rank, int(match[2]) if match else -1

        return sorted(self._found, key=place)

    def wrong(self, section: str, n: int, key: str, message: str) -> None:
        """Adds a mistake: `key` of table number `n` of a section."""
        self._found.append(ConfigError(message, file=self.file, key=f"{section}[{n}].{key}"))

    # ---- one table -------------------------------------------------------------------------

    def _model(self, n: int, table: Mapping[str, Any]) -> None:
        try:
            self.models[n] = model = load_model(table["model"], self.file.parent)
        except ConfigError as error:
            self.wrong("device", n, "model", str(error))
            return
        try:
            # Paths in parameters are relative to the machine file, as paths of models are.
            self.params[n] = model.Params.model_validate(table.get("params", {}), context={"base": self.file.parent})
        except ValidationError as error:
            self._found += explain(error, self.file, model.Params, f"device[{n}].params")

    def _driver(self, n: int, table: Mapping[str, Any]) -> None:
        kind = table["kind"]
        if kind not in KINDS:
            close = guess(kind, list(KINDS))
            hint = f"did you mean {close!r}? " if close else ""
            self.wrong("iommu", n, "kind", f"{kind!r}: {hint}Kinds are {', '.join(KINDS)}")
            return
        try:
            self.drivers[n] = KINDS[kind](table.get("params", {}))
        except ValidationError as error:
            self._found += explain(error, self.file, KINDS[kind].Params, f"iommu[{n}].params")
        if self.content is not None:
            try:
                capabilities = self.content.iommu[n].capabilities.over(KINDS[kind].default)
                if n in self.drivers:
                    self.drivers[n].fit(capabilities)
            except ValueError as error:
                self.wrong("iommu", n, "capabilities", str(error))
            if self.content.iommu[n].address is None:
                for key in sorted(KINDS[kind].served_params & self.content.iommu[n].params.keys()):
                    text = "is for an IOMMU that a guest drives: give it an address, or leave this out"
                    self.wrong("iommu", n, f"params.{key}", text)

    def _served_iommu(self, n: int, table: Mapping[str, Any]) -> None:
        if "default_domain" in table:
            text = "the guest drives this IOMMU, and chooses (iommu.passthrough, iommu.strict): leave it out"
            self.wrong("iommu", n, "default_domain", text)
        if table["kind"] not in KINDS:
            return  # an unknown kind is one mistake, which `_driver` reports
        if table["kind"] not in IOMMUS:
            text = (
                f"no guest can drive an IOMMU of kind {table['kind']}, only {', '.join(IOMMUS)}: leave the address out"
            )
            self.wrong("iommu", n, "address", text)
        elif Bdf.parse(table["address"]).bus:
            self.wrong("iommu", n, "address", f"{table['address']!r}: an IOMMU must be on bus 00")
        elif table["kind"] == "vt-d":
            # The address of the registers is fixed (vmodel/devices/vtd), so there can be only one unit.
            others = [t for t in self.sound["iommu"][:n] if t.get("kind") == "vt-d" and "address" in t]
            if others:
                text = f"a guest can drive one vt-d only, and {others[0].get('name', '')!r} is one"
                self.wrong("iommu", n, "address", f"{text}: leave one of the addresses out")

    # ---- names and addresses ---------------------------------------------------------------

    def _tables(self, *sections: str) -> Iterator[tuple[str, int, dict[str, Any]]]:
        for section in sections:
            for n, table in enumerate(self.sound[section]):
                yield section, n, table

    def _names(self) -> None:
        names: dict[str, str] = {}
        for section, n, table in self._tables("iommu", "bridge", "device"):
            name = table.get("name")
            here = f"{section}[{n}]"
            if name is not None and names.setdefault(name, here) != here:
                self.wrong(section, n, "name", f"{name!r} is the name of {names[name]} already: give each its own")
            if name == "none":
                self.wrong(section, n, "name", "'none' means no IOMMU: choose another")
        iommus = [table.get("name", "") for table in self.sound["iommu"]]
        for _, n, table in self._tables("device"):
            chosen = table.get("iommu")
            if chosen not in (None, "none", *iommus):
                known = ", ".join(iommus) or "there is no [[iommu]]"
                self.wrong("device", n, "iommu", f'{chosen!r} is no [[iommu]]: {known}; or "none"')
        members = [table.get("name", "") for _, _, table in self._tables("bridge", "device")]
        for _, n, table in self._tables("group"):
            if "device" in table and table["device"] not in members:
                close = guess(table["device"], members)
                hint = f": did you mean {close!r}?" if close else ""
                self.wrong("group", n, "device", f"there is no device {table['device']!r}{hint}")

    def _addresses(self) -> None:
        addresses: dict[str, tuple[str, int]] = {}
        for section, n, table in self._tables("iommu", "bridge", "device"):
            address = table.get("address")
            if address is not None and addresses.setdefault(address, (section, n)) != (section, n):
                first, at = addresses[address]
                other = self.sound[first][at].get("name", f"{first}[{at}]")
                self.wrong(section, n, "address", f"{address!r} is taken by {other!r}: give each device its own")
        boots: dict[int, int] = {}
        for section, n, table in self._tables("device"):
            index = table.get("bootindex")
            if index is not None and boots.setdefault(index, n) != n:
                other = self.sound["device"][boots[index]].get("name", f"device[{boots[index]}]")
                self.wrong(section, n, "bootindex", f"{index} is taken by {other!r}: give each device its own")
        for section, n, table in self._tables("iommu", "bridge", "device"):
            address = table.get("address", "0")
            if address[-1] != "0" and f"{address[:-1]}0" not in addresses:
                text = f"{address!r} needs a device at function 0 of its slot, {address[:-1]}0"
                self.wrong(section, n, "address", text)

    # ---- topology --------------------------------------------------------------------------

    def _lay_out(self) -> None:
        """Adds all functions to the topology."""
        self.topology.add_root()
        waiting = [item for item in self._tables("iommu", "bridge", "device") if "address" in item[2]]
        # A bridge may be listed before the bridge that it is behind.
        while waiting:
            ready = [item for item in waiting if (0, Bdf.parse(item[2]["address"]).bus) in self.topology]
            if not ready:
                for section, n, table in waiting:
                    bus = Bdf.parse(table["address"]).bus
                    text = f"{table['address']!r}: there is no bus {bus:02x}: add a [[bridge]] with secondary = {bus}"
                    self.wrong(section, n, "address", text)
                return
            waiting = [item for item in waiting if item not in ready]
            for section, n, table in ready:
                self._place(section, n, table)
        self._numbering()

    def _place(self, section: str, n: int, table: Mapping[str, Any]) -> None:
        bdf = Bdf.parse(table["address"])
        if section == "bridge":
            function = self._bridge(n, bdf, table)
        elif section == "device":
            function = self._device(n, bdf, table["name"])
        else:
            function = Function(bdf, PortType.CONVENTIONAL, name=table["name"])
        try:
            self.topology.add(function, table.get("secondary"))
        except ValueError as error:
            key = "secondary" if "bus" in str(error) and "there already" in str(error) else "address"
            self.wrong(section, n, key, str(error))
        else:
            self.functions[table["name"]] = function

    def _bridge(self, n: int, bdf: Bdf, table: Mapping[str, Any]) -> Function:
        kind = BRIDGES[table["kind"]]
        acs = table.get("acs")
        if acs and kind is not PortType.ROOT_PORT:
            self.wrong("bridge", n, "acs", f"QEMU's {kind.value} has no ACS: only root ports can have acs = true")
        has = acs if acs is not None else kind is PortType.ROOT_PORT
        return Function(bdf, kind, name=table["name"], acs=ISOLATION if has else None)

    def _device(self, n: int, bdf: Bdf, name: str) -> Function:
        model = self.models[n]
        capabilities = model.declaration.capabilities.values()
        above = self.topology.bus(bdf.segment, bdf.bus).bridge
        kind = PortType.INTEGRATED if above is None else PortType.ENDPOINT
        if above is not None and above.kind in (PortType.PCI_BRIDGE, PortType.PCIE_TO_PCI):
            kind = PortType.CONVENTIONAL
        if not any(isinstance(capability, Pcie) for capability in capabilities):
            kind = PortType.CONVENTIONAL
        # An operating system that uses an IOMMU enables the controls that a function supports.
        offered = next((AcsFlags(c.capability) & ISOLATION for c in capabilities if isinstance(c, Acs)), None)
        identity = model.declaration.identity
        return Function(bdf, kind, name=name, acs=offered, acs_offered=offered or ISOLATION, identity=identity)

    def _numbering(self) -> None:
        """Checks secondary bus numbers: the firmware assigns them in the order in which it finds the bridges."""
        bridges = [f for f in self.topology.functions() if f.secondary is not None]
        places = {table["name"]: n for _, n, table in self._tables("bridge")}
        for number, bridge in enumerate(bridges, 1):
            assert bridge.secondary is not None
            if bridge.secondary.number != number and not self._found:
                text = f"{bridge.secondary.number}: the firmware numbers the bus behind {bridge.name!r} {number}"
                self.wrong(
                    "bridge", places[bridge.name], "secondary", f"{text}: buses in order of the bridges' addresses"
                )
