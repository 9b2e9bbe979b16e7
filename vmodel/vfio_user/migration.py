"""The migration state machine of a device: sections "VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE" and following.

The table `ARCS` has the direct transitions and their actions.  Any other transition is the shortest path of direct ones
that does not pass through a saving state.  The optional PRE_COPY is left out: the state of a model is small, so sending
it while the device runs would gain nothing.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from typing import Protocol

from vmodel.errors import PeerError
from vmodel.vfio_user.wire import DeviceState

S = DeviceState
#: The "saving group": a path may begin or end at these states, but not pass through them.
SAVING = frozenset({S.STOP_COPY})

#: Largest state of any device, in bytes: copying it delays other devices by about 20 ms.
MAX_STATE = 64 << 20


class Saved(Protocol):
    """What migration needs of a device."""

    @property
    def max_state(self) -> int:
        """Most bytes of a saved state; a longer state is never accepted from a client."""

    def save(self) -> bytes:
        """The whole state of the device."""

    def restore(self, data: bytes) -> None:
        """Loads a saved state.  PeerError(EINVAL): it is invalid; nothing has changed then."""

    def quiesce(self, stopped: bool) -> None:
        """Stops or resumes everything that the device does by itself: timers, DMA, interrupts."""


class Migration:
    """One device's migration state, and the data stream of MIG_DATA_READ and MIG_DATA_WRITE."""

    def __init__(self, device: Saved) -> None:
        self.device = device
        self.state = S.RUNNING
        self._stream = bytearray()
        self._sent = 0

    def move(self, goal: DeviceState) -> None:
        """Moves to state `goal` by direct transitions.

        PeerError: there is no path (EINVAL), or a transition is refused; the state stays the one before that
        transition.  Any other exception leaves the device in ERROR, as the transition may be incomplete; only
        DEVICE_RESET leaves ERROR.
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
        """Returns to RUNNING from any state, even ERROR, as DEVICE_RESET does."""
        if self.state is not S.RUNNING:
            self.device.quiesce(False)
        self.state = S.RUNNING
        self._clear()

    def read(self, size: int) -> bytes:
        """The next `size` bytes of the saved state, fewer at its end.  PeerError(EINVAL): not in a saving state."""
        if self.state not in SAVING:
            raise PeerError(errno.EINVAL, f"MIG_DATA_READ in state {self.state.name}")
        data = bytes(self._stream[self._sent : self._sent + size])
        self._sent += len(data)
        return data

    def write(self, data: bytes) -> None:
        """Appends to the state to resume from.

        PeerError: EINVAL, the device is not RESUMING; ENOSPC, the state is longer than the device's own can be.
        """
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
        self.device.restore(data)  # if it refuses, the state stays RESUMING and the device is unchanged


#: The direct transitions as (from, to), and the action of each.
ARCS: dict[tuple[DeviceState, DeviceState], Callable[[Migration], None]] = {
    (S.RUNNING, S.STOP): Migration._stop,
    (S.STOP, S.RUNNING): Migration._run,
    (S.STOP, S.STOP_COPY): Migration._save,
    (S.STOP_COPY, S.STOP): Migration._clear,
    (S.STOP, S.RESUMING): Migration._clear,
    (S.RESUMING, S.STOP): Migration._end_resume,
}


def path(start: DeviceState, goal: DeviceState) -> list[DeviceState]:
    """The states after `start`, up to and including `goal`; empty if the two are equal.

    PeerError(EINVAL): the specification allows no path; "ERROR cannot be specified as a device state".
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
