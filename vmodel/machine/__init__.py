"""Machine files: reads TOML and makes the objects; each mistake is one line that says what would be right.

```toml
[machine]
name = "edu-demo"
memory = "512M"

[[iommu]]                      # optional; without one, IOVA = GPA
name = "iommu0"
kind = "vt-d"                  # or amd-vi, smmu-v3, riscv, power-pe, pamu, virtio-iommu
covers = ["0000:00:03.0-0000:00:1e.7"]

[[device]]
name = "edu0"
model = "edu"                  # a built-in, or "path/file.py:Class", or "package.module:Class"
address = "0000:00:03.0"
params = { }

[[group]]                      # the group that edu0 is in
device = "edu0"
domain = "paging"              # or identity (the default), blocked

[[group.mapping]]
iova = "0x4000_0000"
gpa = 0
size = "512M"
prot = "rw"
```

All mistakes of a file are found in one run: a mistake in one table does not stop the checks of others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vmodel.config_file import parse_toml, read_text
from vmodel.device import PciDevice
from vmodel.device.outside import TIMEOUT, call, device_of
from vmodel.devices.iommu import IommuDevice
from vmodel.dma_report import DmaReport, DmaWatch
from vmodel.errors import ConfigError, IommuError
from vmodel.files import create
from vmodel.iommu.allocate import dma_domain_alloc
from vmodel.iommu.capabilities import RegionType
from vmodel.iommu.domain import Domain, DomainType
from vmodel.iommu.endpoint import Endpoint
from vmodel.iommu.group import Group
from vmodel.iommu.iommu import Coverage, Iommu
from vmodel.iommu.system import System
from vmodel.logs import report_held
from vmodel.machine.acpi import dmar_of, viot_of
from vmodel.machine.check import Check
from vmodel.machine.models import load_model, load_served
from vmodel.machine.schema import GroupTable, IommuTable, MachineFile, MappingTable, coverage
from vmodel.mistakes import exception_line
from vmodel.pci.extcaps import Ats, Pasid
from vmodel.pci.topology import Function
from vmodel.qemu import bridge_args, device_args, memory_args, spare_default_devices
from vmodel.server import MAX_SOCKET_PATH, Server
from vmodel.span import Span
from vmodel.vfio_user.version import Limits

__all__ = ["DEFAULT_DOMAINS", "Machine", "MachineErrors", "load", "load_model", "parse"]


class MachineErrors(ConfigError):
    """All mistakes in one file; str() gives a line for each."""

    def __init__(self, errors: Sequence[ConfigError]) -> None:
        super().__init__("\n".join(map(str, errors)))
        self.errors = list(errors)


def _pasids(device: PciDevice) -> int:
    """How many PASIDs a device can use, by its capability."""
    parts = device.declaration.capabilities.values()
    return next((1 << part.width for part in parts if isinstance(part, Pasid)), 0)


#: The values of `default_domain`, as Linux's iommu.passthrough=1, and iommu.strict=1 and 0, choose them.
DEFAULT_DOMAINS = {"identity": DomainType.IDENTITY, "dma": DomainType.DMA, "dma-fq": DomainType.DMA_FQ}
#: Sections whose tables are functions.
_NAMED = ("iommu", "bridge", "device")


def _is_at_or_behind(source: object, name: str) -> bool:
    """Whether a function has this name, or is behind a bridge that has it."""
    while isinstance(source, Function):
        if source.name == name:
            return True
        source = source.home.bridge
    return False


class Machine:
    """A machine as its file describes it, with its devices and IOMMUs."""

    def __init__(self, raw: Mapping[str, Any], file: Path, *, default_domain: DomainType = DomainType.IDENTITY) -> None:
        """`raw` is the file's content, parsed as TOML; `file` is for error messages.  MachineErrors.

        `default_domain`: of IOMMUs that the guest does not drive and that have no such key.
        """
        check = Check(raw, file)
        if check.content is None or check.errors:
            raise MachineErrors(check.errors)
        self.file = file
        self.content: MachineFile = check.content
        self.name = check.content.machine.name
        self.memory = check.content.machine.memory
        self.topology = check.topology
        #: The devices by name, in the file's order.
        self.devices: dict[str, PciDevice] = {}
        #: IOMMUs, endpoints and groups.
        self.system = System(self.topology, group_mf=check.content.machine.group_mf, default=default_domain)
        self._functions = check.functions
        self._watch: DmaWatch | None = None
        #: Names of the tables with `untrusted`.
        self._untrusted = [t.name for t in check.content.bridge if t.untrusted]
        self._untrusted += [t.name for t in check.content.device if t.untrusted]
        try:
            self._make_devices(check)
            self._make_iommus(check)
            self._check_untrusted()
            self._serve_iommus()
            self._set_default_domains()
            self._set_domains()
        except BaseException:
            self.close()
            raise

    def _make_devices(self, check: Check) -> None:
        for n, table in enumerate(self.content.device):
            try:
                made = check.models[n](table.name, check.params[n], multifunction=self._shares_slot(table.name))
            except Exception as error:  # any exception of the model's code is a mistake in the user's choice of model
                text = str(error) if isinstance(error, ConfigError) else exception_line(error)
                message = f"model {table.model!r} cannot be made: {text}"
                raise ConfigError(message, file=self.file, key=f"device[{n}].model") from error
            self.devices[table.name] = made

    def _make_iommu_device(self, table: IommuTable) -> None:
        model = load_served(table.kind)
        self.devices[table.name] = model(table.name, multifunction=self._shares_slot(table.name))

    def _shares_slot(self, name: str) -> bool:
        return self._functions[name].multifunction

    # ---- IOMMUs ----------------------------------------------------------------------------

    def _make_iommus(self, check: Check) -> None:
        for n, table in enumerate(self.content.iommu):
            driver = check.drivers[n]
            covers = [Coverage.pci(*coverage(text)) for text in table.covers]
            default = None if table.address is None else DomainType.IDENTITY  # until the guest drives it
            if table.default_domain is not None:
                default = DEFAULT_DOMAINS[table.default_domain]
            capabilities = table.capabilities.over(driver.default)
            self.system.add_iommu(Iommu(table.name, driver, covers, capabilities, default=default))
            if table.address is not None:
                self._make_iommu_device(table)
        served = {table.name for table in self.content.iommu}
        chosen = {table.name: table.iommu for table in self.content.device}
        by_name = {iommu.name: iommu for iommu in self.system.iommus}
        for function in self.topology.functions():
            device, wish = self.devices.get(function.name), chosen.get(function.name)
            try:
                endpoint = self.system.add(
                    function,
                    device.dma.requester if device is not None else None,
                    iommu=by_name.get(wish or ""),
                    bypass=wish == "none" or function.name in served,
                    max_pasids=0 if device is None else _pasids(device),
                    untrusted=self._is_untrusted(function),
                )
            except IommuError as error:
                raise ConfigError(error.strerror or "", file=self.file, key=self._table_of(function.name)) from None
            if device is not None:
                endpoint.has_ats = any(isinstance(part, Ats) for part in device.declaration.capabilities.values())
                device.dma.endpoint = endpoint

    def _table_of(self, name: str) -> str:
        """The table of a device, bridge or IOMMU in the file."""
        places = [(section, n, table) for section in _NAMED for n, table in enumerate(getattr(self.content, section))]
        return next(f"{section}[{n}]" for section, n, table in places if table.name == name)

    def _is_untrusted(self, function: Function) -> bool:
        """Whether it, or a bridge above it, is (Linux set_pcie_untrusted)."""
        if function.name in self._untrusted:
            return True
        above = function.home.bridge
        return above is not None and self._is_untrusted(above)

    def _check_untrusted(self) -> None:
        """ConfigError: an external port without an IOMMU that could protect the guest, or that the guest drives."""
        for name in self._untrusted:
            behind = [e for e in self.system.endpoints if _is_at_or_behind(e.source, name)]
            covered = [endpoint.iommu for endpoint in behind if endpoint.iommu is not None]
            served = [iommu for iommu in covered if iommu.name in self.devices]
            if not covered:
                text = f"{name!r}: no IOMMU covers it, so it reaches all memory: leave this out"
            elif served:
                text = f"{name!r}: the guest drives {served[0].name!r}, and chooses its domain: leave this out"
            else:
                continue
            raise ConfigError(text, file=self.file, key=f"{self._table_of(name)}.untrusted")

    def _set_default_domains(self) -> None:
        """Once all devices are there.  ConfigError: none of an IOMMU's groups can have its default domain."""
        try:
            self.system.set_defaults(g for g in self.system.groups if g.iommu.name not in self.devices)
        except IommuError as error:
            raise ConfigError(error.strerror or "", file=self.file) from None
        for n, iommu in enumerate(self.system.iommus):
            types = {group.default_domain.type for group in self.system.groups if group.iommu is iommu}
            if iommu.default is not None and types and iommu.default not in types:
                text = f"no group of it can have one: {iommu.driver.title} needs {', '.join(t.value for t in types)}"
                raise ConfigError(text, file=self.file, key=f"iommu[{n}].default_domain")

    def _serve_iommus(self) -> None:
        for n, iommu in enumerate(self.system.iommus):
            device = self.devices.get(iommu.name)
            if isinstance(device, IommuDevice):
                device.peers = self.devices
                try:
                    device.serve(iommu, self.system)
                except ConfigError as error:
                    raise ConfigError(str(error), file=self.file, key=f"iommu[{n}].capabilities") from None

    def _set_domains(self) -> None:
        by_group: dict[Group, str] = {}
        for n, table in enumerate(self.content.group):
            endpoint = self.system[table.device]
            group = endpoint.group
            if group is None:
                raise self._wrong(n, "device", f"{table.device!r} is in no group: {endpoint.why}")
            if group.iommu.name in self.devices:
                raise self._wrong(
                    n, "device", f"{table.device!r} is behind {group.iommu.name!r}, which the guest drives"
                )
            if group in by_group:
                raise self._wrong(
                    n, "device", f"{table.device!r} is in one group with {by_group[group]!r}: give it once"
                )
            by_group[group] = table.device
            self._set_domain(n, table, endpoint, group)

    def _wrong(self, n: int, key: str, message: str) -> ConfigError:
        return ConfigError(message, file=self.file, key=f"group[{n}].{key}")

    def _set_domain(self, n: int, table: GroupTable, endpoint: Endpoint, group: Group) -> None:
        if table.domain != "paging":
            if table.mapping:
                raise self._wrong(n, "mapping", f'a domain "{table.domain}" has no mappings: only "paging" has')
            untrusted = next((e.name for e in group.endpoints if e.untrusted), None)
            if table.domain == "identity" and untrusted is not None:
                text = f'"identity": {untrusted!r} is untrusted, and would reach all memory: "paging" or "blocked"'
                raise self._wrong(n, "domain", text)
            self._set_default(n, group, group.iommu.identity if table.domain == "identity" else group.iommu.blocked)
            return
        domain = dma_domain_alloc(endpoint)
        for m, mapping in enumerate(table.mapping):
            self._check_mapping(n, m, mapping, group)
            try:
                domain.map(mapping.iova, mapping.gpa, mapping.size, mapping.prot)
            except IommuError as error:
                page = group.iommu.capabilities.smallest_page
                hint = f" (pages of {page:#x} bytes, aperture {domain.aperture})"
                raise self._wrong(n, f"mapping[{m}]", f"{error.strerror}{hint}") from None
        self._set_default(n, group, domain)

    def _set_default(self, n: int, group: Group, domain: Domain) -> None:
        try:
            group.set_default(domain, forced=True)
        except IommuError as error:
            raise self._wrong(n, "domain", error.strerror or "") from None

    def _check_mapping(self, n: int, m: int, mapping: MappingTable, group: Group) -> None:
        if not mapping.size or mapping.iova + mapping.size > 1 << 64:
            raise self._wrong(n, f"mapping[{m}].size", f"{mapping.size:#x}: must be at least 1, and end below 2**64")
        span = Span.sized(mapping.iova, mapping.size)
        for region in group.reserved_regions:
            if region.type in (RegionType.MSI, RegionType.RESERVED) and region.span.overlaps(span):
                text = f"{span} reaches into {region.span}, which is reserved ({region.type.value})"
                raise self._wrong(n, f"mapping[{m}].iova", text)

    # ---- serving ---------------------------------------------------------------------------

    def serve(self, run_dir: Path, *, debug: bool = False) -> Server:
        """Makes a server, not started yet, with a socket RUN_DIR/NAME.sock for each device; writes the ACPI tables.

        `debug`: hooks may take as long as a debugger needs.  ConfigError: as in Server.add, or a table is not written.
        """
        self._write_acpi(run_dir)
        server = Server(Limits(**self.content.limits.model_dump()), watch=not debug)
        try:
            for name, device in self.devices.items():
                server.add(device, self.socket(name, run_dir))
        except BaseException:
            server.stop()
            raise
        return server

    def socket(self, name: str, run_dir: Path) -> Path:
        """The path of a device's socket.  ConfigError: it is too long for a socket, or is not UTF-8 text."""
        path = run_dir / f"{name}.sock"
        try:
            size = len(str(path).encode())
        except UnicodeEncodeError:
            message = f"{name!r}: its socket {path} is not UTF-8 text, as QEMU needs it: use --run-dir"
            raise ConfigError(message, file=self.file, key=self._key_of(name)) from None
        if size > MAX_SOCKET_PATH:
            message = f"{name!r}: its socket {path} has {size} bytes, at most {MAX_SOCKET_PATH} work: use --run-dir"
            raise ConfigError(message, file=self.file, key=self._key_of(name))
        return path

    def _key_of(self, name: str) -> str:
        """The key of a device's name in the file."""
        section = "device" if any(table.name == name for table in self.content.device) else "iommu"
        names = [table.name for table in getattr(self.content, section)]
        return f"{section}[{names.index(name)}].name"

    def qemu_args(self, run_dir: Path, *, debug: bool = False) -> list[str]:
        """QEMU's arguments for this machine: shared memory, bridges, a -device for each function, ACPI tables.

        `debug`: QEMU waits for answers as long as a debugger needs.
        """
        functions = self._functions
        args = memory_args(self.memory) + spare_default_devices(f.bdf for f in functions.values())
        bridges = [function for function in self.topology.functions() if function.kind.is_bridge]
        for number, bridge in enumerate(bridges, 1):
            args += bridge_args(bridge, number)
        boots = {table.name: table.bootindex for table in self.content.device}
        for name in self.devices:
            args += device_args(name, self.socket(name, run_dir), functions[name], boots.get(name), debug=debug)
        for signature in self.acpi_tables():
            # QEMU escapes a comma as two.  It splits the list of files at colons, for which there is no escape.
            path = str(self._acpi_file(run_dir, signature))
            if ":" in path:
                raise ConfigError(f"{path}: QEMU takes no ACPI table at a path with ':': use another --run-dir")
            args += ["-acpitable", f"file={path.replace(',', ',,')}"]
        return args

    def call(self, method: str, *arguments: Any, timeout: float = TIMEOUT, **named: Any) -> Any:
        """Calls "DEVICE.METHOD", which the model marks with `@outside`, on the device's thread; returns its result.

        It raises what the method raises.  OutsideError: no such device or method, or wrong arguments.  CallTimeout: it
        has not returned within `timeout` seconds, or the machine is not served.
        """
        device, name = device_of(self.devices, method)
        return call(device, name, arguments, named, seconds=timeout)

    # ---- the DMA sanitizer -----------------------------------------------------------------

    @property
    def watches_dma(self) -> bool:
        """Whether `watch_dma` was called."""
        return self._watch is not None

    def watch_dma(self, *, restart: bool = False) -> DmaWatch:
        """Records from now on what the guest maps for devices behind an IOMMU, and what they do with it.

        If it was called before, that record goes on; `restart` begins a new one.
        """
        if self._watch is None or restart:
            if self._watch is not None:
                self._watch.close()
            self._watch = DmaWatch(self.name, self.system.endpoints)
        return self._watch

    def dma_report(self) -> DmaReport:
        """What `watch_dma` has recorded, with what is wrong in it.  RuntimeError: it was not called.

        ```python
        machine.watch_dma()
        ...
        assert not machine.dma_report().signs
        ```
        """
        if self._watch is None:
            raise RuntimeError("nothing was recorded: call watch_dma() before the guest boots")
        return self._watch.report()

    # ---- ACPI ------------------------------------------------------------------------------

    def acpi_tables(self) -> dict[str, bytes]:
        """The ACPI tables by signature, "VIOT" or "DMAR", that describe the IOMMUs which the guest drives."""
        served = [device for device in self.devices.values() if isinstance(device, IommuDevice)]
        found = {}
        for signature, build in (("VIOT", viot_of), ("DMAR", dmar_of)):
            if content := build(served):
                found[signature] = content
        return found

    def remove_acpi(self, run_dir: Path) -> None:
        """Removes the ACPI tables that `serve` wrote."""
        for signature in self.acpi_tables():
            self._acpi_file(run_dir, signature).unlink(missing_ok=True)

    def _write_acpi(self, run_dir: Path) -> None:
        for signature, content in self.acpi_tables().items():
            path = self._acpi_file(run_dir, signature)
            try:
                with create(path) as file:
                    file.write(content)
            except OSError as error:
                raise ConfigError(f"cannot write {path}: {error.strerror}") from error

    def _acpi_file(self, run_dir: Path, signature: str) -> Path:
        return run_dir / f"{self.name}.{signature.lower()}"

    def close(self) -> None:
        """Releases the devices' resources.  Does nothing if a device is abandoned, as its thread may still use them."""
        if self.abandoned:
            return
        self.system.close()
        for device in self.devices.values():
            device.close()
        report_held()

    @property
    def abandoned(self) -> bool:
        """Whether a device is abandoned, as its thread did not end; see Server.stop."""
        return any(device.backend.abandoned for device in self.devices.values())


def parse(text: str, file: Path, *, default_domain: DomainType = DomainType.IDENTITY) -> Machine:
    """Makes the machine that `text` describes; `file` is for messages.  ConfigError, one line for each mistake."""
    return Machine(parse_toml(text, file), file, default_domain=default_domain)


def load(path: Path, *, default_domain: DomainType = DomainType.IDENTITY) -> Machine:
    """Makes the machine that a file describes; `default_domain` as in Machine.

    ConfigError, one line for each mistake.
    """
    text = read_text(path)
    if not text.strip():
        raise ConfigError('is empty: a machine file needs a [machine] table with name = "edu-demo"', file=path)
    return parse(text, path, default_domain=default_domain)
