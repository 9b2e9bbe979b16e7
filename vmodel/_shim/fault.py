"""How an access of a requester or a walk ends that does not succeed; see vms_fault."""

from __future__ import annotations

import errno
from typing import Any

from vmodel._shim.handle import check
from vmodel._vmshim import lib
from vmodel.errors import Access, DmaFault, Reason

NO_PASID: int = lib.VMS_NO_PASID
_REASON_NO_FILE: int = lib.VMS_REASON_NO_FILE


class ByMessage(Exception):
    """Not a fault: [gpa, gpa+size) has no file, so the next piece goes by DMA_READ or DMA_WRITE."""

    def __init__(self, gpa: int, size: int, done: int) -> None:
        super().__init__(f"{size} bytes at gpa {gpa:#x} go by message")
        self.gpa = gpa
        self.size = size
        self.done = done


def raise_fault(rc: int, fault: Any) -> None:
    """OSError, ByMessage or DmaFault for what a call has returned and left in its vms_fault."""
    if rc != -errno.EFAULT:  # an argument was wrong: the fault was not filled
        check(rc)
    if fault.reason == _REASON_NO_FILE:
        raise ByMessage(fault.gpa, fault.len, fault.done)
    raise DmaFault(
        Reason(fault.reason),
        fault.iova,
        Access(fault.access),
        fault.done,
        None if fault.pasid == NO_PASID else fault.pasid,
        gpa=fault.gpa,
        level=fault.level,
        stage=fault.stage,
    )
