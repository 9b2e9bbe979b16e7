"""Invalidation descriptors of 128 and 256 bits (6.5.2): checks them and carries them out."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Protocol

from vmodel.devices.vtd.contexts import Contexts
from vmodel.devices.vtd.regs import RootAddress, TranslationTableMode
from vmodel.iommu.drivers.vtd_capability import MOST_ADDRESS_MASK
from vmodel.iommu.fault import PageResponse
from vmodel.regs import Bit, Bits, Layout
from vmodel.span import PAGE, Span

#: Most descriptors in one turn; between turns the unit serves its client.
TURN = 256
#: Nanoseconds after which a turn begins no further descriptor: one may concern many translations.
TURN_NS = 10_000_000


class QueueFault(enum.IntEnum):
    """IQER.IQEI (11.4.9.9; the names are not the specification's)."""

    UNKNOWN = 0
    TAIL = 1
    FETCH = 2
    TYPE = 3
    RESERVED = 4
    WIDTH = 5
    UNALIGNED = 6
    MODE = 7


class QueueStopped(Exception):
    """A descriptor is invalid: the queue stops at it."""

    def __init__(self, why: QueueFault) -> None:
        super().__init__(why.name)
        self.why = why


class Granularity(enum.IntEnum):
    """Granularity of an invalidation: G, CIRG and IIRG."""

    ALL = 1
    DOMAIN = 2
    #: Context cache: a device; IOTLB: pages.
    ONE = 3


class PasidGranularity(enum.IntEnum):
    """G of PASID-based IOTLB invalidations."""

    PASID = 2
    PAGES = 3


class PasidCacheGranularity(enum.IntEnum):
    """G of PASID-cache invalidations."""

    DOMAIN = 0
    PASID = 1
    ALL = 3


#: By FM: the bits of the function number that are ignored (6.5.2.1).
FUNCTION_MASKS = (0, 4, 6, 7)
#: By response code; any other code is a failure (PCIe 10.4.2.2).
_RESPONSES = {int(code): code for code in PageResponse}


class _Nothing(Layout):
    """A reserved word, which has to be 0."""


class _ContextInvalidate(Layout):
    """Context-cache invalidate, first word (6.5.2.1)."""

    TYPE = Bits(0, 3)
    G = Bits(4, 5)
    TYPE_HIGH = Bits(9, 11)
    DID = Bits(16, 31)
    SID = Bits(32, 47)
    FM = Bits(48, 49)


class _PasidCache(Layout):
    """PASID-cache invalidate (6.5.2.2)."""

    TYPE = Bits(0, 3)
    G = Bits(4, 5)
    TYPE_HIGH = Bits(9, 11)
    DID = Bits(16, 31)
    PASID = Bits(32, 51)


class _Iotlb(Layout):
    """IOTLB invalidate (6.5.2.3)."""

    TYPE = Bits(0, 3)
    G = Bits(4, 5)
    DW = Bit(6)
    DR = Bit(7)
    TYPE_HIGH = Bits(9, 11)
    DID = Bits(16, 31)


class _IotlbAddress(Layout):
    """Second word of both IOTLB invalidates."""

    AM = Bits(0, 5)
    IH = Bit(6)
    ADDR = Bits(12, 63)


class _PasidIotlb(Layout):
    """PASID-based IOTLB invalidate (6.5.2.4)."""

    TYPE = Bits(0, 3)
    G = Bits(4, 5)
    TYPE_HIGH = Bits(9, 11)
    DID = Bits(16, 31)
    PASID = Bits(32, 51)


class _DeviceTlb(Layout):
    """Device-TLB invalidate (6.5.2.5)."""

    TYPE = Bits(0, 3)
    TYPE_HIGH = Bits(9, 11)
    PFSID_LOW = Bits(12, 15)
    MIP = Bits(16, 20)
    SID = Bits(32, 47)
    PFSID_HIGH = Bits(52, 63)


class _DeviceTlbAddress(Layout):
    """Its second word."""

    S = Bit(0)
    ADDR = Bits(12, 63)


class _PasidDeviceTlb(Layout):
    """PASID-based device-TLB invalidate (6.5.2.6)."""

    TYPE = Bits(0, 3)
    MIP = Bits(4, 8)
    TYPE_HIGH = Bits(9, 11)
    PFSID_LOW = Bits(12, 15)
    SID = Bits(16, 31)
    PASID = Bits(32, 51)
    PFSID_HIGH = Bits(52, 63)


class _PasidDeviceTlbAddress(Layout):
    """Its second word."""

    G = Bit(0)
    S = Bit(11)
    ADDR = Bits(12, 63)


class _Wait(Layout):
    """Invalidation wait (6.5.2.8)."""

    TYPE = Bits(0, 3)
    IF = Bit(4)
    SW = Bit(5)
    FN = Bit(6)
    TYPE_HIGH = Bits(9, 11)
    DATA = Bits(32, 63)


class _WaitAndDrain(Layout):
    """The same with ECAP.PDS."""

    TYPE = Bits(0, 3)
    IF = Bit(4)
    SW = Bit(5)
    FN = Bit(6)
    PD = Bit(7)
    TYPE_HIGH = Bits(9, 11)
    DATA = Bits(32, 63)


class _WaitAddress(Layout):
    """Its second word."""

    ADDRESS = Bits(2, 63)


class _PageGroup(Layout):
    """Page group response (7.7.1)."""

    TYPE = Bits(0, 3)
    PP = Bit(4)
    TYPE_HIGH = Bits(9, 11)
    RC = Bits(12, 15)
    RID = Bits(16, 31)
    PASID = Bits(32, 51)


class _PageGroupIndex(Layout):
    """Its second word; the others are the device's own data, and there is none."""

    LPIG = Bit(2)
    PRGI = Bits(3, 11)


class Unit(Protocol):
    """What descriptors do besides invalidating caches."""

    def wait(self, address: int | None, data: int, interrupt: bool) -> None:
        """Carries out a wait descriptor: writes `data` to `address`, None: nowhere; may interrupt.  QueueStopped."""

    def answer(self, source: int, pasid: int | None, index: int, response: PageResponse) -> None:
        """Delivers the response to a page request."""


def check_offsets(head: int, tail: int, size: int, width: int) -> None:
    """Checks head and tail, bytes in a queue of `size` bytes with descriptors of `width` bytes.  QueueStopped.

    Software moves the tail.  The head is at a place that is none if software has changed size or width while the queue
    was on; no value of IQEI is for that.
    """
    if tail >= size:
        raise QueueStopped(QueueFault.TAIL)
    if tail % width:
        raise QueueStopped(QueueFault.UNALIGNED)
    if head >= size or head % width:
        raise QueueStopped(QueueFault.UNKNOWN)


def check_mode(root: int, wide: bool) -> None:
    """Checks that RTADDR's translation mode allows descriptors of this width.  QueueStopped."""
    mode = RootAddress(root).TTM
    if mode not in list(TranslationTableMode):
        raise QueueStopped(QueueFault.MODE)
    if mode == TranslationTableMode.SCALABLE and not wide:
        raise QueueStopped(QueueFault.WIDTH)


def invalidate_contexts(contexts: Contexts, granularity: int, domain_id: int, source: int, mask: int) -> bool:
    """Carries out a context-cache invalidation; returns False if there is no such granularity."""
    if granularity == Granularity.ALL:
        contexts.invalidate()
    elif granularity == Granularity.DOMAIN:
        contexts.invalidate(domain_id)
    elif granularity == Granularity.ONE:
        # By source-id alone: a domain-id that differs from the cached entry's is software's mistake, which is ignored.
        contexts.invalidate(source=source, mask=FUNCTION_MASKS[mask])
    else:
        return False
    return True


def invalidate_iotlb(contexts: Contexts, granularity: int, domain_id: int, page: int, address_mask: int) -> bool:
    """Carries out an IOTLB invalidation; returns False if there is no such granularity, or too many pages."""
    if granularity == Granularity.ALL:
        contexts.flush()
    elif granularity == Granularity.DOMAIN:
        contexts.flush(domain_id)
    elif granularity == Granularity.ONE and address_mask <= MOST_ADDRESS_MASK:
        contexts.flush(domain_id, _pages(page, address_mask))
    else:
        return False
    return True


def _pages(page: int, address_mask: int) -> Span:
    size = PAGE << address_mask
    return Span.sized(page * PAGE // size * size, size)


def carry_out(contexts: Contexts, words: Sequence[int], unit: Unit) -> None:
    """Carries out a descriptor of two or four words.  QueueStopped: it is invalid."""
    kind = _ContextInvalidate.TYPE.of(words[0]) | _ContextInvalidate.TYPE_HIGH.of(words[0]) << 4
    if kind not in _KINDS or (kind in _SCALABLE and not contexts.ecap.SMTS) or (kind == 9 and not contexts.ecap.PRS):
        raise QueueStopped(QueueFault.TYPE)
    _KINDS[kind](contexts, words, unit)


def _context(contexts: Contexts, words: Sequence[int], unit: Unit) -> None:
    _check(words, _ContextInvalidate)
    asked = _ContextInvalidate(words[0])
    if not invalidate_contexts(contexts, asked.G, asked.DID, asked.SID, asked.FM):
        raise QueueStopped(QueueFault.RESERVED)


def _pasid_cache(contexts: Contexts, words: Sequence[int], unit: Unit) -> None:
    _check(words, _PasidCache)
    asked = _PasidCache(words[0])
    if asked.G == PasidCacheGranularity.ALL:
        contexts.invalidate_pasids()
    elif asked.G == PasidCacheGranularity.DOMAIN:
        contexts.invalidate_pasids(asked.DID)
    elif asked.G == PasidCacheGranularity.PASID:
        contexts.invalidate_pasids(asked.DID, asked.PASID)
    else:
        raise QueueStopped(QueueFault.RESERVED)


def _iotlb(contexts: Contexts, words: Sequence[int], unit: Unit) -> None:
    _check(words, _Iotlb, _IotlbAddress)
    asked, where = _Iotlb(words[0]), _IotlbAddress(words[1])
    if not invalidate_iotlb(contexts, asked.G, asked.DID, where.ADDR, where.AM):
        raise QueueStopped(QueueFault.RESERVED)


def _pasid_iotlb(contexts: Contexts, words: Sequence[int], unit: Unit) -> None:
    _check(words, _PasidIotlb, _IotlbAddress)
    asked, where = _PasidIotlb(words[0]), _IotlbAddress(words[1])
    if asked.G == PasidGranularity.PASID:
        contexts.flush_pasid(asked.DID, asked.PASID)
    elif asked.G == PasidGranularity.PAGES and where.AM <= MOST_ADDRESS_MASK:
        contexts.flush_pasid(asked.DID, asked.PASID, _pages(where.ADDR, where.AM))
    else:
        raise QueueStopped(QueueFault.RESERVED)


def _device_tlb(contexts: Contexts, words: Sequence[int], unit: Unit) -> None:
    _check(words, _DeviceTlb, _DeviceTlbAddress)
    asked, where = _DeviceTlb(words[0]), _DeviceTlbAddress(words[1])
    contexts.flush_device(asked.SID, _sized(where.ADDR, bool(where.S)))


def _pasid_device_tlb(contexts: Contexts, words: Sequence[int], unit: Unit) -> None:
    _check(words, _PasidDeviceTlb, _PasidDeviceTlbAddress)
    asked, where = _PasidDeviceTlb(words[0]), _PasidDeviceTlbAddress(words[1])
    contexts.flush_device(asked.SID, _sized(where.ADDR, bool(where.S)), asked.PASID, bool(where.G))


def _sized(page: int, several: bool) -> Span:
    """The IOVAs of a device-TLB invalidation.

    With S, the lowest clear bit of the address gives the size; if no bit is clear, it is everything (PCIe 10.3.2).
    """
    if not several:
        return Span.sized(page * PAGE, PAGE)
    bits = 13 + (~page & page + 1).bit_length() - 1
    if bits >= 64:
        return Span(0, (1 << 64) - 1)
    return Span.sized(page * PAGE >> bits << bits, 1 << bits)


def _wait(contexts: Contexts, words: Sequence[int], unit: Unit) -> None:
    _check(words, _WaitAndDrain if contexts.ecap.PDS else _Wait, _WaitAddress)
    # Earlier descriptors are complete, and page requests are in their queue: fence (FN) and drain (PD) need no action.
    asked = _Wait(words[0])
    unit.wait(words[1] if asked.SW else None, asked.DATA, bool(asked.IF))


def _page_group(contexts: Contexts, words: Sequence[int], unit: Unit) -> None:
    _check(words, _PageGroup, _PageGroupIndex)
    asked, group = _PageGroup(words[0]), _PageGroupIndex(words[1])
    pasid = asked.PASID if asked.PP else None
    unit.answer(asked.RID, pasid, group.PRGI, _RESPONSES.get(asked.RC, PageResponse.FAILURE))


#: By descriptor type.  Without ECAP.DT, device-TLB invalidations have no effect, as in QEMU's unit.
_KINDS: dict[int, Callable[[Contexts, Sequence[int], Unit], None]] = {
    1: _context,
    2: _iotlb,
    3: _device_tlb,
    5: _wait,
    6: _pasid_iotlb,
    7: _pasid_cache,
    8: _pasid_device_tlb,
    9: _page_group,
}
_SCALABLE = frozenset((6, 7, 8, 9))


def _check(words: Sequence[int], *layouts: type[Layout]) -> None:
    for n, word in enumerate(words):
        layout = layouts[n] if n < len(layouts) else _Nothing
        if word & ~sum(field.mask for field in layout.fields):
            raise QueueStopped(QueueFault.RESERVED)
