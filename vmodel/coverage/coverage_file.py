"""Reads a file with a coverage, which may come from somebody else."""

from __future__ import annotations

import json
from pathlib import Path

from vmodel.coverage.coverage import Coverage
from vmodel.coverage.errors import CoverageError
from vmodel.files import pieces

#: The limit of a file, in bytes.  All of a kernel's code that ran in a test takes less than one MiB.
_LARGEST = 16 << 20


def read_coverage(path: Path) -> Coverage:
    """What `Coverage.to_json` gave.  CoverageError: the file cannot be read, is damaged or too large."""
    try:
        content = json.loads(b"".join(pieces(path, _LARGEST)))
    except OSError as error:
        raise CoverageError(f"cannot be read: {error.strerror}", file=path) from None
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        raise CoverageError("is damaged: it is not JSON", file=path) from None
    try:
        return Coverage.from_json(content)
    except CoverageError as error:
        raise CoverageError(f"is damaged: {error}", file=path) from None
