"""Where places in modules are in the source; tests/guest/test_places.py has those of real modules."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmodel.guest import hang, places
from vmodel.guest.artifacts import Kernel
from vmodel.guest.places import Places
from vmodel.guest.running import Guest, GuestSpec


def test_a_guest_that_hangs_has_source_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU's place is its instruction; a blocked task's is a return address, behind the call."""
    lines = [
        "CPU 0: in the kernel at 0xffffffffc0496051, interrupts off: insmod:126 in card_probe+0x11/0x20 [card]",
        "CPU 1: idle",
        "blocked: kworker/0:1:12 in card_wait+0x15/0x30 [card]",
    ]
    monkeypatch.setattr(places, "_place", lambda path, function, offset, size: f"{path}, {function}, {offset:#x}")
    monkeypatch.setattr(hang, "examine", lambda examiner: (lines, ""))
    monkeypatch.setattr(Guest, "examiner", lambda self: None)
    guest = Guest(GuestSpec("true", Kernel("6.12", Path("vmlinuz"), None)))
    guest.places = Places(lambda name: Path(f"{name}.ko"))
    said = guest.hang()
    guest.close()
    assert said == (
        f"\n  {lines[0]} (card.ko, card_probe, 0x11)\n  {lines[1]}\n  {lines[2]} (card.ko, card_wait, 0x14)"
    )
