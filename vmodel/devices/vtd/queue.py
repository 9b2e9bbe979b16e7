"""Invalidation descriptors of 128 bits (6.5.2): what they ask for, and what is wrong with them."""

from __future__ import annotations

import enum
from collections.abc import Callable

from vmodel.devices.vtd.contexts import Contexts
from vmodel.devices.vtd.regs import MOST_ADDRESS_MASK
from vmodel.regs import Bit, Bits, Layout
from vmodel.span import PAGE, Span


class QueueFault(enum.IntEnum):
    """IQER.IQEI (11.4.9.9; names are ours)."""

    UNKNOWN = 0
    TAIL = 1
    FETCH = 2
    TYPE = 3
    RESERVED = 4


class QueueStopped(Exception):
    """A descriptor cannot be carried out; the queue stops at it."""

    def __init__(self, why: QueueFault) -> None:
        super().__init__(why.name)
        self.why = why


class Granularity(enum.IntEnum):
    """What is meant by G, CIRG and IIRG."""

    ALL = 1
    DOMAIN = 2
    #: Context cache: a device; IOTLB: pages.
    ONE = 3


#: 6.5.2.1: bits of a function number that do not matter, by FM.
FUNCTION_MASKS = (0, 4, 6, 7)


class _Context(Layout):
    """Context-cache invalidate, low half (6.5.2.1)."""

    TYPE = Bits(0, 3)
    G = Bits(4, 5)
    TYPE_HIGH = Bits(9, 11)
    DID = Bits(16, 31)
    SID = Bits(32, 47)
    FM = Bits(48, 49)


class _Iotlb(Layout):
    """IOTLB invalidate, low half (6.5.2.3)."""

    TYPE = Bits(0, 3)
    G = Bits(4, 5)
    DW = Bit(6)
    DR = Bit(7)
    TYPE_HIGH = Bits(9, 11)
    DID = Bits(16, 31)


class _IotlbAddress(Layout):
    """The same, high half."""

    AM = Bits(0, 5)
    IH = Bit(6)
    ADDR = Bits(12, 63)


class _DeviceTlb(Layout):
    """Device-TLB invalidate, low half (6.5.2.5)."""

    TYPE = Bits(0, 3)
    TYPE_HIGH = Bits(9, 11)
    PFSID_LOW = Bits(12, 15)
    MIP = Bits(16, 20)
    SID = Bits(32, 47)
    PFSID_HIGH = Bits(52, 63)


class _DeviceTlbAddress(Layout):
    """The same, high half."""

    S = Bit(0)
    ADDR = Bits(12, 63)


class _Wait(Layout):
    """Invalidation wait, low half (6.5.2.8)."""

    TYPE = Bits(0, 3)
    IF = Bit(4)
    SW = Bit(5)
    FN = Bit(6)
    TYPE_HIGH = Bits(9, 11)
    DATA = Bits(32, 63)


class _WaitAddress(Layout):
    """The same, high half."""

    ADDRESS = Bits(2, 63)


def invalidate_contexts(contexts: Contexts, granularity: int, domain_id: int, source: int, mask: int) -> bool:
    """Carries a context-cache invalidation out; False: there is no such granularity."""
    if granularity == Granularity.ALL:
        contexts.forget()
    elif granularity == Granularity.DOMAIN:
        contexts.forget(domain_id)
    elif granularity == Granularity.ONE:
        # By the device alone: a domain-id that is not the cached entry's is software's mistake, and forgiven.
        contexts.forget(source=source, mask=FUNCTION_MASKS[mask])
    else:
        return False
    return True


def invalidate_iotlb(contexts: Contexts, granularity: int, domain_id: int, page: int, address_mask: int) -> bool:
    """Carries an IOTLB invalidation out; False: there is no such granularity, or there are too many pages."""
    if granularity == Granularity.ALL:
        contexts.flush()
    elif granularity == Granularity.DOMAIN:
        contexts.flush(domain_id)
    elif granularity == Granularity.ONE and address_mask <= MOST_ADDRESS_MASK:
        size = PAGE << address_mask
        contexts.flush(domain_id, Span.sized(page * PAGE // size * size, size))
    else:
        return False
    return True


def carry_out(contexts: Contexts, low: int, high: int, wait: Callable[[int | None, int, bool], None]) -> None:
    """One descriptor.  QueueStopped.

    `wait` gets the address for the status, or None, what to write there, and whether to interrupt.
    """
    kind = _Context.TYPE.of(low) | _Context.TYPE_HIGH.of(low) << 4
    if kind == 1:
        _check(_Context, low)
        _check(Layout, high)
        entry = _Context(low)
        if not invalidate_contexts(contexts, entry.G, entry.DID, entry.SID, entry.FM):
            raise QueueStopped(QueueFault.RESERVED)
    elif kind == 2:
        _check(_Iotlb, low)
        _check(_IotlbAddress, high)
        tlb, where = _Iotlb(low), _IotlbAddress(high)
        if not invalidate_iotlb(contexts, tlb.G, tlb.DID, where.ADDR, where.AM):
            raise QueueStopped(QueueFault.RESERVED)
    elif kind == 3:
        # No device has a TLB (ECAP.DT): nothing to do, as in QEMU's unit without it.
        _check(_DeviceTlb, low)
        _check(_DeviceTlbAddress, high)
    elif kind == 5:
        _check(_Wait, low)
        _check(_WaitAddress, high)
        # What came before is done: a fence (FN) asks for nothing more.
        asked = _Wait(low)
        wait(high if asked.SW else None, asked.DATA, bool(asked.IF))
    else:
        raise QueueStopped(QueueFault.TYPE)


def _check(layout: type[Layout], value: int) -> None:
    known = sum(field.mask for field in layout.fields)
    if value & ~known:
        raise QueueStopped(QueueFault.RESERVED)
