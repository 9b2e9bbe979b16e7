"""`Coherency`: how a kind of IOMMU decides whether DMA snoops the CPU's caches."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Coherency:
    """How a kind of IOMMU decides whether an access through a paging domain snoops.

    `enforces`: Linux's driver has the operation enforce_cache_coherency; `always`: entries force requests to snoop,
    asked for or not; `by_mapping`: entries have memory attributes: only what is mapped with IOMMU_CACHE is coherent.
    Without any of these the request decides: with PCIe's attribute No Snoop it does not snoop (PCIe 5.0, 2.2.6.5).
    """

    enforces: bool = False
    always: bool = False
    by_mapping: bool = False

    def snoops(self, *, cache: bool, forced: bool, no_snoop: bool) -> bool:
        """Whether an access snoops: `cache`, IOMMU_CACHE of its mapping; `forced`: the domain, or the entry, enforces.

        What is enforced is that nothing bypasses IOMMU_CACHE, so it does not help a mapping without it (Linux
        include/linux/iommu.h, enforce_cache_coherency).
        """
        if self.by_mapping and not cache:
            return False
        return self.always or forced or not no_snoop
