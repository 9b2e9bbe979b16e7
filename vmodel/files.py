"""Files: safe creation in directories that other users may write to, and errors that name the file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def create(path: Path) -> BinaryIO:
    """Creates a new file with mode 0600 at `path`; a file or symlink that is there is removed, not followed.  OSError.

    FileExistsError: another process has created a file there in the meantime.
    """
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "wb")


@contextlib.contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """An OSError within this context that names no file, as of a write to a full disk, names this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
