"""A hook or callback that does not return is named while it hangs: model, register, method, and the user's line."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.waiting import until
from vmodel.device import MmioBar, PciDevice, ResetKind, on_read, on_write
from vmodel.device import watchdog as module
from vmodel.device.watchdog import Watchdog
from vmodel.logs import limited
from vmodel.patience import patience
from vmodel.regs import Reg32, RegisterBank


class Regs(RegisterBank, size=0x1000):
    CTRL = Reg32(0)
    STATUS = Reg32(4)


class Card(PciDevice):
    """A card whose hooks wait until `go` is set."""

    vendor_id, device_id, class_code = 0x1234, 0x0001, 0xFF0000
    bar0 = MmioBar(0, size=0x1000)
    regs = bar0.bank(Regs)

    def setup(self) -> None:
        self.go = threading.Event()
        self.stuck = False

    def hold(self) -> None:
        self.go.wait(patience(60))  # the user's line

    @on_write(Regs.CTRL)
    def on_ctrl(self, new: int) -> None:
        self.hold()

    @on_read(Regs.STATUS)
    def on_status(self, stored: int) -> int:
        self.hold()
        return 5

    def on_reset(self, kind: ResetKind) -> None:
        if kind is ResetKind.FUNCTION:
            self.hold()

    def on_wake(self) -> None:
        if self.stuck:
            self.hold()


LINE = next(n for n, line in enumerate(Path(__file__).read_text().splitlines(), 1) if "# the user's line" in line)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    monkeypatch.setattr(module, "TICK", 0.01)
    monkeypatch.setattr(module, "SLOW", 0.05)
    monkeypatch.setattr(module, "QEMU_GIVES_UP", 0.1)
    limited(module.__name__)  # what earlier tests have logged does not count
    card = Card("card0")
    watchdog = Watchdog([card.backend])
    watchdog.start()
    yield card
    watchdog.stop()
    card.close()


def on_its_thread(card: Card, work: Callable[[], object]) -> threading.Thread:
    """Runs `work` on a thread that owns the device."""

    def main() -> None:
        card.backend.owner.take()
        work()
        card.backend.function.idle(-1, time.monotonic_ns() + 50_000_000)  # as a thread that waits for clients
        card.backend.owner.leave()

    thread = threading.Thread(target=main, daemon=True)
    thread.start()
    return thread


CALLS: dict[str, Callable[[Card], object]] = {
    "a write of regs.CTRL: Card.on_ctrl": lambda card: card.backend.region_write(0, 0, 4, 1),
    "a write of regs.CTRL: Card.on_ctrl ": lambda card: card.backend.region_write(0, 2, 1, 1),
    "a read of regs.STATUS: Card.on_status": lambda card: card.backend.region_read(0, 4, 4),
    "a callback: Card.hold": lambda card: (card.defer(card.hold), card.backend.run_due(time.monotonic_ns())),
    "on_reset: Card.on_reset": lambda card: card.reset(ResetKind.FUNCTION),
    "on_wake: Card.on_wake": lambda card: card.backend.run_due(time.monotonic_ns()),
}


@pytest.mark.parametrize("what", CALLS)
def test_it_is_named_while_it_hangs(what: str, card: Card, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    card.stuck = what.startswith("on_wake")
    thread = on_its_thread(card, lambda: CALLS[what](card))
    begin, end = f"card0: {what.strip()} has not returned for ", f" s, it is at test_watchdog.py line {LINE}"

    def lines() -> list[str]:
        return [text for text in caplog.messages if text.startswith(begin) and text.endswith(end)]

    until(lambda: len(lines()) >= 3, "three lines")
    (gives_up,) = [text for text in caplog.messages if "QEMU gives up" in text]
    assert gives_up.startswith("card0: ") and "x-msg-timeout" in gives_up and "--debug-model" in gives_up
    assert caplog.messages.index(gives_up) == 2, "after the second line about the call"
    card.go.set()
    until(lambda: any(text.startswith(f"card0: {what.strip()} returned after ") for text in caplog.messages), "its end")
    thread.join(patience(10))


def test_what_is_no_hang(card: Card, caplog: pytest.LogCaptureFixture) -> None:
    """Hooks that return, a delay that a plan asks for, and a thread that waits for its client."""
    card.go.set()
    delay = 0.3

    def work() -> None:
        end = time.monotonic() + delay
        while time.monotonic() < end:
            card.backend.region_write(0, 0, 4, 1)
            card.backend.function.idle(-1, 0)
        card.backend.pause.wait(delay, lambda: False)
        card.backend.function.idle(-1, time.monotonic_ns() + int(delay * 1e9))

    on_its_thread(card, work).join(patience(30))
    assert not caplog.messages
