"""`EventRegisters`: an interrupt of the unit's own, for faults, invalidations or page requests (5.1.6, 7.3)."""

from __future__ import annotations

from collections.abc import Callable

from vmodel.devices.vtd.regs import EventControl, VtdRegs


class EventRegisters:
    """One set of control, data and address registers, whose names begin with `prefix`.

    `pending`: whether its cause is there still; `send` gets address, data and the name of the device that had a part
    in it, or "".
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
        """The cause is there now, and was not before."""
        if EventControl(self._get("CTL")).IM:
            setattr(self._regs, f"{self._prefix}CTL", self._get("CTL") | EventControl.IP.mask)
        else:
            self._send(self._get("UADDR") << 32 | self._get("ADDR"), self._get("DATA"), culprit)

    def read_control(self, stored: int) -> int:
        """The control register as it reads."""
        return stored if self._pending() else EventControl.IP.put(stored, 0)

    def write_control(self, new: int) -> int:
        """What is stored of a write: an interrupt that waited for the mask goes out."""
        if not EventControl(new).IM and EventControl(new).IP:
            new = EventControl.IP.put(new, 0)
            if self._pending():
                self._send(self._get("UADDR") << 32 | self._get("ADDR"), self._get("DATA"), "")
        return new
