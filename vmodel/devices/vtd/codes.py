"""Fault reasons (7.1.3, the names are not the specification's), and the fault reason of a failed walk."""

from __future__ import annotations

import enum

from vmodel.errors import Access, Reason
from vmodel.iommu.fault import FaultRecord


class FaultCode(enum.IntEnum):
    """Fault reason of a fault record (7.1.3)."""

    ROOT_NOT_PRESENT = 0x1
    CONTEXT_NOT_PRESENT = 0x2
    CONTEXT_INVALID = 0x3
    ADDRESS_TOO_WIDE = 0x4
    NO_WRITE = 0x5
    NO_READ = 0x6
    TABLE_ACCESS = 0x7
    ROOT_ACCESS = 0x8
    CONTEXT_ACCESS = 0x9
    ROOT_RESERVED = 0xA
    CONTEXT_RESERVED = 0xB
    TABLE_RESERVED = 0xC
    NO_DEVICE_TLB = 0xD
    # Scalable mode:
    MODE = 0x30
    PASID_IN_LEGACY = 0x31
    PAGE_REQUEST_IN_LEGACY = 0x32
    SM_ROOT_ACCESS = 0x38
    SM_ROOT_NOT_PRESENT = 0x39
    SM_ROOT_RESERVED = 0x3A
    SM_CONTEXT_ACCESS = 0x40
    SM_CONTEXT_NOT_PRESENT = 0x41
    SM_CONTEXT_RESERVED = 0x42
    SM_NO_DEVICE_TLB = 0x44
    PASID_OFF = 0x45
    PASID_TOO_LARGE = 0x46
    NO_PAGE_REQUESTS = 0x47
    RID_PASID = 0x48
    DIRECTORY_ACCESS = 0x50
    DIRECTORY_NOT_PRESENT = 0x51
    DIRECTORY_RESERVED = 0x52
    PASID_ACCESS = 0x58
    PASID_NOT_PRESENT = 0x59
    PASID_RESERVED = 0x5A
    PASID_INVALID = 0x5B
    FIRST_ACCESS = 0x70
    FIRST_NOT_PRESENT = 0x71
    FIRST_RESERVED = 0x72
    SECOND_ACCESS = 0x78
    SECOND_PERMISSION = 0x79
    SECOND_RESERVED = 0x7A
    NOT_CANONICAL = 0x80
    PRIVILEGE = 0x81
    SM_TOO_WIDE = 0x83
    SECOND_TOO_WIDE = 0x84
    SM_NO_WRITE = 0x85
    SM_NO_READ = 0x86


class Stage(enum.IntEnum):
    """Which tables translate: PGTT of a PASID table entry (9.6)."""

    FIRST = 1
    SECOND = 2
    NESTED = 3
    PASS_THROUGH = 4


_LEGACY = {
    Reason.INPUT_WIDTH: FaultCode.ADDRESS_TOO_WIDE,
    Reason.OUTPUT_WIDTH: FaultCode.TABLE_RESERVED,
    Reason.RESERVED_BITS: FaultCode.TABLE_RESERVED,
    Reason.TABLE_ACCESS: FaultCode.TABLE_ACCESS,
    Reason.TABLE_CHANGING: FaultCode.TABLE_ACCESS,
}
_FIRST = {
    Reason.INPUT_WIDTH: FaultCode.NOT_CANONICAL,
    Reason.OUTPUT_WIDTH: FaultCode.FIRST_RESERVED,
    Reason.RESERVED_BITS: FaultCode.FIRST_RESERVED,
    Reason.TABLE_ACCESS: FaultCode.FIRST_ACCESS,
    Reason.TABLE_CHANGING: FaultCode.FIRST_ACCESS,
    Reason.NOT_MAPPED: FaultCode.FIRST_NOT_PRESENT,
}
_SECOND = {
    Reason.INPUT_WIDTH: FaultCode.SM_TOO_WIDE,
    Reason.OUTPUT_WIDTH: FaultCode.SECOND_RESERVED,
    Reason.RESERVED_BITS: FaultCode.SECOND_RESERVED,
    Reason.TABLE_ACCESS: FaultCode.SECOND_ACCESS,
    Reason.TABLE_CHANGING: FaultCode.SECOND_ACCESS,
    # A guess: the text mentions missing permissions only, and an entry without any permission is not present.
    Reason.NOT_MAPPED: FaultCode.SECOND_PERMISSION,
}
#: For nested translation: the second stage translates the first stage's result, or the address of one of its entries.
_NESTED = {**_SECOND, Reason.INPUT_WIDTH: FaultCode.SECOND_TOO_WIDE, Reason.PERMISSION: FaultCode.SECOND_PERMISSION}


def walk_code(record: FaultRecord, stage: Stage, scalable: bool) -> FaultCode | None:
    """The fault reason of a failed walk; None: the access failed after translation, which the unit does not report."""
    # Memory itself has permissions, too: a fault of those has no level.
    if record.reason in (Reason.NOT_MAPPED, Reason.PERMISSION) and not record.level:
        return None
    write = Access.WRITE in record.access
    if not scalable:
        known, denied = _LEGACY, FaultCode.NO_WRITE if write else FaultCode.NO_READ
    elif stage is Stage.SECOND or record.stage == 2:
        known, denied = (
            _SECOND if stage is Stage.SECOND else _NESTED,
            FaultCode.SM_NO_WRITE if write else FaultCode.SM_NO_READ,
        )
    else:
        # A present entry allows reads; only the U/S bit can deny one.
        known, denied = _FIRST, FaultCode.SM_NO_WRITE if write else FaultCode.PRIVILEGE
    if record.reason in known:
        return known[record.reason]
    return denied if record.reason in (Reason.NOT_MAPPED, Reason.PERMISSION) else None
