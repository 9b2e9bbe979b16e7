"""Waiting for a guest ends in time, however much the guest asks meanwhile."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import pytest

from vmodel.guest.artifacts import Kernel
from vmodel.guest.booted import BootedGuest
from vmodel.guest.running import GuestSpec, GuestTimeout


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


class Silent(BootedGuest):
    """A guest whose output comes from the test."""

    def __init__(self) -> None:
        super().__init__(GuestSpec(command="", kernel=Kernel("1-test", Path("bzImage"), None)))

    def says(self, data: bytes) -> None:
        self._on_output(data)

    @property
    def output(self) -> bytes:
        return b"".join(data for _, data in self._output)

    def answer(self, key: str) -> bool:
        return key in self._answers

    def mark(self) -> bytes:  # type: ignore[override]
        return b"\x1e" + self._token.encode() + b" "


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_answers_between_output(piece: int) -> None:
    """In pieces of any size: marks of other guests and halves of marks are output, what is between them stays whole."""
    with contextlib.closing(Silent()) as guest:
        mark = guest.mark()
        text = (
            b"a\x1eb" + mark[:5] + b"\n" + mark + b"done 1 0\nmore" + mark + b"pong 2 \x1e x\n\x1e" + mark[:-1] + b"x"
        )
        for at in range(0, len(text), piece):
            guest.says(text[at : at + piece])
        assert guest.output == b"a\x1eb" + mark[:5] + b"\nmore\x1e" + mark[:-1] + b"x"
        assert guest.answer("done 1") and guest.answer("pong 2")


def test_a_flood_of_marks_and_an_answer_without_end() -> None:
    """Each byte is looked at once: this took minutes."""
    with contextlib.closing(Silent()) as guest:
        flood = b"\x1e" * (1 << 20) + b"\n"
        guest.says(flood)
        assert guest.output == flood and len(guest._output) <= 2
        guest.says(guest.mark() + b"log 1 ")
        for _ in range(30_000):
            guest.says(b"0123456789abcdef")
        guest.says(b"\n")
        assert guest.answer("log 1") and guest.output == flood
        for _ in range(30_000):
            guest._on_console(b"0123456789abcdef")
        assert len(guest._line) <= 4096 and len(guest.console()) == 480_000


def test_questions_of_a_guest_without_end() -> None:
    with pytest.raises(GuestTimeout, match="script: did not end in"):
        Asking()._await(lambda: False, 0.1, "script")
