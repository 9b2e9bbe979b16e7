"""The tables of a machine file, and the types of their values."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from vmodel.errors import Access
from vmodel.iommu.capabilities import Capabilities
from vmodel.pci.topology import Bdf, PortType
from vmodel.span import UNITS, GiB, MiB, Span, number

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,39}")


def _memory(value: str) -> str:
    match = re.fullmatch(r"([0-9]{1,9})([KMG])", value)
    if match is None:
        raise ValueError('must be a number and K, M or G, as "512M"')
    size = int(match[1]) * UNITS[match[2]]
    if not 32 * MiB <= size <= 1024 * GiB:
        raise ValueError('must be from "32M" to "1024G"')
    if size % MiB:
        raise ValueError('must be whole mebibytes, as "512M"')
    return value


def _address(value: str) -> str:
    try:
        bdf = Bdf.parse(value)
    except ValueError:
        text = 'must be "SSSS:BB:DD.F" (segment, bus, device 00-1f, function 0-7), as "0000:00:03.0"'
        raise ValueError(text) from None
    if bdf.segment:
        raise ValueError('not possible: QEMU\'s q35 machine has segment 0000 only, as "0000:00:03.0"')
    if not bdf.bus and bdf.device in (0, 31):
        raise ValueError("is QEMU's own on the q35 machine (host bridge, LPC bridge): use device 01 to 1e")
    return str(bdf)


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError("must be a letter, then up to 39 letters, digits, '_', '.' or '-': it names a socket file")
    return value


def _prot(value: object) -> Access:
    known = {"r": Access.READ, "w": Access.WRITE, "rw": Access.READ | Access.WRITE}
    if not isinstance(value, str) or value not in known:
        raise ValueError('must be "r", "w" or "rw"')
    return known[value]


def _covers(value: str) -> str:
    coverage(value)
    return value


def coverage(value: str) -> tuple[Bdf, Bdf]:
    """(first, last) address of "0000", "0000:01", "0000:00:03.0" or "0000:00:03.0-0000:00:1f.7".  ValueError."""
    try:
        first, dash, last = value.partition("-")
        if dash:
            low, high = Bdf.parse(first), Bdf.parse(last)
        elif match := re.fullmatch(r"([0-9a-f]{4})(?::([0-9a-f]{2}))?", value, re.IGNORECASE):
            segment, bus = int(match[1], 16), match[2]
            low = Bdf(segment, int(bus or "0", 16), 0, 0)
            high = Bdf(segment, int(bus or "ff", 16), 31, 7)
        else:
            low = high = Bdf.parse(value)
    except ValueError:
        known = 'a segment "0000", a bus "0000:01", an address "0000:00:03.0", or two with "-" between'
        raise ValueError(f"must be {known}") from None
    if low.segment != high.segment or low > high:
        raise ValueError("runs backwards or over two segments")
    return low, high


Number = Annotated[
    int,
    BeforeValidator(number),
    WithJsonSchema({"type": ["integer", "string"], "description": 'a number, or text as "4K" or "0x4000_0000"'}),
]
Name = Annotated[str, AfterValidator(_name), WithJsonSchema({"type": "string", "pattern": f"^{_NAME.pattern}$"})]
Address = Annotated[
    str,
    AfterValidator(_address),
    WithJsonSchema({"type": "string", "pattern": "^0000:[0-9a-fA-F]{2}:[0-9a-fA-F]{2}\\.[0-7]$"}),
]
Memory = Annotated[str, AfterValidator(_memory), WithJsonSchema({"type": "string", "pattern": "^[0-9]{1,9}[KMG]$"})]
Prot = Annotated[Access, BeforeValidator(_prot), WithJsonSchema({"enum": ["r", "w", "rw"]})]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class MachineTable(_Strict):
    """The machine itself."""

    name: Name = Field(examples=['"edu-demo"'], description="names the control socket and the folder of sockets")
    memory: Memory = Field(
        "512M", examples=['"512M"'], description="the guest's memory; Debian's kernels need 96M or more"
    )
    group_mf: bool = Field(
        False,
        examples=["true"],
        description="all functions of a device share an IOMMU group; false: only those that nothing isolates do",
    )


class LimitsTable(_Strict):
    """Time limits for each client, in seconds: [robustness](../robustness.md)."""

    handshake_timeout: Annotated[float, Field(gt=0, le=86400)] = Field(
        default=5.0, examples=["5.0"], description="from a connection to the end of the version handshake"
    )
    message_timeout: Annotated[float, Field(gt=0, le=86400)] = Field(
        default=5.0, examples=["5.0"], description="from the first byte of a message to its last"
    )


class DeviceTable(_Strict):
    """A device: a model at a PCI address."""

    name: Name = Field(examples=['"edu0"'], description="names its socket, and the device in logs and fault plans")
    model: str = Field(
        examples=['"edu"'], description='a built-in, `"path/file.py:Class"`, or `"package.module:Class"`'
    )
    address: Address = Field(examples=['"0000:00:03.0"'], description="segment, bus, device and function")
    params: dict[str, Any] = Field(default_factory=dict, examples=["{ }"], description="the model's parameters")
    iommu: str | None = Field(
        default=None,
        examples=['"iommu0"'],
        description='the name of an [[iommu]], or `"none"`; else the first that covers the address',
    )
    untrusted: bool = Field(
        default=False,
        examples=["true"],
        description="it is behind an external port: its group has the domain `dma`, whatever `default_domain` is",
    )
    bootindex: Annotated[int, Field(ge=1, le=9999)] | None = Field(
        default=None,
        examples=["1"],
        description="the firmware tries to boot from devices in this order, lowest first; 0 is -kernel",
    )


BRIDGES: dict[str, PortType] = {
    "root-port": PortType.ROOT_PORT,
    "switch-upstream": PortType.UPSTREAM,
    "switch-downstream": PortType.DOWNSTREAM,
    "pcie-to-pci": PortType.PCIE_TO_PCI,
    "pci-bridge": PortType.PCI_BRIDGE,
}


class BridgeTable(_Strict):
    """A bridge, with a bus behind it."""

    name: Name = Field(examples=['"rp0"'], description="its name")
    kind: Literal["root-port", "switch-upstream", "switch-downstream", "pcie-to-pci", "pci-bridge"] = Field(
        examples=['"root-port"'], description="what it is"
    )
    address: Address = Field(examples=['"0000:00:04.0"'], description="segment, bus, device and function")
    secondary: Annotated[int, Field(ge=1, le=255)] = Field(
        examples=["1"], description="number of the bus behind it; the firmware counts in the order of addresses"
    )
    acs: bool | None = Field(
        default=None, examples=["false"], description="has ACS; by default root ports have it, and only they may"
    )
    untrusted: bool = Field(
        default=False, examples=["true"], description="it is an external port: it and all behind it are untrusted"
    )


class CapabilitiesTable(_Strict):
    """Capabilities of an IOMMU: each key overrides the default of the IOMMU's kind."""

    page_sizes: Annotated[list[Number], Field(min_length=1)] | None = Field(
        default=None, examples=['["4K", "2M"]'], description="sizes of pages in bytes, powers of two"
    )
    input_bits: int | None = Field(default=None, examples=["48"], description="width of an IOVA, 13 to 64")
    output_bits: int | None = Field(default=None, examples=["52"], description="width of a GPA, 32 to 64")
    aperture: Annotated[list[Number], Field(min_length=2, max_length=2)] | None = Field(
        default=None,
        examples=['["0x1000", "0xffff_ffff"]'],
        description="first and last IOVA that a paging domain may use; by default all of `input_bits`",
    )
    coherent: bool | None = Field(default=None, examples=["true"], description="table walks snoop the CPU's caches")
    enforce_snoop: bool | None = Field(default=None, examples=["true"], description="DMA can be forced to snoop")
    isolated_msi: bool | None = Field(
        default=None, examples=["true"], description="a device's MSI can only be one of its own interrupts"
    )
    dirty_tracking: bool | None = Field(default=None, examples=["true"], description="records which pages DMA wrote")
    pasid_bits: int | None = Field(default=None, examples=["20"], description="width of a PASID, 0 to 20; 0: none")
    nesting: bool | None = Field(default=None, examples=["true"], description="walks a guest's tables over its own")
    page_requests: bool | None = Field(default=None, examples=["true"], description="devices may request pages (PRI)")
    stall: bool | None = Field(default=None, examples=["false"], description="a faulting access can wait without PRI")
    fault_queue_depth: int | None = Field(
        default=None, examples=["256"], description="fault records that it keeps; more are counted as lost"
    )
    strict: bool | None = Field(
        default=None, examples=["true"], description="each unmap of a kernel's domain flushes the IOTLB at once"
    )
    flush_unmaps: int | None = Field(
        default=None, examples=["256"], description="without `strict`: it is flushed after this number of unmaps"
    )
    flush_ms: float | None = Field(
        default=None, examples=["10.0"], description="without `strict`: it is flushed after these milliseconds"
    )
    max_mappings: int | None = Field(default=None, examples=["1000"], description="most mappings of one domain")
    max_memory: Number | None = Field(
        default=None, examples=['"64M"'], description="most bytes for the mappings of all its domains"
    )

    def over(self, default: Capabilities) -> Capabilities:
        """The capabilities `default` of the kind, overridden by these.  ValueError: the combination is invalid."""
        given = {key: value for key, value in self if value is not None}
        if "page_sizes" in given:
            given["page_sizes"] = frozenset(given["page_sizes"])
        if "aperture" in given:
            first, last = given["aperture"]
            if first > last:
                raise ValueError("aperture: runs backwards")
            given["aperture"] = Span(first, last)
        values = {name: getattr(default, name) for name in default.__dataclass_fields__}
        return Capabilities(**{**values, **given})


class IommuTable(_Strict):
    """An IOMMU."""

    name: Name = Field(examples=['"iommu0"'], description="its name")
    kind: str = Field(
        examples=['"vt-d"'],
        description="vt-d, amd-vi, smmu-v3, riscv, power-pe, pamu or virtio-iommu",
    )
    address: Address | None = Field(
        default=None,
        examples=['"0000:00:02.0"'],
        description="where the guest drives it (vt-d, virtio-iommu); without it the [[group]]s define its domains",
    )
    covers: Annotated[list[Annotated[str, AfterValidator(_covers)]], Field(min_length=1)] = Field(
        ["0000"],
        examples=['["0000:00:03.0-0000:00:1e.7"]'],
        description="segments, buses, addresses or ranges of addresses whose devices are behind it",
    )
    default_domain: Literal["identity", "dma", "dma-fq"] | None = Field(
        default=None,
        examples=['"dma"'],
        description="domain of groups without a [[group]], as Linux's iommu.passthrough and iommu.strict choose it: "
        "identity (without this key), or one without mappings",
    )
    params: dict[str, Any] = Field(default_factory=dict, examples=["{ }"], description="parameters of its kind")
    capabilities: CapabilitiesTable = Field(
        default_factory=CapabilitiesTable, examples=["{ strict = true }"], description="what differs from its kind"
    )


class MappingTable(_Strict):
    """A mapping of a group's paging domain."""

    iova: Number = Field(examples=['"0x4000_0000"'], description="first address that devices use")
    gpa: Number = Field(examples=["0"], description="first address in the guest's memory")
    size: Number = Field(examples=['"512M"'], description="in bytes")
    prot: Prot = Field(
        Access.READ | Access.WRITE,
        examples=['"rw"'],
        description="devices may read, write, or both",
        json_schema_extra={"default": "rw"},
    )


class GroupTable(_Strict):
    """The domain of an IOMMU group, for an IOMMU that has no `address`."""

    device: str = Field(examples=['"edu0"'], description="a device or bridge that is in the group")
    domain: Literal["identity", "blocked", "paging"] = Field(
        examples=['"paging"'],
        description="IOVA = GPA, nothing, or the mappings below; groups without a table: identity",
    )
    mapping: list[MappingTable] = Field(
        default_factory=list, examples=["[]"], description="mappings, of a paging domain"
    )


class GuestTable(_Strict):
    """How guests with this machine are booted; what a command or a test says besides is added to it.

    Paths are relative to the machine file.
    """

    kernel: str | None = Field(
        default=None,
        examples=['"backports"'],
        description="stable (the default), backports or cloud; a version, as 6.12; or the path of an image",
    )
    modules: list[str] = Field(
        default_factory=list,
        examples=['["driver/"]'],
        description="kernel modules to load: names, .ko files, or source folders",
    )
    extra_modules: list[str] = Field(
        default_factory=list, examples=['["nvme"]'], description="modules that `modprobe` can load in the guest"
    )
    files: list[str] = Field(
        default_factory=list,
        examples=['["check.sh"]'],
        description="files for the guest, FILE or FILE:PLACE; the place is by default /root/NAME",
    )
    shares: list[str] = Field(
        default_factory=list,
        examples=['["build", "results:rw"]'],
        description="folders of the host that the guest sees as they are: DIR or DIR:PATH, by default /root/NAME; "
        "`:rw` behind it: it may write to it",
    )
    tools: list[str] = Field(
        default_factory=list,
        examples=['["pciutils:lspci"]'],
        description="Debian's programs for the guest, PACKAGE:PROGRAM, with the libraries and data that they need",
    )
    append: str = Field(
        default="", examples=['"mycard.debug=1"'], description="kernel arguments, parameters of modules, too"
    )
    sanitize: bool = Field(
        default=False, examples=["true"], description="the kernel looks for misuse of memory: see docs/sanitize.md"
    )
    cpus: Annotated[int, Field(ge=1, le=64)] | None = Field(
        default=None, examples=["2"], description="CPUs of the guest; 2 in tests by default, else 1"
    )
    qemu_args: list[str] = Field(
        default_factory=list, examples=['["-rtc", "base=utc"]'], description="more arguments for QEMU"
    )


class MachineFile(_Strict):
    """A machine: its memory, devices, bridges and IOMMUs."""

    machine: MachineTable
    guest: GuestTable = Field(default_factory=GuestTable)
    limits: LimitsTable = Field(default_factory=LimitsTable)
    iommu: list[IommuTable] = Field(default_factory=list)
    bridge: list[BridgeTable] = Field(default_factory=list)
    device: list[DeviceTable] = Field(default_factory=list)
    group: list[GroupTable] = Field(default_factory=list)
