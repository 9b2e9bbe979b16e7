"""Files: safe creation where others may write, safe reading of what others name, and errors that name the file."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO


def cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """vmodel's cache, which need not exist.  A relative XDG_CACHE_HOME is ignored, as the XDG specification says."""
    base = Path(environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "vmodel"


def create(path: Path) -> BinaryIO:
    """Creates a new file with mode 0600 at `path`; a file or symlink that is there is removed, not followed.  OSError.

    FileExistsError: another process has created a file there in the meantime.
    """
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "wb")


def append(path: Path) -> BinaryIO:
    """Opens a file for appending, and creates it if there is none.  OSError: a symlink or no regular file is there."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        file = os.fdopen(os.open(path, flags, 0o666), "ab")
    except OSError as error:
        if error.errno == errno.ELOOP:
            error.strerror = "is a symbolic link"
        raise
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return file


@contextlib.contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """An OSError within this context that names no file, as of a write to a full disk, names this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def regular(path: Path, most: int) -> None:
    """OSError: there is no regular file of at most `most` bytes at `path`.

    FIFOs and devices may have no end, and opening them may wait or have an effect.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    if found.st_size > most:
        raise OSError(errno.EFBIG, f"is larger than {most:,} bytes", str(path))


def pieces(path: Path, most: int) -> Iterator[bytes]:
    """The content of a regular file, in pieces.  OSError: see `regular`; or it is one of /proc that has no end."""
    regular(path, most)
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
        while piece := file.read(1 << 20):
            most -= len(piece)
            if most < 0:
                raise OSError(errno.EFBIG, "is larger than it says", str(path))
            yield piece
