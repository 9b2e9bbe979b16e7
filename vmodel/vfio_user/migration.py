"""The migration state machine of a device: sections "VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE" and following.

State is a table: `ARCS` names the direct transitions and what each does; all others are the shortest path of
those that has no saving state inside.  PRE_COPY is optional and left out: a model's registers are small, so
there is nothing to gain from sending them while the device runs.
"""

from __future__ import annotations

import errno
from collections import deque
from typing import Protocol

from vmodel.errors import PeerError
from vmodel.vfio_user.wire import DeviceState

S = DeviceState
_SAVING = frozenset({S.STOP_COPY})

#: (from, to) -> name of the `Migration` method that carries it out.
ARCS: dict[tuple[DeviceState, DeviceState], str] = {
    (S.RUNNING, S.STOP): "_stop",
    (S.STOP, S.RUNNING): "_run",
    (S.STOP, S.STOP_COPY): "_save",
    (S.STOP_COPY, S.STOP): "_end",
    (S.STOP, S.RESUMING): "_begin_resume",
    (S.RESUMING, S.STOP): "_end_resume",
}

#: Largest state that a client may feed in, in bytes; far above what a model's registers need.
MAX_STATE = 64 << 20


def path(start: DeviceState, goal: DeviceState) -> list[DeviceState]:
    """The states from `start` (not included) to `goal`; empty when they are one.

    PeerError(EINVAL) where the specification allows no way.
    """
    if start is goal:
        return []
    queue = deque([[start]])
    seen = {start}
    while queue:
        way = queue.popleft()
        if len(way) > 1 and way[-1] in _SAVING:
            continue  # a saving state may only end a path
        for source, target in ARCS:
            if source is not way[-1] or target in seen:
                continue
            if target is goal:
                return [*way[1:], target]
            seen.add(target)
            queue.append([*way, target])
    raise PeerError(errno.EINVAL, f"no transition from {start.name} to {goal.name}")


class Saved(Protocol):
    """What migration needs of a device."""

    def save(self) -> bytes:
        """All of its state."""

    def restore(self, data: bytes) -> None:
        """Takes a saved state over; PeerError(EINVAL), and nothing changed, when it is not one."""

    def quiesce(self, stopped: bool) -> None:
        """Stops or resumes all that the device does of its own accord."""


class Migration:
    """One device's migration state, and the data stream of MIG_DATA_READ and MIG_DATA_WRITE."""

    def __init__(self, device: Saved) -> None:
        self.device = device
        self.state = S.RUNNING
        self._stream = bytearray()
        self._sent = 0

    def move(self, goal: DeviceState) -> None:
        """Goes to `goal` by the allowed arcs.  PeerError(EINVAL): there is no way, or the data are bad."""
        for target in path(self.state, goal):
            getattr(self, ARCS[self.state, target])()
            self.state = target

    def reset(self) -> None:
        """DEVICE_RESET: back to RUNNING from anywhere, ERROR included."""
        if self.state is not S.RUNNING:
            self.device.quiesce(False)
        self.state = S.RUNNING
        self._clear()

    def read(self, size: int) -> bytes:
        """Up to `size` bytes of the saved state; fewer at its end."""
        if self.state not in _SAVING:
            raise PeerError(errno.EINVAL, f"MIG_DATA_READ in state {self.state.name}")
        data = bytes(self._stream[self._sent : self._sent + size])
        self._sent += len(data)
        return data

    def write(self, data: bytes) -> None:
        """More of a state to resume from."""
        if self.state is not S.RESUMING:
            raise PeerError(errno.EINVAL, f"MIG_DATA_WRITE in state {self.state.name}")
        if len(self._stream) + len(data) > MAX_STATE:
            raise PeerError(errno.ENOSPC, f"a state of more than {MAX_STATE} bytes")
        self._stream += data

    def _clear(self) -> None:
        self._stream.clear()
        self._sent = 0

    def _stop(self) -> None:
        self.device.quiesce(True)

    def _run(self) -> None:
        self.device.quiesce(False)

    def _save(self) -> None:
        self._clear()
        self._stream += self.device.save()

    def _end(self) -> None:
        self._clear()

    def _begin_resume(self) -> None:
        self._clear()

    def _end_resume(self) -> None:
        data = bytes(self._stream)
        self._clear()
        self.device.restore(data)  # when it refuses, we stay in RESUMING, and the device as it was
