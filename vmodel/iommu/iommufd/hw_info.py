"""`HwInfo`: what IOMMU_GET_HW_INFO returns about a device and its IOMMU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HwInfo:
    """A device and its IOMMU, as IOMMU_GET_HW_INFO describes them.

    `page_sizes` in bytes; `pasid_bits`: 0 if the device, or the IOMMU, has no PASIDs.
    """

    kind: str
    coherent: bool
    enforce_snoop: bool
    dirty_tracking: bool
    pasid_bits: int
    page_sizes: frozenset[int]
