"""The data of the SMART log and the error log: counters, and the last failed commands."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from vmodel.devices.nvme.command import NvmeCommand
from vmodel.devices.nvme.status import CommandError, NvmeStatus

#: Entries that the error log keeps (ELPE + 1).
ERROR_ENTRIES = 64
#: Temperatures in kelvin.  The model has no sensor: it always reports the first.
TEMPERATURE, WARNING_TEMPERATURE, CRITICAL_TEMPERATURE = 303, 343, 353

#: Media errors, including those that Write Uncorrectable causes.
_MEDIA = (NvmeStatus.WRITE_FAULT, NvmeStatus.UNRECOVERED_READ)


@dataclass(frozen=True)
class ErrorEntry:
    """One entry of the error log (figure 193)."""

    count: int
    sqid: int
    cid: int
    #: The 15-bit status field.
    status: int
    #: bit << 8 | byte of the wrong field in the command; 0xFFFF: none in particular.
    location: int
    lba: int
    nsid: int
    #: Command Specific Information.
    information: int


class Health:
    """Counters since the device was made; resets do not clear them."""

    def __init__(self) -> None:
        self.bytes_read = 0
        self.bytes_written = 0
        #: Commands as SMART counts them: Compare counts as a read, Verify does not.
        self.reads = 0
        self.writes = 0
        #: The host has written blocks since the last sanitize operation.
        self.written = False
        self.media_errors = 0
        self.power_cycles = 0
        self.unsafe_shutdowns = 0
        #: Number of error log entries so far, including those that are not kept any more.
        self.error_count = 0
        self.errors: deque[ErrorEntry] = deque(maxlen=ERROR_ENTRIES)
        self._since = time.monotonic()

    @property
    def power_on_hours(self) -> int:
        """Whole hours since the device was made."""
        return int((time.monotonic() - self._since) / 3600)

    def record(self, status: NvmeStatus) -> None:
        """Adds an error log entry for a failure that no command has caused."""
        nothing = 0xFFFF
        self.failed(nothing, NvmeCommand.make(0, cid=nothing), CommandError(status))

    def failed(self, sqid: int, command: NvmeCommand, error: CommandError) -> None:
        """Adds an error log entry for a failed command."""
        self.error_count += 1
        self.media_errors += error.status in _MEDIA
        location = 0xFFFF if error.location is None else error.location
        lba = error.lba or 0
        status = error.field(more=True)
        self.errors.appendleft(
            ErrorEntry(self.error_count, sqid, command.cid, status, location, lba, command.nsid, error.information)
        )
