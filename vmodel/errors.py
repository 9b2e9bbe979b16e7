"""Error classes: the type says whose fault an error is.

=========== ========================================== =======================================
class       cause                                      consequence
=========== ========================================== =======================================
PeerError   the vfio-user client broke the protocol    an error reply with its errno
GuestError  the guest misused the device               as the model's specification says
DmaFault    a DMA access failed                        raised in the model, counted, logged
ConfigError the user's file or arguments are wrong     one line on stderr, exit status 2
=========== ========================================== =======================================

A call that cannot be carried out (map, attach, claim, ...) raises OSError with the errno that Linux gives for it;
`vmodel.iommu` raises IommuError, whose text says why.

Any other exception is a bug in vmodel or in the model.
"""

from __future__ import annotations

import enum
import errno
import os


def errno_name(code: int) -> str:
    """The name of an errno value in Linux's kernel: EOPNOTSUPP, for which Python has ENOTSUP."""
    return "EOPNOTSUPP" if code == errno.EOPNOTSUPP else errno.errorcode.get(code, str(code))


class VmodelError(Exception):
    """Base of all errors that vmodel raises on purpose."""


class PeerError(VmodelError):
    """The vfio-user client sent something that the specification rejects.

    `errno` is sent back in the header-only error reply.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{message} ({errno_name(code)})")
        self.errno = code


class GuestError(VmodelError):
    """The guest used the device in a way that its specification forbids."""


class Access(enum.IntFlag):
    """Kinds of DMA access; the values are the shim's VMS_PROT_*."""

    READ = 1
    WRITE = 2


class Reason(enum.IntEnum):
    """Why a DMA access failed; the values are the shim's `enum vms_reason`."""

    BUS_MASTER_OFF = 1
    NO_WINDOW = 2
    PERMISSION = 3
    TRUNCATED = 4
    WRAP = 5
    UNALIGNED = 6
    NO_FILE = 7
    # Reported by the IOMMU, BLOCKED to ACCESS_FLAG:
    BLOCKED = 8
    PASID = 9
    NOT_MAPPED = 10
    INPUT_WIDTH = 11
    OUTPUT_WIDTH = 12
    RESERVED_BITS = 13
    TABLE_ACCESS = 14
    TABLE_CHANGING = 15
    ACCESS_FLAG = 16
    #: The client answered a DMA_READ or DMA_WRITE message with an error, or disconnected before it answered.
    CLIENT = 100
    #: A read hook accessed memory that only messages reach, which the region reply must not wait for.
    WOULD_DEADLOCK = 101
    # Errors of PCIe requests, which here only a fault plan causes (vmodel.inject):
    UNSUPPORTED_REQUEST = 102
    COMPLETER_ABORT = 103
    COMPLETION_TIMEOUT = 104
    POISONED = 105


class DmaFault(VmodelError):
    """A DMA access failed after `done` bytes; whether any of the bytes after those were moved is not defined.

    Attributes: `reason`; `iova`: the address that failed; `access`; `done`: bytes moved before it; `pasid` or None;
    `gpa`: the translated address, 0 if unknown; `level`: of the table whose entry is wrong (1: 4 KiB pages), or 0;
    `stage`: 1 or 2 if tables are nested, else 0.
    """

    def __init__(
        self,
        reason: Reason,
        iova: int,
        access: Access,
        done: int = 0,
        pasid: int | None = None,
        *,
        gpa: int = 0,
        level: int = 0,
        stage: int = 0,
    ) -> None:
        where = "" if pasid is None else f" pasid {pasid:#x}"
        table = f" at level {level}" if level else ""
        table += f" of stage {stage}" if stage else ""
        super().__init__(f"DMA {access.name} at iova {iova:#x}{where}: {reason.name}{table} after {done} bytes")
        self.reason = reason
        self.iova = iova
        self.access = access
        self.done = done
        self.pasid = pasid
        self.gpa = gpa
        self.level = level
        self.stage = stage


class IommuError(VmodelError, OSError):
    """A call of `vmodel.iommu` is refused: `errno` is Linux's, and the text says why."""

    def __init__(self, code: int, message: str) -> None:
        OSError.__init__(self, code, message)

    def __str__(self) -> str:
        return f"{self.strerror} ({errno_name(self.errno or 0)})"


class ConfigError(VmodelError):
    """The user's machine file, plan or command line is wrong.

    The text is one line: file, key, value and the values that would be accepted.
    """

    def __init__(self, message: str, *, file: str | os.PathLike[str] | None = None, key: str = "") -> None:
        place = ": ".join(str(part) for part in (file, key) if part)
        super().__init__(f"{place}: {message}" if place else message)
        self.file = file
        self.key = key
