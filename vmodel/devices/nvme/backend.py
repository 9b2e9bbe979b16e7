"""The storage of a namespace: memory, a sparse file, or a read-only raw image."""

from __future__ import annotations

import enum
import errno
import fcntl
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vmodel._shim import store
from vmodel.errors import ConfigError


class Op(enum.IntEnum):
    """The operation of a job on [offset, offset + length)."""

    #: Fills `data`.
    READ = store.READ
    #: Stores `data`.
    WRITE = store.WRITE
    #: EBADMSG unless the bytes equal `expected`.
    COMPARE = store.COMPARE
    #: Stores `data` if the bytes equal `expected`, else EBADMSG; atomic.
    COMPARE_WRITE = store.COMPARE_WRITE
    #: Writes zeros; keeps the space allocated if possible.
    ZERO = store.ZERO
    #: Writes zeros and frees the space.
    DISCARD = store.DISCARD
    #: Reads the bytes only to find errors.
    VERIFY = store.VERIFY
    #: Makes all earlier writes durable.
    SYNC = store.SYNC


@dataclass
class Job:
    """A piece of work for a backend.

    `sync`: written data is durable when the job is done; data is made durable before it is read.
    """

    op: Op
    offset: int = 0
    length: int = 0
    data: bytearray | memoryview | None = None
    expected: bytes | bytearray | None = None
    sync: bool = False


class BlockBackend:
    """`size` bytes of storage; bytes that were never written read as zeros.

    `workers`: threads for jobs that may block; None: jobs run at once on the calling thread.
    """

    def __init__(self, size: int, kept: store.Store, *, read_only: bool, workers: store.Workers | None = None) -> None:
        self.size = size
        self.read_only = read_only
        self.store = kept
        self._workers = workers

    def view(self, offset: int, length: int) -> memoryview | None:
        """The bytes themselves, without a copy; None: they are not in memory, so only jobs can access them."""
        whole = self.store.view
        return None if whole is None else whole[offset : offset + length]

    def submit(self, job: Job, done: Callable[[int], None]) -> int | None:
        """Starts a job; `done` is called with 0 or an errno on the device's thread.

        Returns a number for `revoke`, None: the job is done already.
        """
        what = (job.op, job.offset, job.length, job.data, job.expected, job.sync)
        if self._workers is None:
            done(self.store.run(what))
            return None
        return self._workers.submit(self.store, what, done)

    def revoke(self, number: int) -> bool:
        """Cancels a job, whose `done` is not called then; returns False if the job has begun."""
        return self._workers is not None and self._workers.revoke(number)

    def close(self) -> None:
        """Releases the file and its lock; memory is freed with its last user."""


class MemoryBackend(BlockBackend):
    """Anonymous memory, allocated on first write of each page; its contents are lost with the server."""

    def __init__(self, size: int) -> None:
        """OSError(ENOMEM): the system cannot provide `size` bytes."""
        super().__init__(size, store.Store.memory(size), read_only=False)


class FileBackend(BlockBackend):
    """A file, or a read-only raw image; it is locked against other servers while open."""

    def __init__(
        self, path: Path, size: int | None = None, *, read_only: bool = False, workers: store.Workers | None = None
    ) -> None:
        """`size` None: the file's own size; otherwise a missing file is created with `size` bytes.  ConfigError."""
        flags = os.O_RDONLY if read_only else os.O_RDWR
        if size is not None and not read_only:
            flags |= os.O_CREAT
        try:
            self._fd = os.open(path, flags | os.O_CLOEXEC, 0o644)
        except OSError as error:
            hint = "; give a size to make one" if error.errno == errno.ENOENT and not read_only else ""
            raise ConfigError(f"cannot open {path}: {error.strerror}{hint}") from error
        try:
            found = self._check(path, size, read_only)
            super().__init__(found, store.Store.file(self._fd, found), read_only=read_only, workers=workers)
        except BaseException:
            os.close(self._fd)
            raise

    def _check(self, path: Path, size: int | None, read_only: bool) -> int:
        """Locks the file, extends an empty one to `size`, and returns its size.  ConfigError."""
        info = os.fstat(self._fd)
        if not stat.S_ISREG(info.st_mode):
            raise ConfigError(f"{path} must be a regular file")
        try:
            fcntl.flock(self._fd, (fcntl.LOCK_SH if read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{path} is in use by another server; stop that one, or use another file") from error
        except OSError as error:
            raise ConfigError(f"cannot lock {path}: {error.strerror}") from error
        found = os.fstat(self._fd).st_size
        if found == 0 and size is not None and not read_only:
            try:
                os.ftruncate(self._fd, size)
            except OSError as error:
                raise ConfigError(f"cannot make {path} {size} bytes long: {error.strerror}") from error
            return size
        if size is not None and found != size:
            raise ConfigError(f"{path} has {found} bytes, not {size}; leave out size to use the file's own")
        if not found:
            raise ConfigError(f"{path} is empty; give a size")
        return found

    def close(self) -> None:
        # Unlock explicitly: the store has a duplicate of the fd, which may be closed later.
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        os.close(self._fd)
