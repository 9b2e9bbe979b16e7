"""Capabilities of an IOMMU, and the reserved regions of its address space."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from vmodel.errors import Access
from vmodel.span import GiB, KiB, MiB, Span


class RegionType(enum.Enum):
    """Kinds of reserved regions (Linux enum iommu_resv_type)."""

    #: Always mapped 1:1; a device with such a region cannot be assigned to a user.
    DIRECT = "direct"
    #: Mapped 1:1 for the kernel's driver; not mapped when a user owns the device.
    DIRECT_RELAXABLE = "direct-relaxable"
    #: Must not be mapped.
    RESERVED = "reserved"
    #: Writes to it are interrupts, and are not translated.
    MSI = "msi"
    #: The kernel maps the doorbell of the interrupt controller here.
    SW_MSI = "sw-msi"


@dataclass(frozen=True)
class ReservedRegion:
    """IOVAs of a device that cannot be used for ordinary mappings."""

    span: Span
    type: RegionType
    access: Access = Access.READ | Access.WRITE


#: The interrupt window of x86.
X86_MSI = ReservedRegion(Span(0xFEE0_0000, 0xFEEF_FFFF), RegionType.MSI)
#: The region in which Linux maps interrupt doorbells on Arm.
ARM_MSI = ReservedRegion(Span(0x0800_0000, 0x080F_FFFF), RegionType.SW_MSI)


#: The most milliseconds for a flush; a thread cannot sleep for any time.
_LONGEST_MS = 24 * 60 * 60 * 1000


@dataclass(frozen=True)
class Capabilities:
    """Capabilities of an IOMMU.

    `page_sizes` in bytes; `input_bits` and `output_bits`: widths of IOVA and GPA; `aperture`: the IOVAs that a paging
    domain may use, None for all of `input_bits`; `coherent`: table walks snoop the CPU's caches; `enforce_snoop`: DMA
    can be forced to snoop; `isolated_msi`: a device's MSI can only be one of its own interrupts (Linux
    IRQ_DOMAIN_FLAG_ISOLATED_MSI); `pasid_bits`: 0 for no PASIDs; `stall`: a faulting access can wait without PRI;
    `fault_queue_depth` in records; `strict`: each unmap of a kernel domain flushes the IOTLB at once, else after
    `flush_unmaps` unmaps or `flush_ms` milliseconds; `max_mappings`: limit of one domain; `max_memory`: limit in bytes
    for the mappings of all its domains together.
    """

    page_sizes: frozenset[int] = frozenset((4 * KiB, 2 * MiB, GiB))
    input_bits: int = 48
    output_bits: int = 52
    aperture: Span | None = None
    coherent: bool = True
    enforce_snoop: bool = True
    isolated_msi: bool = True
    dirty_tracking: bool = True
    pasid_bits: int = 20
    nesting: bool = True
    page_requests: bool = True
    stall: bool = False
    fault_queue_depth: int = 256
    strict: bool = False
    flush_unmaps: int = 256
    flush_ms: float = 10.0
    max_mappings: int = 1 << 24
    max_memory: int = 256 * MiB
    reserved: tuple[ReservedRegion, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.page_sizes or any(not 4 * KiB <= size < 1 << 64 or size & (size - 1) for size in self.page_sizes):
            raise ValueError("page sizes must be powers of two of at least 4 KiB")
        limits = {
            "input_bits": (self.input_bits, 13, 64),
            "output_bits": (self.output_bits, 32, 64),
            "pasid_bits": (self.pasid_bits, 0, 20),
            "fault_queue_depth": (self.fault_queue_depth, 1, 1 << 20),
            "flush_unmaps": (self.flush_unmaps, 1, 1 << 20),
            "max_mappings": (self.max_mappings, 1, 1 << 32),
            "max_memory": (self.max_memory, 64 * KiB, 1 << 40),
        }
        for name, (value, low, high) in limits.items():
            if not low <= value <= high:
                raise ValueError(f"{name} must be from {low} to {high}, not {value}")
        if not 0 < self.flush_ms <= _LONGEST_MS:
            raise ValueError(f"flush_ms must be more than 0, and at most {_LONGEST_MS} (a day), not {self.flush_ms}")
        if self.aperture is not None and self.aperture.last >= 1 << self.input_bits:
            raise ValueError(f"the aperture {self.aperture} needs more than {self.input_bits} bits")

    @property
    def smallest_page(self) -> int:
        """The smallest page size, in bytes."""
        return min(self.page_sizes)

    @property
    def usable(self) -> Span:
        """The IOVAs that paging domains may use."""
        return self.aperture or Span(0, (1 << self.input_bits) - 1)

    @property
    def can_wait(self) -> bool:
        """Whether a faulting access may wait for its page."""
        return self.page_requests or self.stall
