"""The NVM command set (NVMe 1.4, 6; Copy: technical proposal 4065)."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Generator, Iterable
from typing import Protocol

from vmodel.devices.nvme.backend import BlockBackend, Job, Op
from vmodel.devices.nvme.command import BROADCAST, NvmeCommand
from vmodel.devices.nvme.extents import Extents
from vmodel.devices.nvme.health import Health
from vmodel.devices.nvme.pointers import Transfer
from vmodel.devices.nvme.queue import Host, Later, SubmissionQueue
from vmodel.devices.nvme.status import CommandError, NvmeStatus

#: Most blocks of an atomic Compare and Write: as many as a command can have.
ATOMIC_COMPARE_WRITE = 65536
#: Limits of Copy: blocks in a source range, blocks in all, source ranges.
MAX_COPY_RANGE, MAX_COPY, MAX_COPY_RANGES = 1 << 12, 1 << 14, 128

_RANGE = struct.Struct("<IIQ")  # Dataset Management: context attributes, blocks, first block
_SOURCE = struct.Struct("<8xQH6xIHH")  # Copy, format 0: first block, blocks (0's based), tags

_FUA, _DEALLOCATE, _PRINFO = 1 << 30, 1 << 25, 15 << 26
_AD = 1 << 2  # Dataset Management: deallocate
_PRINFO_READ = 15 << 12  # Copy
#: Most spans of blocks of a namespace that Write Uncorrectable has marked; a command that needs one more fails.
MAX_UNCORRECTABLE = 16384
#: Least bytes that a worker's job counts as, with and without data: a job without data may take long.
_LEAST_DATA, _LEAST = 1 << 16, 1 << 20
_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class IoNamespace(Protocol):
    """A namespace as I/O commands see it; `blocks` of 1 << `lba_shift` bytes."""

    nsid: int
    backend: BlockBackend
    lba_shift: int
    blocks: int
    #: Blocks that Write Uncorrectable has marked.
    uncorrectable: Extents

    @property
    def read_only(self) -> bool:
        """Whether writes are refused."""


class IoHost(Host, Protocol):
    """The controller as I/O commands see it."""

    page_size: int
    #: Bytes that one command may transfer (MDTS).
    max_transfer: int
    health: Health

    @property
    def write_cache(self) -> bool:
        """Feature Volatile Write Cache; if it is off, each write is durable when its command completes."""

    def namespace(self, nsid: int) -> IoNamespace:
        """An attached namespace that commands may access.  CommandError: its id is invalid, inactive or not ready."""

    def namespaces(self) -> Iterable[IoNamespace]:
        """All attached namespaces."""


#: A command in steps: yields jobs for a namespace's backend one by one; a job's failure is thrown in as CommandError.
Steps = Generator[tuple[IoNamespace, Job], None, None]


class _Course:
    """A command in progress: runs its steps."""

    def __init__(self, commands: IoCommands, steps: Steps) -> None:
        self._commands = commands
        self._steps = steps
        self.later = Later(self.drop)
        #: The job that it waits for: (namespace, job, number for `revoke`, bytes that it counts as).
        self._job: tuple[IoNamespace, Job, int, int] | None = None
        self._codes: list[int] = []
        self._cancelled = False

    def go(self, error: CommandError | None = None) -> None:
        """Runs further steps until one has to wait, or the command is complete; `error`: failure of the last job."""
        self._job = None
        try:
            while True:  # a command has as many steps as its blocks, ranges or regions need
                namespace, job = self._steps.throw(error) if error is not None else next(self._steps)
                number = namespace.backend.submit(job, self._done)
                if number is not None:
                    size = max(job.length, _LEAST if job.data is None and job.expected is None else _LEAST_DATA)
                    self._job = namespace, job, number, size
                    self._commands.hold(self, size)
                    return
                code = self._codes.pop()
                error = self._commands.status(namespace, job, code) if code else None
        except StopIteration:
            self.later.succeed()
        except Exception as failure:
            self.later.fail(failure)

    def _done(self, code: int) -> None:
        if self._job is None:
            self._codes.append(code)  # the job was done inside `submit`
            return
        namespace, job, _, size = self._job
        self._commands.release(self, size)
        if not self._cancelled:
            self.go(self._commands.status(namespace, job, code) if code else None)

    def cancel(self) -> None:
        """Stops the command: no further step is run."""
        if not self.drop():
            self._cancelled = True

    def drop(self) -> bool:
        """Cancels the job that the command waits for; returns False if the job has begun."""
        if self._job is None:
            return False
        namespace, _, number, size = self._job
        if not namespace.backend.revoke(number):
            return False
        self._commands.release(self, size)
        return True


class IoCommands:
    """The commands of I/O queues, as a table."""

    def __init__(self, host: IoHost) -> None:
        self._host = host
        #: Commands that wait for workers.
        self.waiting: set[_Course] = set()
        self._table: dict[int, Callable[[NvmeCommand], Steps]] = {
            0x00: self._flush,
            0x01: self._write,
            0x02: self._read,
            0x04: self._write_uncorrectable,
            0x05: self._compare,
            0x08: self._write_zeroes,
            0x09: self._dataset_management,
            0x0C: self._verify,
            0x19: self._copy,
        }

    def reset(self) -> None:
        """Stops all commands, as the queues are deleted."""
        for course in list(self.waiting):
            course.cancel()
        self.waiting.clear()

    def hold(self, course: _Course, size: int) -> None:
        """Counts a job that workers have as `size` bytes."""
        self.waiting.add(course)
        self._host.fast.hold(size)

    def release(self, course: _Course, size: int) -> None:
        """Ends the count of a job."""
        self.waiting.discard(course)
        self._host.fast.release(size)

    @property
    def opcodes(self) -> set[int]:
        """The supported opcodes, for the log of command effects."""
        return set(self._table)

    def execute(self, command: NvmeCommand, sq: SubmissionQueue) -> int | Later:
        """Carries out a command; returns Later.  CommandError, DmaFault."""
        handler = self._table.get(command.opcode)
        if handler is None:
            raise CommandError(NvmeStatus.INVALID_OPCODE, location=0)
        course = _Course(self, handler(command))
        course.go()
        return course.later

    # ---- what commands have in common ----------------------------------------------------------

    @staticmethod
    def _check_blocks(namespace: IoNamespace, slba: int, count: int) -> None:
        if slba + count > namespace.blocks:
            raise CommandError(NvmeStatus.LBA_OUT_OF_RANGE, location=40, lba=slba)

    def _target(self, command: NvmeCommand) -> tuple[IoNamespace, int, int]:
        """(namespace, offset, length in bytes) of the blocks that a command addresses.  CommandError."""
        namespace = self._host.namespace(command.nsid)
        self._check_blocks(namespace, command.slba, command.blocks)
        if command.cdw12 & _PRINFO:
            # No namespace is formatted with protection information.
            raise CommandError(NvmeStatus.INVALID_PROTECTION_INFORMATION, location=2 << 8 | 51)
        return namespace, command.slba << namespace.lba_shift, command.blocks << namespace.lba_shift

    def _transfer(self, command: NvmeCommand, size: int, *, to_host: bool) -> Transfer:
        if size > self._host.max_transfer:
            raise CommandError(NvmeStatus.INVALID_FIELD, location=48)
        return Transfer(self._host.dma, command, self._host.page_size, size, to_host=to_host)

    @staticmethod
    def _not_protected(namespace: IoNamespace) -> None:
        if namespace.read_only:
            raise CommandError(NvmeStatus.NAMESPACE_WRITE_PROTECTED)

    @classmethod
    def _writable(cls, namespace: IoNamespace, slba: int, count: int) -> None:
        cls._not_protected(namespace)
        bad = namespace.uncorrectable
        if len(bad) >= MAX_UNCORRECTABLE and bad.would_split(slba, count):
            raise CommandError(NvmeStatus.WRITE_FAULT, lba=slba)

    @staticmethod
    def _readable(namespace: IoNamespace, slba: int, count: int) -> None:
        bad = namespace.uncorrectable.first_in(slba, count)
        if bad is not None:
            raise CommandError(NvmeStatus.UNRECOVERED_READ, lba=bad)

    def _durable(self, command: NvmeCommand) -> bool:
        """Whether the data that a command writes must be durable when it completes."""
        return bool(command.cdw12 & _FUA) or not self._host.write_cache

    @staticmethod
    def _clear_uncorrectable(namespace: IoNamespace, slba: int, count: int) -> None:
        """Removes the mark of Write Uncorrectable from blocks."""
        if namespace.uncorrectable:
            namespace.uncorrectable.remove(slba, count)

    def _written(self, namespace: IoNamespace, slba: int, count: int) -> None:
        """Records that the host has written data to these blocks."""
        self._host.health.written = True
        self._clear_uncorrectable(namespace, slba, count)

    def status(self, namespace: IoNamespace, job: Job, code: int) -> CommandError:
        """Logs the errno of a failed job; returns the error that the guest gets for it."""
        lba = job.offset >> namespace.lba_shift
        if code == errno.EBADMSG:
            return CommandError(NvmeStatus.COMPARE_FAILURE, lba=lba)
        self._host.log.warning("namespace %d: %s at block %d: %s", namespace.nsid, job.op.name, lba, os.strerror(code))
        if code in _SPACE:
            return CommandError(NvmeStatus.CAPACITY_EXCEEDED, lba=lba)
        if code in (errno.EROFS, errno.EPERM, errno.EBADF):
            return CommandError(NvmeStatus.NAMESPACE_WRITE_PROTECTED, lba=lba)
        reading = job.op in (Op.READ, Op.VERIFY, Op.COMPARE)
        return CommandError(NvmeStatus.UNRECOVERED_READ if reading else NvmeStatus.WRITE_FAULT, lba=lba)

    # ---- the commands --------------------------------------------------------------------------

    def _read(self, command: NvmeCommand) -> Steps:
        namespace, offset, length = self._target(command)
        transfer = self._transfer(command, length, to_host=True)
        self._readable(namespace, command.slba, command.blocks)
        view = namespace.backend.view(offset, length)
        if view is not None:
            transfer.to_guest(view)
        else:
            buffer = bytearray(length)
            # Force Unit Access: the data must be durable before it is read.
            yield namespace, Job(Op.READ, offset, length, buffer, sync=bool(command.cdw12 & _FUA))
            transfer.to_guest(buffer)
        self._host.health.reads += 1
        self._host.health.bytes_read += length

    def _write(self, command: NvmeCommand) -> Steps:
        namespace, offset, length = self._target(command)
        transfer = self._transfer(command, length, to_host=False)
        self._writable(namespace, command.slba, command.blocks)
        view = namespace.backend.view(offset, length)
        if view is not None:
            transfer.from_guest_into(view)
        else:
            yield namespace, Job(Op.WRITE, offset, length, transfer.from_guest(), sync=self._durable(command))
        self._written(namespace, command.slba, command.blocks)
        self._host.health.writes += 1
        self._host.health.bytes_written += length

    def _flush(self, command: NvmeCommand) -> Steps:
        everything = command.nsid == BROADCAST
        for namespace in list(self._host.namespaces()) if everything else [self._host.namespace(command.nsid)]:
            yield namespace, Job(Op.SYNC)

    def _compare(self, command: NvmeCommand) -> Steps:
        namespace, offset, length = self._target(command)
        transfer = self._transfer(command, length, to_host=False)
        self._readable(namespace, command.slba, command.blocks)
        yield namespace, Job(Op.COMPARE, offset, length, expected=transfer.from_guest())
        self._host.health.reads += 1
        self._host.health.bytes_read += length

    def execute_fused(self, first: NvmeCommand, second: NvmeCommand, sq: SubmissionQueue) -> tuple[Later, Later]:
        """Carries out Compare and Write as one atomic operation (6.2).  CommandError, DmaFault."""
        if (first.opcode, second.opcode) != (0x05, 0x01):
            raise CommandError(NvmeStatus.INVALID_FIELD, location=0)
        if (first.nsid, first.slba, first.blocks) != (second.nsid, second.slba, second.blocks):
            raise CommandError(NvmeStatus.INVALID_FIELD, location=40)
        namespace, offset, length = self._target(first)
        self._target(second)
        expected, data = (self._transfer(c, length, to_host=False) for c in (first, second))
        self._writable(namespace, first.slba, first.blocks)
        self._readable(namespace, first.slba, first.blocks)
        job = Job(
            Op.COMPARE_WRITE,
            offset,
            length,
            data.from_guest(),
            expected=expected.from_guest(),
            sync=self._durable(second),
        )
        compare = Later()
        write = _Course(self, self._compare_and_write(namespace, job, compare))
        write.later.abort = None  # one half cannot be aborted without the other
        write.go()
        return compare, write.later

    def _compare_and_write(self, namespace: IoNamespace, job: Job, compare: Later) -> Steps:
        try:
            yield namespace, job
        except CommandError as error:
            if error.status is not NvmeStatus.COMPARE_FAILURE:
                compare.succeed()
                raise
            compare.fail(error)
            raise CommandError(NvmeStatus.ABORTED_FAILED_FUSED) from error
        compare.succeed()
        self._host.health.reads += 1
        self._host.health.bytes_read += job.length
        self._host.health.written = True
        self._host.health.writes += 1
        self._host.health.bytes_written += job.length

    def _write_uncorrectable(self, command: NvmeCommand) -> Steps:
        namespace, _, _ = self._target(command)
        self._not_protected(namespace)
        bad = namespace.uncorrectable
        if len(bad) >= MAX_UNCORRECTABLE and not bad.would_join(command.slba, command.blocks):
            raise CommandError(NvmeStatus.WRITE_FAULT, lba=command.slba)
        bad.add(command.slba, command.blocks)
        return
        yield

    def _write_zeroes(self, command: NvmeCommand) -> Steps:
        namespace, offset, length = self._target(command)
        self._writable(namespace, command.slba, command.blocks)
        op = Op.DISCARD if command.cdw12 & _DEALLOCATE else Op.ZERO
        yield namespace, Job(op, offset, length, sync=self._durable(command))
        self._written(namespace, command.slba, command.blocks)

    def _dataset_management(self, command: NvmeCommand) -> Steps:
        namespace = self._host.namespace(command.nsid)
        size = ((command.cdw10 & 0xFF) + 1) * _RANGE.size
        raw = Transfer(self._host.dma, command, self._host.page_size, size, to_host=False).from_guest()
        ranges = [(slba, blocks) for _, blocks, slba in _RANGE.iter_unpack(raw)]
        for slba, blocks in ranges:
            self._check_blocks(namespace, slba, blocks)
        if not command.cdw11 & _AD:
            return  # only hints
        for slba, blocks in ranges:
            self._writable(namespace, slba, blocks)
            if blocks:
                yield namespace, Job(Op.DISCARD, slba << namespace.lba_shift, blocks << namespace.lba_shift)
                self._clear_uncorrectable(namespace, slba, blocks)

    def _verify(self, command: NvmeCommand) -> Steps:
        namespace, offset, length = self._target(command)
        self._readable(namespace, command.slba, command.blocks)
        yield namespace, Job(Op.VERIFY, offset, length)
        self._host.health.bytes_read += length

    def _copy(self, command: NvmeCommand) -> Steps:
        namespace = self._host.namespace(command.nsid)
        shift = namespace.lba_shift
        if command.cdw12 >> 8 & 15:  # a descriptor format that is not 0
            raise CommandError(NvmeStatus.INVALID_FIELD, location=49)
        if command.cdw12 & (_PRINFO | _PRINFO_READ):
            raise CommandError(NvmeStatus.INVALID_PROTECTION_INFORMATION, location=48)
        count = (command.cdw12 & 0xFF) + 1
        if count > MAX_COPY_RANGES:
            raise CommandError(NvmeStatus.COMMAND_SIZE_LIMIT_EXCEEDED, location=48)
        size = count * _SOURCE.size
        raw = Transfer(self._host.dma, command, self._host.page_size, size, to_host=False).from_guest()
        sources = [(slba, blocks + 1) for slba, blocks, *_ in _SOURCE.iter_unpack(raw)]
        total = sum(blocks for _, blocks in sources)
        if total > MAX_COPY or any(blocks > MAX_COPY_RANGE for _, blocks in sources):
            raise CommandError(NvmeStatus.COMMAND_SIZE_LIMIT_EXCEEDED, location=48)
        self._check_blocks(namespace, command.slba, total)
        target = command.slba
        for n, (slba, blocks) in enumerate(sources):
            try:
                self._writable(namespace, target, blocks)
                self._check_blocks(namespace, slba, blocks)
                self._readable(namespace, slba, blocks)
                data = bytearray(blocks << shift)
                yield namespace, Job(Op.READ, slba << shift, len(data), data)
                yield namespace, Job(Op.WRITE, target << shift, len(data), data, sync=self._durable(command))
            except CommandError as error:
                # Dword 0 is the number of the first range that was not copied.
                error.result = n
                raise
            self._written(namespace, target, blocks)
            target += blocks
