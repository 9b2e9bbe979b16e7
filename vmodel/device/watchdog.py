"""Names what keeps a device's thread: a hook or callback of its model that has not returned for a second.

A thread of its own looks where the devices' threads are, four times a second.  The accesses themselves do nothing for
it, so they cost the same with and without it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from vmodel._shim import Channel, FunctionRegions
from vmodel.device.backend import VfioBackend
from vmodel.device.regions import Regions
from vmodel.logs import limited
from vmodel.threads import Pause
from vmodel.timers import Agenda
from vmodel.vfio_user.commands import Session

log = limited(__name__)

#: Seconds between two looks; until a hook is named; after which QEMU no longer waits for an answer (its default).
TICK, SLOW, QEMU_GIVES_UP = 0.25, 1.0, 5.0

_PACKAGE = str(Path(__file__).parents[1]) + os.sep
_MODELS = str(Path(__file__).parents[1] / "devices") + os.sep
_LIBRARY = str(Path(os.__file__).parent) + os.sep


def _code(method: Any) -> CodeType:
    """The code of a method, also if it is marked `@owned`."""
    found: CodeType = getattr(method, "__wrapped__", method).__code__
    return found


#: Where a thread waits for its client, and so is not kept by a model.
_WAITS = frozenset(map(_code, (Channel.enter, FunctionRegions.idle)))
#: A wait that a plan of faults has asked for.
_PAUSE = _code(Pause.wait)
_ACCESSES = {_code(Regions.read): "a read", _code(Regions.write): "a write"}
_OTHERS = {
    _code(Agenda._call): "a callback",
    _code(VfioBackend._reset): "on_reset",
    _code(VfioBackend.run_due): "on_wake",
    _code(Session.handle): "a command",
}


@dataclass(frozen=True)
class _Call:
    """What a device's thread is in."""

    #: Equal as long as it is the same call: the frame's identity, and how often the thread has waited so far.
    key: tuple[int, int]
    #: "a write of regs.CTRL: Card.on_ctrl".
    name: str
    #: "card.py line 21".
    line: str


@dataclass
class _Watched:
    """A device, the call that its thread is in, since when, and when that is reported next (seconds after it began)."""

    device: VfioBackend
    call: _Call | None = None
    since: float = 0.0
    due: float = field(default=SLOW)


class Watchdog:
    """Watches the threads of devices; `start` and `stop`."""

    def __init__(self, devices: Sequence[VfioBackend]) -> None:
        self._watched = [_Watched(device) for device in devices]
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._main, name="vmodel-watchdog", daemon=True)

    def start(self) -> None:
        """Starts to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _main(self) -> None:
        while not self._stopping.wait(TICK):
            frames, now = sys._current_frames(), time.monotonic()
            for watched in self._watched:
                self._look(watched, frames.get(watched.device.owner.thread), now)
            del frames  # else it keeps what the frames refer to

    def _look(self, watched: _Watched, frame: FrameType | None, now: float) -> None:
        call, before, device = _call_of(watched.device, frame), watched.call, watched.device
        lasted = now - watched.since
        if before is None or call is None or call.key != before.key:
            if before is not None and watched.due > SLOW:
                log.warning("%s: %s returned after %.1f s", device.name, before.name, lasted)
            watched.call, watched.since, watched.due = call, now, SLOW
            return
        if lasted < watched.due:
            return
        log.warning("%s: %s has not returned for %.0f s, it is at %s", device.name, call.name, lasted, call.line)
        if watched.due == QEMU_GIVES_UP:
            log.warning(
                "%s: QEMU gives up an access after %.0f s (x-msg-timeout): reads give all ones, and the device may"
                " stay unusable; with --debug-model it waits",
                device.name,
                QEMU_GIVES_UP,
            )
        watched.due = QEMU_GIVES_UP if watched.due < QEMU_GIVES_UP else 2 * watched.due


def _call_of(device: VfioBackend, frame: FrameType | None) -> _Call | None:
    """The model's call that a thread is in; None: it is in none, or waits for its client."""
    inner: list[FrameType] = []
    while frame is not None:
        code = frame.f_code
        if code is _PAUSE or (not inner and code in _WAITS):
            return None
        inner.append(frame)
        if code in _ACCESSES or code in _OTHERS:
            return _described(device, inner)
        frame = frame.f_back
    return None


def _described(device: VfioBackend, frames: Sequence[FrameType]) -> _Call:
    """`frames`: from the innermost to that of vmodel which has called the model."""
    entry = frames[-1]
    if what := _ACCESSES.get(entry.f_code):
        what = f"{what} of {device.place(entry.f_locals['region'], entry.f_locals['offset'])}"
    else:
        what = _OTHERS[entry.f_code]
    own = [frame for frame in frames[:-1] if _is_models(frame.f_code.co_filename)]
    hook, at = (own[-1], own[0]) if own else (frames[0], frames[0])
    exits = device.function.stats().exits
    line = f"{Path(at.f_code.co_filename).name} line {at.f_lineno}"
    return _Call((id(entry), exits), f"{what}: {hook.f_code.co_qualname}", line)


def _is_models(file: str) -> bool:
    """Whether a file is a model's: not vmodel's machinery, and not Python's library."""
    return file.startswith(_MODELS) or not file.startswith((_PACKAGE, _LIBRARY, "<frozen"))
