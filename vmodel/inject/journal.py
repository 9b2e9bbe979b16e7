"""The log of injections: JSON lines in a file, and the latest records in memory."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from vmodel.files import create

#: The number of records kept in memory.
KEPT = 10_000
#: The most bytes of data that a record contains.
_SHOWN = 64


def shown(value: bytes | int | str | None) -> Any:
    """A value for a record's "before" or "after": bytes as hexadecimal digits, truncated to 64 bytes."""
    if isinstance(value, bytes):
        return value.hex() if len(value) <= _SHOWN else f"{value[:_SHOWN].hex()}... ({len(value)} bytes)"
    return value


class Journal:
    """Stores records from any thread; each gets a number `n`, from 1."""

    def __init__(self, path: Path | None = None) -> None:
        """`path`: the file; it is created with the first record, and then replaces an older file."""
        self.path = path
        #: Called with each record, on the thread that adds it.
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        self._file: BinaryIO | None = None
        self._lock = threading.Lock()
        self._last: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._count = 0
        #: How many there were when the file was closed: what comes after that, as a late event, is in no file.
        self._closed_at: int | None = None

    def put(self, record: dict[str, Any]) -> None:
        """Adds a record.  OSError: the file cannot be written."""
        with self._lock:
            self._count += 1
            numbered = {"n": self._count, **record}
            self._last.append(numbered)
            if self.path is not None:
                if self._file is None:
                    self._file = create(self.path)
                self._file.write(f"{json.dumps(numbered)}\n".encode())
                self._file.flush()
        for listener in list(self.listeners):
            listener(numbered)

    def since(self, n: int = 0, most: int = 1000) -> list[dict[str, Any]]:
        """At most `most` of the records in memory with numbers above `n`, the oldest first."""
        with self._lock:
            return [record for record in self._last if record["n"] > n][:most]

    def __len__(self) -> int:
        return self._count if self._closed_at is None else self._closed_at

    def close(self) -> None:
        """Closes the file; the records in memory stay, and no more are counted."""
        with self._lock:
            self._closed_at = len(self)
            if self._file is not None:
                self._file.close()
                self._file, self.path = None, None
