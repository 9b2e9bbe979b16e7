"""Freescale PAMU (QorIQ; Linux drivers/iommu/fsl_pamu_domain.c)."""

from __future__ import annotations

from collections.abc import Hashable

from pydantic import Field

from vmodel.iommu.capabilities import Capabilities
from vmodel.iommu.driver import Driver, KindParams, PlatformDevice, Source
from vmodel.span import KiB, Span


class Pamu(Driver):
    """Devices carry a LIODN.  Newer PCI controllers give each function its own, older ones have one for all."""

    kind, title = "pamu", "Freescale PAMU"
    formats = frozenset()
    # Windows of any power of two (PAACE); 36 bits of address.
    default = Capabilities(
        page_sizes=frozenset(4 * KiB << n for n in range(25)),
        input_bits=36,
        output_bits=36,
        aperture=Span(0, (1 << 36) - 1),
        enforce_snoop=False,
        dirty_tracking=False,
        pasid_bits=0,
        nesting=False,
        page_requests=False,
        strict=True,
    )

    class Params(KindParams):
        """Parameters of PAMU."""

        partitioned: bool = Field(default=True, description="PCI controllers tell their functions apart")
        liodns: dict[str, int] = Field(
            default_factory=dict, description="LIODN of each platform device, PCI function, or PCI controller (segment)"
        )

    def requester_id(self, source: Source) -> int | None:
        name = str(source)
        if not isinstance(source, PlatformDevice) and not self.params.partitioned:
            name = f"{source.bdf.segment:04x}"
        found: int | None = self.params.liodns.get(name)
        return found

    def why_not(self, source: Source) -> str:
        return "no LIODN is given to it"

    def describe_id(self, requester_id: int) -> str:
        return f"LIODN {requester_id}"

    def partition(self, source: Source) -> tuple[Hashable, str] | None:
        if not isinstance(source, PlatformDevice) and not self.params.partitioned:
            return ("controller", source.bdf.segment), "its PCI controller has one LIODN for all functions"
        return None
