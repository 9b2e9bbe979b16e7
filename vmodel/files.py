"""Safe creation of files in directories that other users may write to."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import BinaryIO


def create(path: Path) -> BinaryIO:
    """Creates a new file with mode 0600 at `path`; a file or symlink that is there is removed, not followed.  OSError.

    FileExistsError: another process has created a file there in the meantime.
    """
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "wb")
