"""Interrupts: the client's eventfds (SET_IRQS), and INTx, MSI and MSI-X on top of them.

QEMU emulates the guest's MSI and MSI-X registers itself: it removes a vector's eventfd while the guest masks the
vector.  Another client may write the MSI-X table in the BAR instead; after that, the table's mask bits count as well.

The device sets by `Irqs.allow` which types PCI lets it signal at the moment; others stay pending.
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
    """One interrupt of one type.  Its fds are eventfds that the vector owns, -1: none."""

    trigger: int = -1
    mask_event: int = -1
    unmask_event: int = -1
    masked: bool = False
    pending: bool = False

    def close(self) -> int:
        """Closes the eventfds and unmasks the vector.  Returns how many eventfds there were.

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
    """All vectors of one interrupt type."""

    vectors: list[Vector]
    flags: IrqFlags
    #: Whether PCI lets the function signal this type now; see `Irqs.allow`.
    allowed: bool = True
    #: Called with a vector's number after it got an eventfd, was unmasked, or its type became allowed.
    changed: Callable[[int], None] = field(default=lambda n: None)


def _is_eventfd(fd: int) -> bool:
    return str(Path(f"/proc/self/fd/{fd}").readlink()) == "anon_inode:[eventfd]"


class Irqs:
    """All interrupts of one function.  Types that the function does not have are there with 0 vectors."""

    def __init__(self, notify: Callable[[int], None], owner: Owner | None = None) -> None:
        """`notify` signals an eventfd of the client; it must not block."""
        self._notify = notify
        self.owner = owner or Owner("a device")
        #: Most eventfds that the client may set for this function at a time.
        self.max_eventfds = 1 << 20
        self._eventfds = 0
        #: Interrupts delivered to the client so far.
        self.raised = 0
        #: While an experiment taps interrupts: called as `tap(carry_out, kind, vector)` instead of `carry_out(vector)`.
        self.tap: Callable[[Callable[[int], None], str, int], None] | None = None
        maskable = IrqFlags.EVENTFD | IrqFlags.MASKABLE
        self.types = {
            Irq.INTX: IrqType([], maskable | IrqFlags.AUTOMASKED),
            Irq.MSI: IrqType([], maskable | IrqFlags.NORESIZE),
            Irq.MSIX: IrqType([], maskable | IrqFlags.NORESIZE),
            Irq.ERR: IrqType([Vector()], IrqFlags.EVENTFD),
            Irq.REQ: IrqType([Vector()], IrqFlags.EVENTFD),
        }

    def info(self, index: int) -> IrqInfo:
        """The answer to DEVICE_GET_IRQ_INFO for type `index` of wire.Irq."""
        kind = self.types[Irq(index)]
        return IrqInfo(len(kind.vectors), kind.flags)

    @owned
    def set(self, request: SetIrqs) -> None:
        """Carries out SET_IRQS; the eventfds are owned here if it returns.

        PeerError: EINVAL, an fd is no eventfd; ENOSPC, more than `max_eventfds`.
        """
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
                os.set_blocking(fd, False)  # for systems without AIO; see c_shim/eventfd.c
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
        except Exception:  # SET_IRQS has succeeded all the same: the eventfds have been taken over
            log.exception("a pending interrupt %d could not be delivered", n)

    def _act(self, kind: IrqType, n: int, action: IrqAction) -> None:
        vector = kind.vectors[n]
        if action is IrqAction.TRIGGER:
            self._send(vector)  # the client tests its eventfd: this is allowed even if the function may not signal
        elif action is IrqAction.MASK:
            self.mask(vector)
        elif vector.masked:
            vector.masked = False
            self._notify_if_set(vector.unmask_event)
            kind.changed(n)

    def mask(self, vector: Vector) -> None:
        """Masks a vector and signals the client's mask eventfd, if there is one."""
        if not vector.masked:
            vector.masked = True
            self._notify_if_set(vector.mask_event)

    def _notify_if_set(self, fd: int) -> None:
        if fd >= 0:
            self._notify(fd)

    @owned
    def signal(self, kind: IrqType, vector: Vector) -> bool:
        """Signals a vector's eventfd.  Returns False if it has none, or `kind` is not allowed."""
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
        """Sets which types may be signalled from now on; pending vectors of types that become allowed are sent."""
        newly_allowed = [self.types[irq] for irq, on in allowed.items() if on and not self.types[irq].allowed]
        for irq, on in allowed.items():
            self.types[irq].allowed = on
        for kind in newly_allowed:
            for n in range(len(kind.vectors)):
                kind.changed(n)

    def _all(self) -> Iterator[Vector]:
        return (vector for kind in self.types.values() for vector in kind.vectors)

    @property
    def saved_size(self) -> int:
        """Bytes of a saved state: one for each vector."""
        return sum(1 for _ in self._all())

    def save(self) -> bytes:
        """Which vectors are pending, a byte of 0 or 1 each, for migration.

        All other state is in registers or belongs to the client.
        """
        return bytes(vector.pending for vector in self._all())

    def parse(self, data: bytes) -> bytes:
        """Checks a state that `save` made, and returns it.  PeerError(EINVAL)."""
        if len(data) != self.saved_size or not set(data) <= {0, 1}:
            raise PeerError(errno.EINVAL, f"pending interrupts: {self.saved_size} bytes of 0 and 1 were expected")
        return data

    def restore(self, pending: bytes) -> None:
        """Loads a state that `parse` has checked."""
        for vector, on in zip(self._all(), pending, strict=True):
            vector.pending = bool(on)

    def close(self) -> None:
        """Closes all eventfds, as the client has disconnected."""
        for kind in self.types.values():
            for vector in kind.vectors:
                self._eventfds -= vector.close()

    def error(self) -> bool:
        """Signals ERR; returns whether it could.  QEMU then stops the virtual machine, so do not use it for AER."""
        kind = self.types[Irq.ERR]
        return self.signal(kind, kind.vectors[0])

    def request_release(self) -> bool:
        """Signals REQ, which asks the client to release the device; returns whether it could."""
        kind = self.types[Irq.REQ]
        return self.signal(kind, kind.vectors[0])


class Intx:
    """The interrupt pin: a level that stays asserted until the device lowers it.

    INTx is automasked for the client: it is signalled once, and again after each unmask while the level is asserted.
    `pin`: 1 to 4 for INTA to INTD.
    """

    def __init__(self, pin: int = 1) -> None:
        if not 1 <= pin <= 4:
            raise RegisterError(f"an interrupt pin is 1 (INTA) to 4 (INTD), not {pin}")
        self.pin = pin
        self.level = False

    def bind(self, irqs: Irqs, set_status: Callable[[bool], None]) -> Self:
        """A copy of the pin for one device; `set_status` stores Status.INTERRUPT."""
        bound = copy.copy(self)
        bound._irqs, bound._set_status = irqs, set_status
        bound._type = irqs.types[Irq.INTX]
        bound._type.vectors = [Vector()]
        bound._type.changed = lambda n: bound.deliver()
        return bound

    _irqs: Irqs
    _type: IrqType
    _set_status: Callable[[bool], None]

    def raise_(self) -> None:
        """Asserts the pin."""
        if self._irqs.tap is None:
            self.raise_untapped()
        else:
            self._irqs.tap(lambda _: self.raise_untapped(), "intx", 0)

    def raise_untapped(self) -> None:
        """Asserts the pin without passing the tap of an experiment."""
        self.level = True
        self._set_status(True)
        self.deliver()

    def drive(self, causes: int) -> None:
        """Asserts the pin if `causes` is not 0, as in `drive(status & enable)`, and deasserts it otherwise."""
        if not causes:
            self.lower()
        elif not self.level:
            self.raise_()

    def lower(self) -> None:
        """Deasserts the pin."""
        self.level = False
        self._set_status(False)

    def deliver(self) -> None:
        """Signals the client if the pin is asserted, and neither masked nor disallowed."""
        vector = self._type.vectors[0]
        if self.level and not vector.masked and self._irqs.signal(self._type, vector):
            self._irqs.mask(vector)
