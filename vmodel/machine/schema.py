"""The tables of a machine file, and the types of their values."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

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


Number = Annotated[int, BeforeValidator(number)]
Name = Annotated[str, AfterValidator(_name)]
Address = Annotated[str, AfterValidator(_address)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class MachineTable(_Strict):
    """`[machine]`."""

    name: Name = Field(examples=['"edu-demo"'])
    memory: Annotated[str, AfterValidator(_memory)] = Field("512M", examples=['"512M"'])
    group_mf: bool = Field(False, examples=["true"])


class LimitsTable(_Strict):
    """`[limits]`: time limits for each client in seconds; see docs/robustness.md."""

    handshake_timeout: Annotated[float, Field(gt=0, le=86400)] = Field(default=5.0, examples=["5.0"])
    message_timeout: Annotated[float, Field(gt=0, le=86400)] = Field(default=5.0, examples=["5.0"])


class DeviceTable(_Strict):
    """`[[device]]`."""

    name: Name = Field(examples=['"edu0"'])
    model: str = Field(examples=['"edu"'])
    address: Address = Field(examples=['"0000:00:03.0"'])
    params: dict[str, Any] = Field(default_factory=dict, examples=["{ }"])
    #: The name of an [[iommu]], or "none"; None: the first IOMMU that covers the address.
    iommu: str | None = Field(default=None, examples=['"iommu0"'])
    #: The firmware tries to boot from devices in this order, the lowest first; 0 is the kernel of QEMU's -kernel.
    bootindex: Annotated[int, Field(ge=1, le=9999)] | None = Field(default=None, examples=["1"])


BRIDGES: dict[str, PortType] = {
    "root-port": PortType.ROOT_PORT,
    "switch-upstream": PortType.UPSTREAM,
    "switch-downstream": PortType.DOWNSTREAM,
    "pcie-to-pci": PortType.PCIE_TO_PCI,
    "pci-bridge": PortType.PCI_BRIDGE,
}


class BridgeTable(_Strict):
    """`[[bridge]]`."""

    name: Name = Field(examples=['"rp0"'])
    kind: Literal["root-port", "switch-upstream", "switch-downstream", "pcie-to-pci", "pci-bridge"] = Field(
        examples=['"root-port"']
    )
    address: Address = Field(examples=['"0000:00:04.0"'])
    secondary: Annotated[int, Field(ge=1, le=255)] = Field(examples=["1"])
    acs: bool | None = Field(default=None, examples=["false"])


class CapabilitiesTable(_Strict):
    """`capabilities` of an `[[iommu]]`: each key overrides the default of the IOMMU's kind."""

    page_sizes: Annotated[list[Number], Field(min_length=1)] | None = Field(default=None, examples=['["4K", "2M"]'])
    input_bits: int | None = Field(default=None, examples=["48"])
    output_bits: int | None = Field(default=None, examples=["52"])
    aperture: Annotated[list[Number], Field(min_length=2, max_length=2)] | None = Field(
        default=None, examples=['["0x1000", "0xffff_ffff"]']
    )
    coherent: bool | None = Field(default=None, examples=["true"])
    enforce_snoop: bool | None = Field(default=None, examples=["true"])
    dirty_tracking: bool | None = Field(default=None, examples=["true"])
    pasid_bits: int | None = Field(default=None, examples=["20"])
    nesting: bool | None = Field(default=None, examples=["true"])
    page_requests: bool | None = Field(default=None, examples=["true"])
    stall: bool | None = Field(default=None, examples=["false"])
    fault_queue_depth: int | None = Field(default=None, examples=["256"])
    strict: bool | None = Field(default=None, examples=["true"])
    flush_unmaps: int | None = Field(default=None, examples=["256"])
    flush_ms: float | None = Field(default=None, examples=["10.0"])
    max_mappings: int | None = Field(default=None, examples=["1000"])
    max_memory: Number | None = Field(default=None, examples=['"64M"'])

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
    """`[[iommu]]`."""

    name: Name = Field(examples=['"iommu0"'])
    kind: str = Field(examples=['"vt-d"'])
    #: The PCI address at which the guest drives the IOMMU; None: the file's [[group]]s define its domains.
    address: Address | None = Field(default=None, examples=['"0000:00:02.0"'])
    covers: Annotated[list[Annotated[str, AfterValidator(_covers)]], Field(min_length=1)] = Field(
        ["0000"], examples=['["0000:00:03.0-0000:00:1e.7"]']
    )
    params: dict[str, Any] = Field(default_factory=dict, examples=["{ }"])
    capabilities: CapabilitiesTable = Field(default_factory=CapabilitiesTable, examples=["{ strict = true }"])


class MappingTable(_Strict):
    """`[[group.mapping]]`."""

    iova: Number = Field(examples=['"0x4000_0000"'])
    gpa: Number = Field(examples=["0"])
    size: Number = Field(examples=['"512M"'])
    prot: Annotated[Access, BeforeValidator(_prot)] = Field(Access.READ | Access.WRITE, examples=['"rw"'])


class GroupTable(_Strict):
    """`[[group]]`."""

    device: str = Field(examples=['"edu0"'])
    domain: Literal["identity", "blocked", "paging"] = Field(examples=['"paging"'])
    mapping: list[MappingTable] = Field(default_factory=list, examples=["[]"])


class GuestTable(_Strict):
    """`[guest]`: how guests with this machine are booted; what a command or a test says besides is added to it."""

    kernel: str | None = Field(default=None, examples=['"backports"'])
    modules: list[str] = Field(default_factory=list, examples=['["driver/"]'])
    extra_modules: list[str] = Field(default_factory=list, examples=['["nvme"]'])
    files: list[str] = Field(default_factory=list, examples=['["check.sh"]'])
    #: Folders of the host that the guest sees as they are: "DIR", "DIR:PATH", and ":rw" behind if it may write to them.
    #: PATH is by default /root/NAME.
    shares: list[str] = Field(default_factory=list, examples=['["build", "results:rw"]'])
    append: str = Field(default="", examples=['"mycard.debug=1"'])
    cpus: Annotated[int, Field(ge=1, le=64)] | None = Field(default=None, examples=["2"])
    qemu_args: list[str] = Field(default_factory=list, examples=['["-rtc", "base=utc"]'])


class MachineFile(_Strict):
    """The whole file."""

    machine: MachineTable
    guest: GuestTable = Field(default_factory=GuestTable)
    limits: LimitsTable = Field(default_factory=LimitsTable)
    iommu: list[IommuTable] = Field(default_factory=list)
    bridge: list[BridgeTable] = Field(default_factory=list)
    device: list[DeviceTable] = Field(default_factory=list)
    group: list[GroupTable] = Field(default_factory=list)
