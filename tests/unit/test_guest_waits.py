"""Waiting for a guest ends in time, however much the guest asks meanwhile."""

from __future__ import annotations

import threading

import pytest

from vmodel.guest.booted import BootedGuest
from vmodel.guest.running import GuestTimeout


class Asking(BootedGuest):
    """A guest whose script asks the host again as soon as it is answered."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._asked = [("1", ["verb"])]
        self.guest = self  # type: ignore[assignment]

    def running(self) -> bool:
        return True

    def _answer(self, id: str, words: list[str]) -> None:
        self._asked = [(id, words)]


def test_questions_of_a_guest_without_end() -> None:
    with pytest.raises(GuestTimeout, match="script: did not end in"):
        Asking()._await(lambda: False, 0.1, "script")
