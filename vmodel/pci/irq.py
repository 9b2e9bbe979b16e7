"""Interrupts: eventfds that the client gave by SET_IRQS, and INTx, MSI, MSI-X on top of them.

With QEMU the eventfds tell all: it emulates the guest's MSI and MSI-X registers itself and takes a vector's
eventfd away while the guest masks it.  Another client may instead write the MSI-X table in the BAR; once it has,
the table's mask bits count as well.

What PCI does not allow does not go out: the device says by `Irqs.allow` which types may be signalled.
"""

from __future__ import annotations

import copy
import errno
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from vmodel.errors import PeerError
from vmodel.logs import limited
from vmodel.regs import RegisterError
from vmodel.threads import Owner, owned
from vmodel.vfio_user.commands import IrqAction, IrqInfo, SetIrqs
from vmodel.vfio_user.wire import Irq, IrqFlags

log = limited(__name__)


@dataclass
class Vector:
    """One interrupt of one type; fds are ours, -1 without one."""

    trigger: int = -1
    mask_event: int = -1
    unmask_event: int = -1
    masked: bool = False
    pending: bool = False

    def close(self) -> int:
        """Closes the eventfds; unmasked again.  How many there were.

        `pending` stays: it is the device's state, not the client's.
        """
        held = [fd for fd in (self.trigger, self.mask_event, self.unmask_event) if fd >= 0]
        for fd in held:
            os.close(fd)
        self.trigger = self.mask_event = self.unmask_event = -1
        self.masked = False
        return len(held)


@dataclass
class IrqType:
    """All vectors of one type, and what to do when they change."""

    vectors: list[Vector]
    flags: IrqFlags
    #: Whether PCI lets the function signal one now; see `Irqs.allow`.
    allowed: bool = True
    #: Called after an eventfd came or a vector was unmasked.
    changed: Callable[[int], None] = field(default=lambda n: None)


def _is_eventfd(fd: int) -> bool:
    return str(Path(f"/proc/self/fd/{fd}").readlink()) == "anon_inode:[eventfd]"


class Irqs:
    """All interrupts of one function.  Types that it does not have count 0 vectors."""

    def __init__(self, notify: Callable[[int], None], owner: Owner | None = None) -> None:
        """`notify` signals an eventfd of the client's, and never waits."""
        self._notify = notify
        self.owner = owner or Owner("a device")
        #: Most eventfds that a client may have here at a time.
        self.max_eventfds = 1 << 20
        self._eventfds = 0
        #: Interrupts delivered to the client so far.
        self.raised = 0
        #: Takes what is raised, as `tap(carry_out, vector)`, while an experiment listens; None: nobody does.
        self.tap: Callable[[Callable[[int], None], int], None] | None = None
        maskable = IrqFlags.EVENTFD | IrqFlags.MASKABLE
        self.types = {
            Irq.INTX: IrqType([], maskable | IrqFlags.AUTOMASKED),
            Irq.MSI: IrqType([], maskable | IrqFlags.NORESIZE),
            Irq.MSIX: IrqType([], maskable | IrqFlags.NORESIZE),
            Irq.ERR: IrqType([Vector()], IrqFlags.EVENTFD),
            Irq.REQ: IrqType([Vector()], IrqFlags.EVENTFD),
        }

    def info(self, index: int) -> IrqInfo:
        """DEVICE_GET_IRQ_INFO."""
        kind = self.types[Irq(index)]
        return IrqInfo(len(kind.vectors), kind.flags)

    @owned
    def set(self, request: SetIrqs) -> None:
        """SET_IRQS; takes the eventfds over.  PeerError(EINVAL): one of them is no eventfd."""
        kind = self.types[Irq(request.index)]
        if request.count == 0:
            self._eventfds -= sum(vector.close() for vector in kind.vectors)
            return
        if isinstance(request.data, tuple):
            self._assign(kind, request.action, request.start, request.data)
            return
        for n in range(request.count):
            if request.data is None or request.data[n]:
                self._act(kind, request.start + n, request.action)

    def _assign(self, kind: IrqType, action: IrqAction, start: int, fds: tuple[int, ...]) -> None:
        for fd in fds:
            if fd >= 0:
                if not _is_eventfd(fd):
                    raise PeerError(errno.EINVAL, "an interrupt's fd is no eventfd")
                os.set_blocking(fd, False)  # where there is no AIO; see c_shim/eventfd.c
        name = {
            IrqAction.TRIGGER: "trigger",
            IrqAction.MASK: "mask_event",
            IrqAction.UNMASK: "unmask_event",
        }[action]
        held = [getattr(vector, name) for vector in kind.vectors[start : start + len(fds)]]
        grown = self._eventfds + sum(fd >= 0 for fd in fds) - sum(fd >= 0 for fd in held)
        if grown > self.max_eventfds:
            raise PeerError(errno.ENOSPC, f"more than {self.max_eventfds} eventfds")
        self._eventfds = grown
        for n, fd in enumerate(fds, start):
            vector = kind.vectors[n]
            if (old := getattr(vector, name)) >= 0:
                os.close(old)
            setattr(vector, name, fd)
        for n, fd in enumerate(fds, start):
            if action is IrqAction.TRIGGER and fd >= 0:
                self._changed(kind, n)

    def _changed(self, kind: IrqType, n: int) -> None:
        try:
            kind.changed(n)
        except Exception:  # the eventfds are ours by now, whatever became of what was pending
            log.exception("a pending interrupt %d could not be delivered", n)

    def _act(self, kind: IrqType, n: int, action: IrqAction) -> None:
        vector = kind.vectors[n]
        if action is IrqAction.TRIGGER:
            self._send(vector)  # the client's own test of its eventfd: no request of the function's
        elif action is IrqAction.MASK:
            self.mask(vector)
        elif vector.masked:
            vector.masked = False
            self._tell(vector.unmask_event)
            kind.changed(n)

    def mask(self, vector: Vector) -> None:
        """Masks a vector and tells the client's mask eventfd."""
        if not vector.masked:
            vector.masked = True
            self._tell(vector.mask_event)

    def _tell(self, fd: int) -> None:
        if fd >= 0:
            self._notify(fd)

    @owned
    def signal(self, kind: IrqType, vector: Vector) -> bool:
        """Signals a vector's eventfd; False without one, or while `kind` is not allowed."""
        if vector.trigger < 0 or not kind.allowed:
            return False
        self._notify(vector.trigger)
        self.raised += 1
        return True

    def _send(self, vector: Vector) -> bool:
        if vector.trigger < 0:
            return False
        self._notify(vector.trigger)
        self.raised += 1
        return True

    def allow(self, allowed: Mapping[Irq, bool]) -> None:
        """Which types may be signalled from now on.  What one has pending goes out when it is let."""
        opened = [self.types[irq] for irq, on in allowed.items() if on and not self.types[irq].allowed]
        for irq, on in allowed.items():
            self.types[irq].allowed = on
        for kind in opened:
            for n in range(len(kind.vectors)):
                kind.changed(n)

    def _all(self) -> Iterator[Vector]:
        return (vector for kind in self.types.values() for vector in kind.vectors)

    @property
    def saved_size(self) -> int:
        """Bytes of a saved state: one for each vector."""
        return sum(1 for _ in self._all())

    def save(self) -> bytes:
        """Which vectors are pending, for migration: the rest is in registers, or the client's."""
        return bytes(vector.pending for vector in self._all())

    def parse(self, data: bytes) -> bytes:
        """Checks what `save` gave.  PeerError(EINVAL)."""
        if len(data) != self.saved_size or not set(data) <= {0, 1}:
            raise PeerError(errno.EINVAL, f"pending interrupts: {self.saved_size} bytes of 0 and 1 were expected")
        return data

    def restore(self, pending: bytes) -> None:
        """Takes over what `parse` has checked."""
        for vector, on in zip(self._all(), pending, strict=True):
            vector.pending = bool(on)

    def close(self) -> None:
        """The client is gone: closes all eventfds."""
        for kind in self.types.values():
            for vector in kind.vectors:
                self._eventfds -= vector.close()

    def error(self) -> bool:
        """Signals ERR.  QEMU stops the virtual machine at this: not for AER."""
        kind = self.types[Irq.ERR]
        return self.signal(kind, kind.vectors[0])

    def request_release(self) -> bool:
        """Signals REQ: asks the client to let go of the device."""
        kind = self.types[Irq.REQ]
        return self.signal(kind, kind.vectors[0])


class Intx:
    """The interrupt pin: a level that the device holds until it lowers it.

    To the client an INTx is automasked: it is signalled once, and again after each unmask while the level
    stands.  `pin`: 1 to 4 for INTA to INTD.
    """

    def __init__(self, pin: int = 1) -> None:
        if not 1 <= pin <= 4:
            raise RegisterError(f"an interrupt pin is 1 (INTA) to 4 (INTD), not {pin}")
        self.pin = pin
        self.level = False

    def bind(self, irqs: Irqs, show: Callable[[bool], None]) -> Self:
        """The pin of one device; `show`: sets Status.INTERRUPT."""
        bound = copy.copy(self)
        bound._irqs, bound._show = irqs, show
        bound._type = irqs.types[Irq.INTX]
        bound._type.vectors = [Vector()]
        bound._type.changed = lambda n: bound.deliver()
        return bound

    _irqs: Irqs
    _type: IrqType
    _show: Callable[[bool], None]

    def raise_(self) -> None:
        """Asserts the pin."""
        if self._irqs.tap is None:
            self.raise_untapped()
        else:
            self._irqs.tap(lambda _: self.raise_untapped(), 0)

    def raise_untapped(self) -> None:
        """The same, past whatever an experiment does to interrupts."""
        self.level = True
        self._show(True)
        self.deliver()

    def lower(self) -> None:
        """Deasserts it."""
        self.level = False
        self._show(False)

    def deliver(self) -> None:
        """Signals the client if the level stands and nothing is in the way."""
        vector = self._type.vectors[0]
        if self.level and not vector.masked and self._irqs.signal(self._type, vector):
            self._irqs.mask(vector)
