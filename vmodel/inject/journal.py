"""The log of injections: JSON lines in a file, and the last ones in memory for whoever asks."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from vmodel.files import create

#: Records that are kept in memory.
KEPT = 10_000
#: Bytes of data that a record shows.
_SHOWN = 64


def shown(value: bytes | int | str | None) -> Any:
    """A record's before or after: bytes as hexadecimal digits, cut to 64 bytes."""
    if isinstance(value, bytes):
        return value.hex() if len(value) <= _SHOWN else f"{value[:_SHOWN].hex()}... ({len(value)} bytes)"
    return value


class Journal:
    """Takes records from any thread; each gets a number `n`, from 1 on."""

    def __init__(self, path: Path | None = None) -> None:
        """`path`: where the lines go; the file is made with the first one, and an older one goes then."""
        self.path = path
        #: Hear of each record, on the thread that puts it.
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        self._file: BinaryIO | None = None
        self._lock = threading.Lock()
        self._last: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._count = 0

    def put(self, record: dict[str, Any]) -> None:
        """OSError: the file cannot be written."""
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
        """Records after number `n`, the oldest first, of those that are kept."""
        with self._lock:
            return [record for record in self._last if record["n"] > n][:most]

    def __len__(self) -> int:
        return self._count

    def close(self) -> None:
        """Ends the file; what is kept stays."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file, self.path = None, None
