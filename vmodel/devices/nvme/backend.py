"""What is behind a namespace: memory, a sparse file, or a raw image that is only read."""

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
    """What a job does with [offset, offset + length)."""

    #: Fills `data`.
    READ = store.READ
    #: Stores `data`.
    WRITE = store.WRITE
    #: EBADMSG unless it equals `expected`.
    COMPARE = store.COMPARE
    #: Stores `data` if it equals `expected`, else EBADMSG; nothing comes in between.
    COMPARE_WRITE = store.COMPARE_WRITE
    #: Makes it zeros; space stays reserved where it can be.
    ZERO = store.ZERO
    #: Makes it zeros and gives the space back.
    DISCARD = store.DISCARD
    #: Reads all of it for nothing but errors.
    VERIFY = store.VERIFY
    #: Whatever was written is on disk afterwards.
    SYNC = store.SYNC


@dataclass
class Job:
    """A piece of work for a backend.

    `sync`: what it writes is on disk when it is done; what it reads was on disk before.
    """

    op: Op
    offset: int = 0
    length: int = 0
    data: bytearray | memoryview | None = None
    expected: bytes | bytearray | None = None
    sync: bool = False


class BlockBackend:
    """`size` bytes that outlive commands; what was never written reads as zeros.

    Jobs that may have to wait are done by `workers`, where there are any.
    """

    def __init__(self, size: int, kept: store.Store, *, read_only: bool, workers: store.Workers | None = None) -> None:
        self.size = size
        self.read_only = read_only
        self.store = kept
        self._workers = workers

    def view(self, offset: int, length: int) -> memoryview | None:
        """The bytes themselves, where they are in memory: no job is needed to read or write them."""
        whole = self.store.view
        return None if whole is None else whole[offset : offset + length]

    def submit(self, job: Job, done: Callable[[int], None]) -> int | None:
        """Does a job, now or later; `done` is called on the device's thread, with 0 or an errno.

        A number for `revoke`; None when it is done already.
        """
        what = (job.op, job.offset, job.length, job.data, job.expected, job.sync)
        if self._workers is None:
            done(self.store.run(what))
            return None
        return self._workers.submit(self.store, what, done)

    def revoke(self, number: int) -> bool:
        """Takes a job back, and `done` is not called; False: it has begun."""
        return self._workers is not None and self._workers.revoke(number)

    def close(self) -> None:
        """Gives back the lock; memory goes when nobody uses it any more."""


class MemoryBackend(BlockBackend):
    """Anonymous memory, taken page by page as it is written; gone with the server."""

    def __init__(self, size: int) -> None:
        """OSError(ENOMEM): there is not so much."""
        super().__init__(size, store.Store.memory(size), read_only=False)


class FileBackend(BlockBackend):
    """A file, or a raw image that is only read; locked against other servers while it is open."""

    def __init__(
        self, path: Path, size: int | None = None, *, read_only: bool = False, workers: store.Workers | None = None
    ) -> None:
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
            found = self._check(path, size, read_only)
            super().__init__(found, store.Store.file(self._fd, found), read_only=read_only, workers=workers)
        except BaseException:
            os.close(self._fd)
            raise

    def _check(self, path: Path, size: int | None, read_only: bool) -> int:
        """Locks the file; its size, once it has `size`."""
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
            raise ConfigError(f"{path} has {found} bytes, not {size}; leave the size out to take it as it is")
        if not found:
            raise ConfigError(f"{path} is empty; give a size")
        return found

    def close(self) -> None:
        # Explicitly: the store has a copy of the fd, and may live a little longer.
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        os.close(self._fd)
