"""The migration state machine of a device: sections "VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE" and following.

State is a table: `ARCS` names the direct transitions and what each does; all others are the shortest path of
those that has no saving state inside.  PRE_COPY is optional and left out: a model's registers are small, so
there is nothing to gain from sending them while the device runs.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from typing import Protocol

from vmodel.errors import PeerError
from vmodel.vfio_user.wire import DeviceState

S = DeviceState
#: The "saving group": these may begin or end a path, but not lie on it.
SAVING = frozenset({S.STOP_COPY})

#: Largest state of any device, in bytes: copying it holds up the others for some 20 ms.
MAX_STATE = 64 << 20


class Saved(Protocol):
    """What migration needs of a device."""

    @property
    def max_state(self) -> int:
        """Most bytes that `save` gives; more is never taken from a client."""

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
        """Goes to `goal` by the allowed arcs.

        PeerError: there is no way (EINVAL), or an arc refused; the state then is where that arc begins.
        Any other error of an arc leaves the device in ERROR, as nobody knows how far it got; only
        DEVICE_RESET leads out of there.
        """
        for target in path(self.state, goal):
            try:
                ARCS[self.state, target](self)
            except PeerError:
                raise
            except BaseException:
                self.state = S.ERROR
                self._clear()
                raise
            self.state = target

    def reset(self) -> None:
        """DEVICE_RESET: back to RUNNING from anywhere, ERROR included."""
        if self.state is not S.RUNNING:
            self.device.quiesce(False)
        self.state = S.RUNNING
        self._clear()

    def read(self, size: int) -> bytes:
        """Up to `size` bytes of the saved state; fewer at its end.  PeerError(EINVAL) unless saving."""
        if self.state not in SAVING:
            raise PeerError(errno.EINVAL, f"MIG_DATA_READ in state {self.state.name}")
        data = bytes(self._stream[self._sent : self._sent + size])
        self._sent += len(data)
        return data

    def write(self, data: bytes) -> None:
        """More of a state to resume from.  PeerError: EINVAL unless RESUMING, ENOSPC over the device's own size."""
        if self.state is not S.RESUMING:
            raise PeerError(errno.EINVAL, f"MIG_DATA_WRITE in state {self.state.name}")
        limit = min(self.device.max_state, MAX_STATE)
        if len(self._stream) + len(data) > limit:
            raise PeerError(errno.ENOSPC, f"a state of more than {limit} bytes")
        self._stream += data

    # ---- arcs -------------------------------------------------------------------------------

    def _clear(self) -> None:
        self._stream.clear()
        self._sent = 0

    def _stop(self) -> None:
        self.device.quiesce(True)

    def _run(self) -> None:
        self.device.quiesce(False)

    def _save(self) -> None:
        self._clear()
        if self.device.max_state > MAX_STATE:
            raise PeerError(errno.EFBIG, f"a state may have {self.device.max_state} bytes, more than {MAX_STATE}")
        self._stream += self.device.save()

    def _end_resume(self) -> None:
        data = bytes(self._stream)
        self._clear()
        self.device.restore(data)  # when it refuses, we stay in RESUMING, and the device as it was


#: The direct transitions, (from, to), and what carries each out.
ARCS: dict[tuple[DeviceState, DeviceState], Callable[[Migration], None]] = {
    (S.RUNNING, S.STOP): Migration._stop,
    (S.STOP, S.RUNNING): Migration._run,
    (S.STOP, S.STOP_COPY): Migration._save,
    (S.STOP_COPY, S.STOP): Migration._clear,
    (S.STOP, S.RESUMING): Migration._clear,
    (S.RESUMING, S.STOP): Migration._end_resume,
}


def path(start: DeviceState, goal: DeviceState) -> list[DeviceState]:
    """The states from `start` (not included) to `goal`; empty when they are one.

    PeerError(EINVAL) where the specification allows no way; "ERROR cannot be specified as a device state".
    """
    if start is goal and goal is not S.ERROR:
        return []
    queue = deque([[start]])
    seen = {start}
    while queue:
        way = queue.popleft()
        if len(way) > 1 and way[-1] in SAVING:
            continue  # a saving state may only end a path
        for source, target in ARCS:
            if source is not way[-1] or target in seen:
                continue
            if target is goal:
                return [*way[1:], target]
            seen.add(target)
            queue.append([*way, target])
    raise PeerError(errno.EINVAL, f"no transition from {start.name} to {goal.name}")
