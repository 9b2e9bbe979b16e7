"""Status of a completion (NVMe 1.4, 4.6.1), and the error that a command ends with."""

from __future__ import annotations

import enum

from vmodel.errors import VmodelError

_DNR, _MORE = 1 << 14, 1 << 13


class NvmeStatus(enum.IntEnum):
    """Status Code Type (bits 10:8) and Status Code (bits 7:0)."""

    # Generic command status
    SUCCESS = 0x000
    INVALID_OPCODE = 0x001
    INVALID_FIELD = 0x002
    CID_CONFLICT = 0x003
    DATA_TRANSFER_ERROR = 0x004
    ABORTED_POWER_LOSS = 0x005
    INTERNAL_ERROR = 0x006
    ABORT_REQUESTED = 0x007
    ABORTED_SQ_DELETION = 0x008
    ABORTED_FAILED_FUSED = 0x009
    ABORTED_MISSING_FUSED = 0x00A
    INVALID_NAMESPACE = 0x00B
    COMMAND_SEQUENCE = 0x00C
    INVALID_SGL_SEGMENT = 0x00D
    INVALID_SGL_COUNT = 0x00E
    DATA_SGL_LENGTH_INVALID = 0x00F
    METADATA_SGL_LENGTH_INVALID = 0x010
    SGL_TYPE_INVALID = 0x011
    INVALID_USE_OF_CMB = 0x012
    PRP_OFFSET_INVALID = 0x013
    ATOMIC_WRITE_UNIT_EXCEEDED = 0x014
    OPERATION_DENIED = 0x015
    SGL_OFFSET_INVALID = 0x016
    HOST_ID_INCONSISTENT = 0x018
    KEEP_ALIVE_EXPIRED = 0x019
    KEEP_ALIVE_TIMEOUT_INVALID = 0x01A
    ABORTED_PREEMPT = 0x01B
    SANITIZE_FAILED = 0x01C
    SANITIZE_IN_PROGRESS = 0x01D
    SGL_GRANULARITY_INVALID = 0x01E
    NOT_SUPPORTED_IN_CMB = 0x01F
    NAMESPACE_WRITE_PROTECTED = 0x020
    COMMAND_INTERRUPTED = 0x021
    TRANSIENT_TRANSPORT_ERROR = 0x022
    LBA_OUT_OF_RANGE = 0x080
    CAPACITY_EXCEEDED = 0x081
    NAMESPACE_NOT_READY = 0x082
    RESERVATION_CONFLICT = 0x083
    FORMAT_IN_PROGRESS = 0x084
    # Command specific status
    CQ_INVALID = 0x100
    INVALID_QUEUE_ID = 0x101
    INVALID_QUEUE_SIZE = 0x102
    ABORT_LIMIT_EXCEEDED = 0x103
    EVENT_LIMIT_EXCEEDED = 0x105
    INVALID_FIRMWARE_SLOT = 0x106
    INVALID_FIRMWARE_IMAGE = 0x107
    INVALID_INTERRUPT_VECTOR = 0x108
    INVALID_LOG_PAGE = 0x109
    INVALID_FORMAT = 0x10A
    FIRMWARE_NEEDS_RESET = 0x10B
    INVALID_QUEUE_DELETION = 0x10C
    FEATURE_NOT_SAVEABLE = 0x10D
    FEATURE_NOT_CHANGEABLE = 0x10E
    FEATURE_NOT_NAMESPACE_SPECIFIC = 0x10F
    FIRMWARE_NEEDS_SUBSYSTEM_RESET = 0x110
    FIRMWARE_NEEDS_CONTROLLER_RESET = 0x111
    FIRMWARE_NEEDS_MAXIMUM_TIME = 0x112
    FIRMWARE_PROHIBITED = 0x113
    OVERLAPPING_RANGE = 0x114
    INSUFFICIENT_CAPACITY = 0x115
    NAMESPACE_ID_UNAVAILABLE = 0x116
    NAMESPACE_ALREADY_ATTACHED = 0x118
    NAMESPACE_PRIVATE = 0x119
    NAMESPACE_NOT_ATTACHED = 0x11A
    THIN_PROVISIONING_NOT_SUPPORTED = 0x11B
    CONTROLLER_LIST_INVALID = 0x11C
    SELF_TEST_IN_PROGRESS = 0x11D
    BOOT_PARTITION_WRITE_PROHIBITED = 0x11E
    INVALID_CONTROLLER_ID = 0x11F
    INVALID_SECONDARY_STATE = 0x120
    INVALID_RESOURCE_COUNT = 0x121
    INVALID_RESOURCE_ID = 0x122
    SANITIZE_PROHIBITED = 0x123
    # Command specific status of the NVM command set
    CONFLICTING_ATTRIBUTES = 0x180
    INVALID_PROTECTION_INFORMATION = 0x181
    WRITE_TO_READ_ONLY = 0x182
    #: Of Copy, which came with technical proposal 4065.
    COMMAND_SIZE_LIMIT_EXCEEDED = 0x183
    # Media and data integrity errors
    WRITE_FAULT = 0x280
    UNRECOVERED_READ = 0x281
    GUARD_CHECK = 0x282
    APPLICATION_TAG_CHECK = 0x283
    REFERENCE_TAG_CHECK = 0x284
    COMPARE_FAILURE = 0x285
    ACCESS_DENIED = 0x286
    DEALLOCATED = 0x287


class CommandError(VmodelError):
    """A command ends with another status than Success.

    `dnr`: Do Not Retry; `result`: Dword 0 of the completion; `location`: bit << 8 | byte of the command that is to
    blame, for the error log, or None; `lba`: the first block that failed, or None; `information`: Command Specific
    Information of the error log.
    """

    def __init__(
        self,
        status: NvmeStatus,
        *,
        dnr: bool = True,
        result: int = 0,
        location: int | None = None,
        lba: int | None = None,
        information: int = 0,
    ) -> None:
        super().__init__(status.name)
        self.status = status
        self.dnr = dnr
        self.result = result
        self.location = location
        self.lba = lba
        self.information = information

    def field(self, *, more: bool = False) -> int:
        """The 15-bit status field; `more`: the error log has more about it."""
        return self.status | (_MORE if more else 0) | (_DNR if self.dnr else 0)
