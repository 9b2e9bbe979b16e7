"""QEMU's monitor (QMP): commands to QEMU while a guest runs, and the events that QEMU reports."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

from qemu.qmp import QMPClient, QMPError

from vmodel.closing import Closing
from vmodel.patience import patience, spoken

_T = TypeVar("_T")
#: Seconds that QEMU may take to answer.
_TIMEOUT = 20.0


class MonitorError(Exception):
    """QEMU refused a command, did not answer, or has ended."""


class Monitor(Closing):
    """A connection to QEMU's QMP socket; a context manager.  Its methods may be called from any thread."""

    def __init__(self, path: Path) -> None:
        """Connects to QEMU's socket `path`; waits up to 20 s until QEMU has created it.  MonitorError."""
        #: The events that QEMU has reported, oldest first: (time.monotonic() of the arrival, name, data).
        self.events: list[tuple[float, str, Mapping[str, Any]]] = []
        self._arrived = threading.Condition()
        self._path = path
        self._client = QMPClient("vmodel")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vmodel-qmp", daemon=True)
        self._thread.start()
        try:
            self._call(self._connect())
        except BaseException:
            self.close()
            raise

    async def _connect(self) -> None:
        deadline = time.monotonic() + patience(_TIMEOUT)
        while not self._path.exists():  # QEMU has just been started
            if time.monotonic() >= deadline:
                raise MonitorError(f"QEMU does not listen at {self._path}")
            await asyncio.sleep(0.02)
        await self._client.connect(str(self._path))
        self._listening = asyncio.ensure_future(self._listen())

    async def _listen(self) -> None:
        async for message in self._client.events:
            with self._arrived:
                data: Any = message.get("data", {})
                self.events.append((time.monotonic(), str(message["event"]), data))
                self._arrived.notify_all()

    def _call(self, work: Coroutine[Any, Any, _T]) -> _T:
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result(patience(_TIMEOUT))
        except (QMPError, OSError, EOFError, TimeoutError, asyncio.CancelledError) as error:
            raise MonitorError(f"QMP: {str(error) or type(error).__name__}") from error

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Executes a command; returns QEMU's answer.  MonitorError: QEMU refuses it, or does not answer in 20 s."""
        return self._call(self._client.execute(command, dict(arguments or {})))

    def wait(self, name: str, timeout: float = _TIMEOUT, **data: Any) -> Mapping[str, Any]:
        """Waits for an event `name` whose data contains `data`, and returns its data.

        An event that has arrived before counts, too: see `clear`.  MonitorError: none arrived in `timeout` seconds.
        """
        deadline = time.monotonic() + patience(timeout)
        with self._arrived:
            while True:
                for _, found, said in self.events:
                    if found == name and all(said.get(key) == value for key, value in data.items()):
                        return said
                if not self._arrived.wait(deadline - time.monotonic()) and time.monotonic() >= deadline:
                    raise MonitorError(f"QEMU did not report {name} in {spoken(timeout)}")

    def clear(self, name: str) -> None:
        """Drops the events `name` that have arrived, so that `wait` waits for a new one."""
        with self._arrived:
            self.events = [event for event in self.events if event[1] != name]

    def close(self) -> None:
        """Closes the connection."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._leave(), self._loop).result(patience(_TIMEOUT))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(patience(_TIMEOUT))
        self._loop.close()

    async def _leave(self) -> None:
        listening = getattr(self, "_listening", None)
        if listening is not None:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
        with contextlib.suppress(QMPError, OSError, EOFError):  # QEMU has ended first
            await self._client.disconnect()
