"""`DmaFinding`: one kind of mistake of a driver's, with the mappings that show it; `SIGNS`, all kinds."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from vmodel.mistakes import guess


class Severity(enum.StrEnum):
    """What a finding costs."""

    #: Memory is leaked or damaged, or would be with another IOMMU.
    ERROR = "error"
    #: More of the memory can be reached than is needed, or for longer.
    WARNING = "warning"
    #: It may be meant so.
    NOTE = "note"


class Sure(enum.StrEnum):
    """How sure a finding is."""

    #: It was seen to happen.
    CERTAIN = "certain"
    #: There are rare reasons for which a right driver does it.
    LIKELY = "likely"
    #: A right driver may well do it.
    POSSIBLE = "possible"


@dataclass(frozen=True)
class FindingKind:
    """A kind of finding."""

    title: str
    severity: Severity
    sure: Sure
    #: What it means, and what to do about it; two sentences.
    meaning: str
    advice: str


_E, _W, _N = Severity.ERROR, Severity.WARNING, Severity.NOTE

#: All kinds, the gravest first.
SIGNS: dict[str, FindingKind] = {
    "dma-after-unmap": FindingKind(
        "use after unmap",
        _E,
        Sure.CERTAIN,
        "The device accessed memory that the driver had unmapped, and that may belong to somebody else by then.",
        "Stop the transfer, and wait until the device has stopped, before the unmap.",
    ),
    "dma-unmapped": FindingKind(
        "never mapped",
        _E,
        Sure.CERTAIN,
        "The device accessed an address that was not mapped: one that is physical or virtual, damaged, or too long.",
        "Give the device what dma_map_*() returned, and no more bytes than were mapped.",
    ),
    "dma-direction": FindingKind(
        "wrong direction",
        _E,
        Sure.CERTAIN,
        "The device read what was mapped to be written only, or wrote what was mapped to be read only.",
        "Map with the direction of the transfer: DMA_TO_DEVICE if the device reads, DMA_FROM_DEVICE if it writes.",
    ),
    "dma-in-flight": FindingKind(
        "in flight at the end",
        _E,
        Sure.CERTAIN,
        "The device accessed memory after its bus mastering was turned off, by the driver or by a reset.",
        "Stop the device's queues, and wait for what was submitted, before pci_clear_master() or a reset.",
    ),
    "dma-leak": FindingKind(
        "leak",
        _E,
        Sure.CERTAIN,
        "It is still mapped, though the driver has released the device: the address is lost, the page stays open.",
        "Unmap in remove() and on each path of an error what was mapped.",
    ),
    "dma-exposed": FindingKind(
        "kernel pointers in reach",
        _W,
        Sure.LIKELY,
        "A page was mapped for a part of it: the device can reach the rest, in which there are pointers of the kernel.",
        "Use a buffer of its own page, or of dma_alloc_coherent(), or make the kernel bounce (untrusted devices).",
    ),
    "dma-mapped-twice": FindingKind(
        "mapped twice",
        _W,
        Sure.LIKELY,
        "One page was in two live mappings, one of them writable: the unmap of one leaves the page open by the other.",
        "Do not share a page between buffers of different transfers.",
    ),
    "dma-both-directions": FindingKind(
        "both directions",
        _W,
        Sure.LIKELY,
        "It was mapped to be read and written, and the device did only one of them.",
        "Map with DMA_TO_DEVICE or DMA_FROM_DEVICE; some kernels' IOMMU drivers make what is writable readable, too.",
    ),
    "dma-too-large": FindingKind(
        "too large",
        _W,
        Sure.LIKELY,
        "Whole pages of a mapping were never touched by the device.",
        "Map what the transfer needs.",
    ),
    "dma-unused": FindingKind(
        "never used",
        _W,
        Sure.POSSIBLE,
        "It was mapped and unmapped, and the device never touched it.",
        "Map when the device is to use it; what is cancelled before it began is unused, too, and that is right.",
    ),
    "dma-held": FindingKind(
        "held",
        _N,
        Sure.POSSIBLE,
        "It was mapped before the driver last released the device, and has not been used since the driver is back.",
        "If it is a buffer that is kept over a reset, all is well; else it is a leak.",
    ),
}


class SpanShown(BaseModel):
    """A mapping that shows a finding, or the place of an access."""

    model_config = ConfigDict(frozen=True)

    iova: int
    #: In bytes; of an access that met no mapping: 0.
    size: int
    gpa: int | None
    #: Seconds since the watch began.
    at: float
    #: The same, in words.
    text: str


class DmaFinding(BaseModel):
    """All that was found of one kind at one endpoint."""

    model_config = ConfigDict(frozen=True)

    sign: str
    #: The endpoints that share the mappings, as "nvme0"; mostly there is one.
    endpoint: str
    severity: Severity
    sure: Sure
    #: "3 mappings of 12 KiB are still there".
    text: str
    #: Mappings or accesses.
    count: int
    #: Of the mappings, where that means something; else 0.
    bytes: int
    #: The first of them that are known, at most EXAMPLES.
    examples: tuple[SpanShown, ...]

    @property
    def kind(self) -> FindingKind:
        """What all findings of its sign have in common."""
        return SIGNS[self.sign]


#: Most examples of a finding.
EXAMPLES = 8


def signs_of(names: Iterable[str]) -> frozenset[str]:
    """The signs that these names stand for: a sign, or "error" or "warning", which is all signs that are as grave.

    >>> sorted(signs_of(["dma-leak"])), signs_of(["warning"]) > signs_of(["error"])
    (['dma-leak'], True)

    ValueError: one is neither, or is the sign of a note, which is no mistake.
    """
    grave = [Severity.ERROR, Severity.WARNING]
    judged = [sign for sign, kind in SIGNS.items() if kind.severity in grave]
    found: set[str] = set()
    for name in names:
        if name in judged:
            found.add(name)
        elif name in grave:
            least = grave.index(Severity(name))
            found |= {sign for sign in judged if grave.index(SIGNS[sign].severity) <= least}
        else:
            known = (*judged, *(severity.value for severity in grave))
            close = guess(name, known)
            hint = f"did you mean {close!r}?" if close else f"known are {', '.join(known)}"
            raise ValueError(f"{name!r} is no sign of a DMA finding: {hint}")
    return frozenset(found)
