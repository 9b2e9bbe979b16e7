"""The admin command set (NVMe 1.4, 5): a table from opcode to what it does."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmodel.devices.nvme.backend import Job, Op
from vmodel.devices.nvme.command import BROADCAST, COMPLETION_SIZE, SUBMISSION_SIZE, NvmeCommand
from vmodel.devices.nvme.events import AsyncEvent
from vmodel.devices.nvme.firmware import CommitAction
from vmodel.devices.nvme.identify import CONTROLLER_ID, SIZE, Identify, NamespaceData
from vmodel.devices.nvme.logs import ALL_ALONE, ALONE, BLOCKS, INVENTORY, NAMESPACE, SUPPORTED, Logs
from vmodel.devices.nvme.namespace import Namespace
from vmodel.devices.nvme.params import LBA_SIZES
from vmodel.devices.nvme.pointers import Transfer
from vmodel.devices.nvme.queue import CompletionQueue, Later, SubmissionQueue
from vmodel.devices.nvme.regs import Cc
from vmodel.devices.nvme.selftest import SelftestResult
from vmodel.devices.nvme.status import CommandError, NvmeStatus
from vmodel.devices.nvme.work import LARGE_PIECE, Failure, Work, pieces
from vmodel.errors import DmaFault

if TYPE_CHECKING:
    from vmodel.devices.nvme.controller import Nvme

_CONTROLLERS = struct.Struct("<2048H")


@dataclass(frozen=True)
class _Row:
    run: Callable[[NvmeCommand, SubmissionQueue], int | Later]
    effects: int = 0
    #: Whether the command is allowed during a sanitize operation (figure 108).
    sanitizing: bool = False


class AdminCommands:
    """The commands of the admin queue."""

    def __init__(self, controller: Nvme) -> None:
        self._controller = controller
        self._identify = Identify(controller)
        self.logs = Logs(controller)
        #: Format NVM commands in progress.
        self._formats: list[Work] = []
        self._table = {
            0x00: _Row(self._delete_sq, sanitizing=True),
            0x01: _Row(self._create_sq, sanitizing=True),
            0x02: _Row(self._get_log_page, sanitizing=True),
            0x04: _Row(self._delete_cq, sanitizing=True),
            0x05: _Row(self._create_cq, sanitizing=True),
            0x06: _Row(self._do_identify, sanitizing=True),
            0x08: _Row(self._abort, sanitizing=True),
            0x09: _Row(self._set_features, sanitizing=True),
            0x0A: _Row(self._get_features, sanitizing=True),
            0x0C: _Row(self._async_event, sanitizing=True),
            0x0D: _Row(self._namespace_management, INVENTORY),
            0x10: _Row(self._firmware_commit),
            0x11: _Row(self._firmware_download),
            0x14: _Row(self._self_test),
            0x15: _Row(self._namespace_attachment, INVENTORY),
            0x18: _Row(self._keep_alive, sanitizing=True),
            0x19: _Row(self._directive_send),
            0x1A: _Row(self._directive_receive),
            0x80: _Row(self._format, BLOCKS | NAMESPACE | ALONE),
            0x84: _Row(self._sanitize, BLOCKS | ALL_ALONE, sanitizing=True),
        }
        if controller.has_shadow_doorbells:
            self._table[0x7C] = _Row(self._doorbell_buffer_config, sanitizing=True)

    @property
    def effects(self) -> dict[int, int]:
        """The supported opcodes, each with its effects (figure 199)."""
        return {opcode: SUPPORTED | row.effects for opcode, row in self._table.items()}

    def resume(self) -> None:
        """Resumes the work that survives a reset: Format NVM."""
        for work in self._formats:
            work.resume()

    def execute(self, command: NvmeCommand, sq: SubmissionQueue) -> int | Later:
        """Carries out a command; returns Dword 0 of the completion, or Later.  CommandError, DmaFault."""
        row = self._table.get(command.opcode)
        if row is None:
            raise CommandError(NvmeStatus.INVALID_OPCODE, location=0)
        if command.fuse:
            raise CommandError(NvmeStatus.INVALID_FIELD, location=1)
        if not row.sanitizing:
            self._controller.sanitize.check()
        return row.run(command, sq)

    def execute_fused(self, first: NvmeCommand, second: NvmeCommand, sq: SubmissionQueue) -> tuple[Later, Later]:
        """Refuses the operation, as no admin command can be fused.  CommandError."""
        raise CommandError(NvmeStatus.INVALID_FIELD, location=1)

    def _transfer(self, command: NvmeCommand, size: int, *, to_host: bool) -> Transfer:
        controller = self._controller
        self._check_size(size)
        return Transfer(controller.dma, command, controller.page_size, size, to_host=to_host, sgl=False)

    def _check_size(self, size: int) -> None:
        """CommandError if `size` is more than one command may transfer (MDTS)."""
        if size > self._controller.max_transfer:
            raise CommandError(NvmeStatus.INVALID_FIELD, location=40)

    # ---- queues (5.3 to 5.6) ---------------------------------------------------------------

    def _queue_base(self, command: NvmeCommand, largest: int, entry: int) -> tuple[int, int, int]:
        """(id, address, entries of `entry` bytes) of Create I/O Completion or Submission Queue.  CommandError."""
        controller = self._controller
        qid, entries = command.cdw10 & 0xFFFF, (command.cdw10 >> 16) + 1
        if not 1 <= qid <= controller.params.queues:
            raise CommandError(NvmeStatus.INVALID_QUEUE_ID, location=40)
        if entries < 2 or entries > largest:
            raise CommandError(NvmeStatus.INVALID_QUEUE_SIZE, location=42)
        if not command.cdw11 & 1:  # CAP.CQR: physically contiguous only
            raise CommandError(NvmeStatus.INVALID_FIELD, location=44)
        if command.psdt or command.prp1 % controller.page_size:
            raise CommandError(NvmeStatus.PRP_OFFSET_INVALID, location=24)
        if command.prp1 + entries * entry > 1 << 64:  # the queue would extend past the last address
            raise CommandError(NvmeStatus.INVALID_FIELD, location=24)
        return qid, command.prp1, entries

    def _create_cq(self, command: NvmeCommand, sq: SubmissionQueue) -> int:
        controller = self._controller
        cc = Cc(controller.regs.CC)
        # With an entry size other than 16 bytes, no queue size is valid.
        largest = controller.params.queue_entries if cc.IOCQES == 4 else 0
        qid, iova, entries = self._queue_base(command, largest, COMPLETION_SIZE)
        if qid in controller.completion:
            raise CommandError(NvmeStatus.INVALID_QUEUE_ID, location=40)
        vector, interrupts = command.cdw11 >> 16, bool(command.cdw11 & 2)
        if vector >= controller.vectors:
            raise CommandError(NvmeStatus.INVALID_INTERRUPT_VECTOR, location=46)
        queue = CompletionQueue(controller, qid, iova, entries, vector, interrupts)
        controller.completion[qid] = queue
        self._shadow_new(queue)
        return 0

    def _create_sq(self, command: NvmeCommand, sq: SubmissionQueue) -> int:
        controller = self._controller
        cc = Cc(controller.regs.CC)
        cqid, priority = command.cdw11 >> 16, command.cdw11 >> 1 & 3
        # 0 is the admin completion queue, which I/O queues must not use (5.4).
        if not 1 <= cqid <= controller.params.queues:
            raise CommandError(NvmeStatus.INVALID_QUEUE_ID, location=46)
        cq = controller.completion.get(cqid)
        if cq is None:
            raise CommandError(NvmeStatus.CQ_INVALID, location=46)
        largest = controller.params.queue_entries if cc.IOSQES == 6 else 0
        qid, iova, entries = self._queue_base(command, largest, SUBMISSION_SIZE)
        if qid in controller.submission:
            raise CommandError(NvmeStatus.INVALID_QUEUE_ID, location=40)
        queue = SubmissionQueue(controller, qid, iova, entries, cq, priority)
        controller.submission[qid] = queue
        self._shadow_new(queue)
        return 0

    def _shadow_new(self, queue: CompletionQueue | SubmissionQueue) -> None:
        """Sets the shadow doorbell of a queue that is created after Doorbell Buffer Config."""
        try:
            self._controller.shadow_queue(queue)
        except DmaFault as fault:
            self._controller.fatal(f"the shadow doorbell of queue {queue.qid}", fault)

    def _delete_sq(self, command: NvmeCommand, sq: SubmissionQueue) -> int | Later:
        qid = command.cdw10 & 0xFFFF
        queue = self._controller.submission.get(qid) if qid else None
        if queue is None:
            raise CommandError(NvmeStatus.INVALID_QUEUE_ID, location=40)
        queue.drain()
        del self._controller.submission[qid]
        queue.close()
        return 0

    def _delete_cq(self, command: NvmeCommand, sq: SubmissionQueue) -> int:
        qid = command.cdw10 & 0xFFFF
        queue = self._controller.completion.get(qid) if qid else None
        if queue is None:
            raise CommandError(NvmeStatus.INVALID_QUEUE_ID, location=40)
        if queue.queues:
            raise CommandError(NvmeStatus.INVALID_QUEUE_DELETION, location=40)
        del self._controller.completion[qid]
        queue.close()
        return 0

    def _abort(self, command: NvmeCommand, sq: SubmissionQueue) -> int:
        """5.1; bit 0 of the result: the command was not aborted."""
        queue = self._controller.submission.get(command.cdw10 & 0xFFFF)
        if queue is None:
            raise CommandError(NvmeStatus.INVALID_FIELD, location=40, result=1)
        return int(not queue.abort(command.cdw10 >> 16))

    def _doorbell_buffer_config(self, command: NvmeCommand, sq: SubmissionQueue) -> int:
        """5.7."""
        page = self._controller.page_size
        if command.psdt or command.prp1 % page or command.prp2 % page:
            raise CommandError(NvmeStatus.INVALID_FIELD, location=24)
        self._controller.set_shadow(command.prp1, command.prp2)
        return 0

    # ---- events, keep alive, features, logs, identify --------------------------------------

    def _async_event(self, command: NvmeCommand, sq: SubmissionQueue) -> Later:
        return self._controller.events.request()

    def _keep_alive(self, command: NvmeCommand, sq: SubmissionQueue) -> int:
        self._controller.restart_keep_alive()
        return 0

    def _set_features(self, command: NvmeCommand, sq: SubmissionQueue) -> int:
        features = self._controller.features
        size = features.data_size(command)
        data = self._transfer(command, size, to_host=False).from_guest() if size else b""
        return features.set(command, bytes(data))

    def _get_features(self, command: NvmeCommand, sq: SubmissionQueue) -> int:
        result, data = self._controller.features.get(command)
        if data:
            self._transfer(command, len(data), to_host=True).to_guest(data)
        return result

    def _get_log_page(self, command: NvmeCommand, sq: SubmissionQueue) -> int:
        data, size, read = self.logs.page(command)
        self._check_size(size)
        if data:
            self._transfer(command, len(data), to_host=True).to_guest(data)
        read()
        return 0

    def _do_identify(self, command: NvmeCommand, sq: SubmissionQueue) -> int:
        data = self._identify.page(command)
        self._transfer(command, SIZE, to_host=True).to_guest(data)
        return 0

    # ---- namespaces (5.19, 5.20, 5.23) -----------------------------------------------------

    def _namespace_management(self, command: NvmeCommand, sq: SubmissionQueue) -> int:
        select = command.cdw10 & 15
        if select == 0:
            return self._create_namespace(command)
        if select != 1:
            raise CommandError(NvmeStatus.INVALID_FIELD, location=40)
        inventory = self._controller.inventory
        if command.nsid == BROADCAST:
            chosen = inventory.allocated
        elif (found := inventory.find(command.nsid)) is not None:
            chosen = [found]
        else:
            raise CommandError(NvmeStatus.INVALID_FIELD, location=4)
        if any(namespace.formatting for namespace in chosen):
            raise CommandError(NvmeStatus.FORMAT_IN_PROGRESS, dnr=False)
        if any(namespace.read_only for namespace in chosen):  # not among the commands that 8.19.1 lets through
            raise CommandError(NvmeStatus.NAMESPACE_WRITE_PROTECTED, location=4)
        self._controller.self_test.abort_of(chosen, SelftestResult.ABORTED_BY_NAMESPACE_REMOVAL)
        self._controller.fast.settle()
        for namespace in chosen:
            inventory.delete(namespace)
            if namespace.attached:
                self._controller.namespace_changed(namespace.nsid)
        return 0

    def _create_namespace(self, command: NvmeCommand) -> int:
        if command.cdw11 >> 24:  # a command set other than NVM
            raise CommandError(NvmeStatus.INVALID_FIELD, location=47)
        data = NamespaceData.parse(bytes(self._transfer(command, SIZE, to_host=False).from_guest()))
        if data.ncap != data.nsze:
            raise CommandError(NvmeStatus.THIN_PROVISIONING_NOT_SUPPORTED)
        # Neither protection information, nor metadata, nor sharing, nor sets.
        if data.flbas & 0x10 or data.dps or data.nmic or data.anagrpid or data.nvmsetid or data.endgid:
            raise CommandError(NvmeStatus.INVALID_FIELD)
        return self._controller.inventory.create(data.nsze, data.flbas & 15).nsid

    def _namespace_attachment(self, command: NvmeCommand, sq: SubmissionQueue) -> int:
        select = command.cdw10 & 15
        if select > 1:
            raise CommandError(NvmeStatus.INVALID_FIELD, location=40)
        namespace = self._controller.inventory.find(command.nsid)
        if namespace is None:
            raise CommandError(NvmeStatus.INVALID_FIELD, location=4)
        count, *ids = _CONTROLLERS.unpack(self._transfer(command, SIZE, to_host=False).from_guest())
        if count != 1 or ids[0] != CONTROLLER_ID:  # there is no other controller
            raise CommandError(NvmeStatus.CONTROLLER_LIST_INVALID)
        if select == 0 and namespace.attached:
            raise CommandError(NvmeStatus.NAMESPACE_ALREADY_ATTACHED)
        if select == 1 and not namespace.attached:
            raise CommandError(NvmeStatus.NAMESPACE_NOT_ATTACHED)
        namespace.attached = select == 0
        self._controller.namespace_changed(namespace.nsid)
        return 0

    def _format(self, command: NvmeCommand, sq: SubmissionQueue) -> Later:
        chosen = self._controller.inventory.chosen(command.nsid)
        form, erase = command.cdw10 & 15, command.cdw10 >> 9 & 7
        if form >= len(LBA_SIZES) or command.cdw10 >> 4 & 0x1F:  # neither metadata nor protection information
            raise CommandError(NvmeStatus.INVALID_FORMAT, location=40)
        if erase > 2:
            raise CommandError(NvmeStatus.INVALID_FIELD, location=41 | 1 << 8)
        if any(namespace.read_only for namespace in chosen):
            raise CommandError(NvmeStatus.NAMESPACE_WRITE_PROTECTED)
        if any(namespace.formatting for namespace in chosen):
            raise CommandError(NvmeStatus.FORMAT_IN_PROGRESS, dnr=False)
        self._controller.self_test.abort_of(chosen, SelftestResult.ABORTED_BY_FORMAT)
        # Commands in progress must not write to blocks that are erased already.
        self._controller.fast.settle()
        for namespace in chosen:
            namespace.formatting = True
        # Blocks are erased with every Secure Erase Setting: afterwards they read as zeros.
        jobs = (
            (namespace, Job(Op.DISCARD, offset, length))
            for namespace in chosen
            for offset, length in pieces(namespace.backend.size, LARGE_PIECE)
        )
        later = Later()
        work = Work(self._controller, jobs, lambda failure: self._formatted(work, chosen, form, later, failure))
        self._formats.append(work)
        work.resume()
        return later

    def _formatted(self, work: Work, chosen: list[Namespace], form: int, later: Later, failure: Failure | None) -> None:
        self._formats.remove(work)
        self._controller.fast.changed()
        for namespace in chosen:
            namespace.formatting = False
            if failure is None:
                namespace.set_format(form)
                self._controller.namespace_changed(namespace.nsid)
        if failure is None:
            later.succeed()
        else:
            later.fail(CommandError(NvmeStatus.WRITE_FAULT, lba=failure.lba))

    def _sanitize(self, command: NvmeCommand, sq: SubmissionQueue) -> int:
        if self._formats:
            raise CommandError(NvmeStatus.FORMAT_IN_PROGRESS, dnr=False)
        self._controller.sanitize.start(command)
        return 0

    # ---- firmware, self-test, directives ---------------------------------------------------

    def _firmware_download(self, command: NvmeCommand, sq: SubmissionQueue) -> int:
        size, offset = command.cdw10 + 1 << 2, command.cdw11 << 2
        firmware = self._controller.firmware
        self._check_size(size)
        firmware.download(offset, size)
        firmware.store(offset, bytes(self._transfer(command, size, to_host=False).from_guest()))
        return 0

    def _firmware_commit(self, command: NvmeCommand, sq: SubmissionQueue) -> int:
        action = command.cdw10 >> 3 & 7
        if self._controller.firmware.commit(command.cdw10 & 7, action) and action == CommitAction.ACTIVATE_NOW:
            self._controller.notice(AsyncEvent.FIRMWARE_ACTIVATION)
        return 0

    def _self_test(self, command: NvmeCommand, sq: SubmissionQueue) -> int:
        self._controller.self_test.start(command)
        return 0

    def _directive(self, command: NvmeCommand) -> None:
        """Checks the directive type: only Identify (0) is supported, and it is always enabled (9.2).  CommandError."""
        if command.cdw11 >> 8 & 0xFF:
            raise CommandError(NvmeStatus.INVALID_FIELD, location=45)
        if command.nsid != BROADCAST:
            self._controller.inventory.attached(command.nsid)

    def _directive_send(self, command: NvmeCommand, sq: SubmissionQueue) -> int:
        self._directive(command)
        # Enable Directive: no directive can be enabled or disabled.
        raise CommandError(NvmeStatus.INVALID_FIELD, location=44)

    def _directive_receive(self, command: NvmeCommand, sq: SubmissionQueue) -> int:
        self._directive(command)
        if command.cdw11 & 0xFF != 1:  # Return Parameters
            raise CommandError(NvmeStatus.INVALID_FIELD, location=44)
        size = command.cdw10 + 1 << 2
        self._check_size(size)
        size = min(size, SIZE)
        parameters = bytearray(SIZE)
        parameters[0] = parameters[32] = 1  # supported, and enabled: Identify
        self._transfer(command, size, to_host=True).to_guest(parameters[:size])
        return 0
