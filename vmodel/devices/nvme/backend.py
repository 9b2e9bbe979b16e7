"""What is behind a namespace: memory, a sparse file, or a raw image that is only read."""

from __future__ import annotations

import enum
import errno
import fcntl
import mmap
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vmodel.errors import ConfigError
from vmodel.span import PAGE


class Op(enum.IntEnum):
    """What a job does with [offset, offset + length)."""

    #: Fills `data`.
    READ = 0
    #: Stores `data`.
    WRITE = 1
    #: EBADMSG unless it equals `data`.
    COMPARE = 2
    #: Stores `data` if it equals `expected`, else EBADMSG; nothing comes in between.
    COMPARE_WRITE = 3
    #: Makes it zeros; space stays reserved where it can be.
    ZERO = 4
    #: Makes it zeros and gives the space back.
    DISCARD = 5
    #: Reads all of it for nothing but errors.
    VERIFY = 6
    #: Whatever was written is on disk afterwards.
    SYNC = 7


@dataclass
class Job:
    """A piece of work for a backend; `sync`: what it writes is on disk when it is done."""

    op: Op
    offset: int = 0
    length: int = 0
    data: bytearray | memoryview | None = None
    expected: bytes | bytearray | None = None
    sync: bool = False


class Backend(ABC):
    """`size` bytes that survive commands; blocks that were never written read as zeros."""

    def __init__(self, size: int, *, read_only: bool) -> None:
        self.size = size
        self.read_only = read_only

    def view(self, offset: int, length: int) -> memoryview | None:
        """The bytes themselves, where they are in memory: no job is needed to read or write them."""
        return None

    def submit(self, job: Job, done: Callable[[int], None]) -> None:
        """Does the job; calls `done` on the device's thread, with 0 or an errno."""
        try:
            self._do(job)
        except OSError as error:
            done(error.errno or errno.EIO)
        else:
            done(0)

    @abstractmethod
    def _do(self, job: Job) -> None:
        """OSError."""

    @abstractmethod
    def close(self) -> None:
        """Gives back memory or file, and the lock."""


class MemoryBackend(Backend):
    """Anonymous memory, taken page by page as it is written; gone with the server."""

    def __init__(self, size: int) -> None:
        super().__init__(size, read_only=False)
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._view = memoryview(self._map)

    def view(self, offset: int, length: int) -> memoryview:
        return self._view[offset : offset + length]

    def _do(self, job: Job) -> None:
        view = self.view(job.offset, job.length)
        if job.op is Op.READ:
            assert job.data is not None
            job.data[:] = view
        elif job.op is Op.WRITE:
            assert job.data is not None
            view[:] = job.data
        elif job.op in (Op.COMPARE, Op.COMPARE_WRITE):
            expected = job.expected if job.op is Op.COMPARE_WRITE else job.data
            if view != expected:
                raise OSError(errno.EBADMSG, "the data differs")
            if job.op is Op.COMPARE_WRITE:
                assert job.data is not None
                view[:] = job.data
        elif job.op in (Op.ZERO, Op.DISCARD):
            end = job.offset + job.length
            first, last = -(-job.offset // PAGE) * PAGE, end // PAGE * PAGE
            if first < last:
                self._map.madvise(mmap.MADV_DONTNEED, first, last - first)
                self._view[job.offset : first] = bytes(first - job.offset)
                self._view[last:end] = bytes(end - last)
            else:
                view[:] = bytes(job.length)

    def close(self) -> None:
        self._view.release()
        self._map.close()


class FileBackend(Backend):
    """A file, or a raw image that is only read; locked against other servers while it is open."""

    def __init__(self, path: Path, size: int | None = None, *, read_only: bool = False) -> None:
        """`size` None: the file's own.  Without a file one of `size` bytes is made.  ConfigError."""
        flags = os.O_RDONLY if read_only else os.O_RDWR
        if size is not None and not read_only:
            flags |= os.O_CREAT
        try:
            self._fd = os.open(path, flags | os.O_CLOEXEC, 0o644)
        except OSError as error:
            hint = "; give a size to make one" if error.errno == errno.ENOENT and not read_only else ""
            raise ConfigError(f"cannot open {path}: {error.strerror}{hint}") from error
        try:
            super().__init__(self._check(path, size, read_only), read_only=read_only)
        except BaseException:
            os.close(self._fd)
            raise

    def _check(self, path: Path, size: int | None, read_only: bool) -> int:
        """Locks the file; its size, once it has `size`."""
        try:
            fcntl.flock(self._fd, (fcntl.LOCK_SH if read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{path} is in use by another server; stop that one, or use another file") from error
        except OSError as error:
            raise ConfigError(f"cannot lock {path}: {error.strerror}") from error
        info = os.fstat(self._fd)
        if not stat.S_ISREG(info.st_mode):
            raise ConfigError(f"{path} must be a regular file")
        if info.st_size == 0 and size is not None and not read_only:
            try:
                os.ftruncate(self._fd, size)
            except OSError as error:
                raise ConfigError(f"cannot make {path} {size} bytes long: {error.strerror}") from error
            return size
        if size is not None and info.st_size != size:
            raise ConfigError(f"{path} has {info.st_size} bytes, not {size}; leave the size out to take it as it is")
        if not info.st_size:
            raise ConfigError(f"{path} is empty; give a size")
        return info.st_size

    def _do(self, job: Job) -> None:
        if job.op is Op.SYNC:
            os.fdatasync(self._fd)
            return
        if job.op is Op.READ:
            assert job.data is not None
            self._read(job.offset, memoryview(job.data))
        elif job.op in (Op.COMPARE, Op.COMPARE_WRITE, Op.VERIFY):
            found = bytearray(job.length)
            self._read(job.offset, memoryview(found))
            expected = job.expected if job.op is Op.COMPARE_WRITE else job.data
            if job.op is not Op.VERIFY and found != expected:
                raise OSError(errno.EBADMSG, "the data differs")
        if job.op in (Op.WRITE, Op.COMPARE_WRITE):
            assert job.data is not None
            self._write(job.offset, memoryview(job.data))
        elif job.op in (Op.ZERO, Op.DISCARD):
            self._write(job.offset, memoryview(bytes(job.length)))
        if job.sync:
            os.fdatasync(self._fd)

    def _read(self, offset: int, view: memoryview) -> None:
        while view:
            count = os.preadv(self._fd, [view], offset)
            if not count:
                raise OSError(errno.EIO, "the file has become shorter")
            view, offset = view[count:], offset + count

    def _write(self, offset: int, view: memoryview) -> None:
        while view:
            count = os.pwrite(self._fd, view, offset)
            view, offset = view[count:], offset + count

    def close(self) -> None:
        os.close(self._fd)
