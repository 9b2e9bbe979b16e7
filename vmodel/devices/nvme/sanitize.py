"""Sanitize operations and their log (NVMe 1.4, 5.24, 8.15, 5.14.1.16.2)."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vmodel.devices.nvme.backend import Job, Op
from vmodel.devices.nvme.command import NvmeCommand
from vmodel.devices.nvme.events import AsyncEvent
from vmodel.devices.nvme.identify import build
from vmodel.devices.nvme.logs import SanitizeStatus
from vmodel.devices.nvme.namespace import Namespace
from vmodel.devices.nvme.selftest import SelftestResult
from vmodel.devices.nvme.status import CommandError, NvmeStatus
from vmodel.devices.nvme.work import LARGE_PIECE, PIECE, Failure, Work, pieces

if TYPE_CHECKING:
    from vmodel.devices.nvme.controller import Nvme


class SanitizeAction(enum.IntEnum):
    """SANACT: the sanitize action."""

    EXIT_FAILURE_MODE = 1
    BLOCK_ERASE = 2
    OVERWRITE = 3
    CRYPTO_ERASE = 4


class SanitizeState(enum.IntEnum):
    """Status of the most recent sanitize operation."""

    NEVER = 0
    COMPLETED = 1
    IN_PROGRESS = 2
    FAILED = 3


_UNRESTRICTED, _INVERT, _NO_DEALLOCATE = 1 << 3, 1 << 8, 1 << 9
_GLOBAL_ERASED = 1 << 8


class Sanitize:
    """The operation in progress, or the last one; resets do not stop it."""

    def __init__(self, controller: Nvme) -> None:
        self._controller = controller
        self._state = SanitizeState.NEVER
        self._cdw10 = 0
        #: How far it came, from 0 to 1.
        self._progress = 1.0
        self._failure_mode = False
        self._work: Work | None = None

    @property
    def in_progress(self) -> bool:
        """Whether an operation is in progress: namespaces cannot be accessed."""
        return self._state is SanitizeState.IN_PROGRESS

    @property
    def failed(self) -> bool:
        """Whether the last one has failed: namespaces cannot be accessed until one succeeds or failure mode is left."""
        return self._failure_mode

    def check(self) -> None:
        """CommandError while commands must not access namespaces."""
        if self.in_progress:
            raise CommandError(NvmeStatus.SANITIZE_IN_PROGRESS, dnr=False)
        if self.failed:
            raise CommandError(NvmeStatus.SANITIZE_FAILED)

    def start(self, command: NvmeCommand) -> None:
        """Carries out the Sanitize command, which completes when the operation has begun.  CommandError."""
        if self.in_progress:
            raise CommandError(NvmeStatus.SANITIZE_IN_PROGRESS, dnr=False)
        try:
            action = SanitizeAction(command.cdw10 & 7)
        except ValueError:
            raise CommandError(NvmeStatus.INVALID_FIELD, location=40) from None
        if action is SanitizeAction.EXIT_FAILURE_MODE:
            # Exit Failure Mode is only allowed after a failure in unrestricted mode.
            if self.failed and not self._cdw10 & _UNRESTRICTED:
                raise CommandError(NvmeStatus.SANITIZE_FAILED)
            self._failure_mode = False  # the log goes on saying that it has failed
            return
        if self.failed and command.cdw10 & _UNRESTRICTED and not self._cdw10 & _UNRESTRICTED:
            # After a failure in restricted mode, only another restricted operation is allowed.
            raise CommandError(NvmeStatus.SANITIZE_FAILED)
        if self._controller.firmware.pending:
            raise CommandError(NvmeStatus.FIRMWARE_NEEDS_CONTROLLER_RESET, dnr=False)
        namespaces = self._controller.inventory.allocated
        if any(namespace.read_only for namespace in namespaces):
            raise CommandError(NvmeStatus.NAMESPACE_WRITE_PROTECTED)
        # Only an operation that starts ends a self-test (8.11).
        self._controller.self_test.abort(SelftestResult.ABORTED_BY_SANITIZE)
        self._controller.fast.settle()
        self._controller.events.drop(AsyncEvent.SANITIZE_COMPLETED)
        self._cdw10, self._state, self._failure_mode = command.cdw10, SanitizeState.IN_PROGRESS, False
        total = sum(namespace.backend.size for namespace in namespaces)
        if action is SanitizeAction.OVERWRITE:
            jobs = self._overwrites(namespaces, command)
            total *= self._passes_of(command.cdw10)
        else:
            # Not every file system can write zeros quickly: then they are written as data, so in small pieces.
            op, piece = (Op.ZERO, PIECE) if command.cdw10 & _NO_DEALLOCATE else (Op.DISCARD, LARGE_PIECE)
            jobs = (
                (namespace, Job(op, offset, length))
                for namespace in namespaces
                for offset, length in pieces(namespace.backend.size, piece)
            )
        self._work = Work(self._controller, jobs, self._ended, total=total)
        self._work.resume()

    def _overwrites(self, namespaces: list[Namespace], command: NvmeCommand) -> Iterator[tuple[Namespace, Job]]:
        passes, pattern = self._passes_of(command.cdw10), command.cdw11
        for n in range(passes):
            # With OIPBP each pass inverts the pattern of the pass before; the last pass writes the pattern itself.
            inverted = command.cdw10 & _INVERT and (passes - 1 - n) % 2
            word = (pattern ^ 0xFFFF_FFFF if inverted else pattern).to_bytes(4, "little")
            data = bytearray(word * (PIECE // 4))
            for namespace in namespaces:
                for offset, length in pieces(namespace.backend.size, PIECE):
                    yield namespace, Job(Op.WRITE, offset, length, memoryview(data)[:length])

    @staticmethod
    def _passes_of(cdw10: int) -> int:
        """Overwrite Pass Count; the field's value 0 means 16."""
        return cdw10 >> 4 & 15 or 16

    def resume(self) -> None:
        """Continues after a reset."""
        if self._work is not None:
            self._work.resume()

    def _ended(self, failure: Failure | None) -> None:
        assert self._work is not None
        self._progress = self._work.progress if failure else 1.0
        self._work = None
        if failure is not None:
            self._controller.log.warning("%s: sanitize failed: errno %d", self._controller.name, failure.code)
            self._state, self._failure_mode = SanitizeState.FAILED, True
        else:
            self._state = SanitizeState.COMPLETED
            self._controller.health.written = False
            for namespace in self._controller.inventory.allocated:
                namespace.uncorrectable.clear()
        self._controller.fast.changed()
        self._controller.events.report(AsyncEvent.SANITIZE_COMPLETED)

    @property
    def _passes(self) -> int:
        """Completed passes of an overwrite; 0 for other operations."""
        if self._cdw10 & 7 != SanitizeAction.OVERWRITE:
            return 0
        progress = self._progress if self._work is None else self._work.progress
        return int(progress * self._passes_of(self._cdw10))

    def log(self) -> bytes:
        """Builds the Sanitize Status log page."""
        progress = int(self._work.progress * 65535) if self._work is not None else 65535
        erased = self._state is SanitizeState.COMPLETED and not self._controller.health.written
        unknown = 0xFFFF_FFFF  # no time is reported
        return build(
            SanitizeStatus,
            {
                "progress": progress,
                "status": self._state | self._passes << 3 | (_GLOBAL_ERASED if erased else 0),
                "cdw10": self._cdw10,
                "overwrite_seconds": unknown,
                "block_erase_seconds": unknown,
                "crypto_erase_seconds": unknown,
                "overwrite_no_deallocate_seconds": unknown,
                "block_erase_no_deallocate_seconds": unknown,
                "crypto_erase_no_deallocate_seconds": unknown,
            },
        )
