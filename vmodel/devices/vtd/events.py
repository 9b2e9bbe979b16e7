"""`EventRegisters`: an interrupt of the unit's own, for faults, invalidations or page requests (5.1.6, 7.3)."""

from __future__ import annotations

from collections.abc import Callable

from vmodel.devices.vtd.regs import EventControl, VtdRegs


class EventRegisters:
    """One set of control, data and address registers, whose names begin with `prefix`.

    `pending` returns whether the interrupt's cause still exists; `send` sends the message: it gets address, data, and
    the name of the device that caused it, or "".
    """

    def __init__(
        self, regs: VtdRegs, prefix: str, pending: Callable[[], object], send: Callable[[int, int, str], None]
    ) -> None:
        self._regs = regs
        self._prefix = prefix
        self._pending = pending
        self._send = send

    def _get(self, name: str) -> int:
        return int(getattr(self._regs, self._prefix + name))

    def happen(self, culprit: str = "") -> None:
        """Raises the interrupt, as its cause has just arisen; masked, it stays pending (IP)."""
        if EventControl(self._get("CTL")).IM:
            setattr(self._regs, f"{self._prefix}CTL", self._get("CTL") | EventControl.IP.mask)
        else:
            self._send(self._get("UADDR") << 32 | self._get("ADDR"), self._get("DATA"), culprit)

    def read_control(self, stored: int) -> int:
        """The value of a read of the control register: IP is clear if the cause is gone."""
        return stored if self._pending() else EventControl.IP.put(stored, 0)

    def write_control(self, new: int) -> int:
        """The value to store after a write of the control register; unmasking sends a pending interrupt."""
        if not EventControl(new).IM and EventControl(new).IP:
            new = EventControl.IP.put(new, 0)
            if self._pending():
                self._send(self._get("UADDR") << 32 | self._get("ADDR"), self._get("DATA"), "")
        return new
