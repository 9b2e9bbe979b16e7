"""Files in folders that others may write to, too."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import BinaryIO


def create(path: Path) -> BinaryIO:
    """A new file of ours alone (0600) in the place of what is at `path`, which is removed and not followed.  OSError.

    FileExistsError: somebody else was faster.
    """
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "wb")
