"""Freescale PAMU (QorIQ; Linux drivers/iommu/fsl_pamu_domain.c)."""

from __future__ import annotations

import enum
from collections.abc import Hashable
from typing import Annotated

from pydantic import Field

from vmodel.iommu.capabilities import Capabilities
from vmodel.iommu.domain import DomainType
from vmodel.iommu.driver import Driver, KindParams, PlatformDevice, Source
from vmodel.span import KiB, Span

#: How many entries the table of LIODNs has (Linux PAACE_NUMBER_ENTRIES).
_LIODNS = 0x500


class StashCache(enum.Enum):
    """The caches that a PAMU can write to (Linux enum pamu_stash_target)."""

    L1 = "l1"
    L2 = "l2"
    L3 = "l3"


class Pamu(Driver):
    """Devices have a LIODN.  Newer PCI controllers have one for each function, older ones one for all functions."""

    kind, title = "pamu", "Freescale PAMU"
    formats = frozenset()
    # Windows may have any power of two as size (PAACE); addresses have 36 bits.
    default = Capabilities(
        page_sizes=frozenset(4 * KiB << n for n in range(25)),
        input_bits=36,
        output_bits=36,
        aperture=Span(0, (1 << 36) - 1),
        enforce_snoop=False,
        isolated_msi=False,
        dirty_tracking=False,
        pasid_bits=0,
        nesting=False,
        page_requests=False,
        strict=True,
    )

    class Params(KindParams):
        """Parameters of PAMU."""

        partitioned: bool = Field(default=True, description="PCI controllers have a LIODN for each function")
        liodns: dict[str, Annotated[int, Field(ge=0, lt=_LIODNS)]] = Field(
            default_factory=dict, description="LIODN of each platform device, PCI function, or PCI controller (segment)"
        )
        stash: dict[Annotated[str, Field(pattern=r"^(l3|l[12]\.[0-9]{1,4})$")], Annotated[int, Field(ge=0, le=255)]] = (
            Field(default_factory=dict, description="cache-stash-id of caches: of `l3`, and as `l1.0` of L1 of CPU 0")
        )

    def requester_id(self, source: Source) -> int | None:
        found: int | None = self.params.liodns.get(self._liodn_key(source))
        return found

    def _liodn_key(self, source: Source) -> str:
        if isinstance(source, PlatformDevice) or self.params.partitioned:
            return str(source)
        return f"{source.bdf.segment:04x}"

    def why_not(self, source: Source) -> str:
        return f"it has no LIODN: params.liodns has no {self._liodn_key(source)!r}"

    def describe_id(self, requester_id: int) -> str:
        return f"LIODN {requester_id}"

    def default_domain_type(self, source: Source, max_pasids: int | None) -> DomainType | None:
        return DomainType.IDENTITY

    def partition(self, source: Source) -> tuple[Hashable, str] | None:
        if not isinstance(source, PlatformDevice) and not self.params.partitioned:
            return ("controller", source.bdf.segment), "its PCI controller has one LIODN for all functions"
        return None
