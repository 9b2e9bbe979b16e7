"""Device Self-test (NVMe 1.4, 5.6 and 8.11).

The short test reads the first and the last blocks of the namespaces, the extended one all of them.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from vmodel.devices.nvme.backend import Job, Op
from vmodel.devices.nvme.command import NvmeCommand
from vmodel.devices.nvme.identify import build
from vmodel.devices.nvme.logs import SelfTest, SelfTestResult
from vmodel.devices.nvme.namespace import Namespace
from vmodel.devices.nvme.status import CommandError, NvmeStatus
from vmodel.devices.nvme.work import PIECE, Failure, Work, pieces

if TYPE_CHECKING:
    from vmodel.devices.nvme.controller import Nvme

_RESULTS = 20


class SelftestCode(enum.IntEnum):
    """STC: the self-test code of the command."""

    SHORT = 0x1
    EXTENDED = 0x2
    ABORT = 0xF


class SelftestResult(enum.IntEnum):
    """Result of a test."""

    PASSED = 0x0
    ABORTED_BY_COMMAND = 0x1
    ABORTED_BY_RESET = 0x2
    ABORTED_BY_NAMESPACE_REMOVAL = 0x3
    ABORTED_BY_FORMAT = 0x4
    SEGMENT_FAILED = 0x7
    ABORTED_BY_SANITIZE = 0x9
    UNUSED = 0xF


class DeviceSelfTest:
    """The test in progress, and the results of the last 20 tests."""

    def __init__(self, controller: Nvme) -> None:
        self._controller = controller
        self._results: deque[dict[str, Any]] = deque(maxlen=_RESULTS)
        self._code: SelftestCode | None = None
        self._nsid = 0
        self._namespaces: list[Namespace] = []
        self._work: Work | None = None

    def start(self, command: NvmeCommand) -> None:
        """Carries out the Device Self-test command, which completes when the test has begun.  CommandError."""
        try:
            code = SelftestCode(command.cdw10 & 15)
        except ValueError:
            raise CommandError(NvmeStatus.INVALID_FIELD, location=40) from None
        # 0: only the controller; FFFFFFFFh: the controller and all active namespaces.
        namespaces = self._controller.inventory.chosen(command.nsid) if command.nsid else []
        if code is SelftestCode.ABORT:
            self.abort(SelftestResult.ABORTED_BY_COMMAND)
            return
        if self._work is not None:
            raise CommandError(NvmeStatus.SELF_TEST_IN_PROGRESS, dnr=False)
        self._code, self._nsid, self._namespaces = code, command.nsid, namespaces
        total = sum(namespace.backend.size for namespace in namespaces)
        self._work = Work(self._controller, self._reads(namespaces, code), self._ended, total=total)
        self._work.resume()

    @staticmethod
    def _reads(namespaces: list[Namespace], code: SelftestCode) -> Iterator[tuple[Namespace, Job]]:
        for namespace in namespaces:
            size = namespace.backend.size
            piece = min(PIECE, size)
            ends = ((0, piece), (size - piece, piece))
            for offset, length in pieces(size, PIECE) if code is SelftestCode.EXTENDED else ends:
                yield namespace, Job(Op.VERIFY, offset, length)

    def abort(self, why: SelftestResult) -> None:
        """Aborts the test in progress, if there is one."""
        if self._work is not None:
            self._work.cancel()
            self._end(why)

    def abort_of(self, namespaces: Iterable[Namespace], why: SelftestResult) -> None:
        """Ends a test that reads one of these namespaces (8.11.1)."""
        if any(namespace in self._namespaces for namespace in namespaces):
            self.abort(why)

    def reset(self) -> None:
        """At a controller reset: aborts a short test; an extended one continues."""
        if self._code is SelftestCode.SHORT:
            self.abort(SelftestResult.ABORTED_BY_RESET)
        elif self._work is not None:
            self._work.resume()

    def _ended(self, failure: Failure | None) -> None:
        if failure is None:
            self._end(SelftestResult.PASSED)
        else:
            self._end(SelftestResult.SEGMENT_FAILED, nsid=failure.namespace.nsid, lba=failure.lba)

    def _end(self, outcome: SelftestResult, *, nsid: int | None = None, lba: int | None = None) -> None:
        assert self._code is not None
        fields: dict[str, Any] = {
            "status": self._code << 4 | outcome,
            "power_on_hours": self._controller.health.power_on_hours,
            "nsid": self._nsid if nsid is None else nsid,
            "lba": lba or 0,
            # Valid fields: bit 0 the namespace, bit 1 the block.
            "valid": (1 if nsid or self._nsid else 0) | (2 if lba is not None else 0),
            "segment": 1 if outcome is SelftestResult.SEGMENT_FAILED else 0,
        }
        self._results.appendleft(fields)
        self._code, self._work, self._namespaces = None, None, []

    def log(self) -> bytes:
        """Builds the Device Self-test log page."""
        results = [SelfTestResult.parse(build(SelfTestResult, fields)) for fields in self._results]
        unused = SelfTestResult.parse(build(SelfTestResult, {"status": SelftestResult.UNUSED}))
        progress = min(int(self._work.progress * 100), 99) if self._work is not None else 0
        return build(
            SelfTest,
            {
                "operation": self._code or 0,
                "completion": progress,
                "results": results + [unused] * (_RESULTS - len(results)),
            },
        )
