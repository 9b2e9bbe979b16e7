"""What the SMART log and the error log are made of: counters, and the last commands that failed."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from vmodel.devices.nvme.command import NvmeCommand
from vmodel.devices.nvme.status import CommandError, NvmeStatus

#: Entries that the error log keeps (ELPE + 1).
ERROR_ENTRIES = 64
#: Temperatures in kelvin: the model has no sensor, so it is always at the first.
TEMPERATURE, WARNING_TEMPERATURE, CRITICAL_TEMPERATURE = 303, 343, 353

#: Errors of the medium; those that Write Uncorrectable asks for are among them.
_MEDIA = (NvmeStatus.WRITE_FAULT, NvmeStatus.UNRECOVERED_READ)


@dataclass(frozen=True)
class ErrorEntry:
    """One entry of the error log (figure 193)."""

    count: int
    sqid: int
    cid: int
    #: The 15-bit status field.
    status: int
    #: bit << 8 | byte of the command, 0xFFFF: none in particular.
    location: int
    lba: int
    nsid: int
    #: Command Specific Information.
    information: int


class Health:
    """Counters since the device was made: resets keep them."""

    def __init__(self) -> None:
        self.bytes_read = 0
        self.bytes_written = 0
        #: Commands, as SMART counts them: Compare is a read, Verify none.
        self.reads = 0
        self.writes = 0
        #: The host has written blocks since the last sanitize operation.
        self.written = False
        self.media_errors = 0
        self.power_cycles = 0
        self.unsafe_shutdowns = 0
        #: How many error log entries there have been, also before the last that are kept.
        self.error_count = 0
        self.errors: deque[ErrorEntry] = deque(maxlen=ERROR_ENTRIES)
        self._since = time.monotonic()

    @property
    def power_on_hours(self) -> int:
        """Whole hours since the device was made."""
        return int((time.monotonic() - self._since) / 3600)

    def record(self, status: NvmeStatus) -> None:
        """Something has failed that no command is to blame for."""
        nothing = 0xFFFF
        self.failed(nothing, NvmeCommand.make(0, cid=nothing), CommandError(status))

    def failed(self, sqid: int, command: NvmeCommand, error: CommandError) -> None:
        """A command has ended with an error that the log is to hold."""
        self.error_count += 1
        self.media_errors += error.status in _MEDIA
        location = 0xFFFF if error.location is None else error.location
        lba = error.lba or 0
        status = error.field(more=True)
        self.errors.appendleft(
            ErrorEntry(self.error_count, sqid, command.cid, status, location, lba, command.nsid, error.information)
        )
