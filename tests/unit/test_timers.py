"""Deferred work and timers: what runs, in which order, and what is held meanwhile."""

from __future__ import annotations

import threading
import time

from hypothesis import given
from hypothesis import strategies as st

from vmodel.timers import Agenda, Timer

HOUR = 3600.0
FAR = 1 << 62


def agenda() -> Agenda:
    def failed(error: Exception) -> None:
        raise error

    return Agenda(lambda: None, failed)


def test_a_timer_that_is_set_anew_for_ever_holds_little() -> None:
    """As a keep alive timer of 49 days that each command restarts."""
    mine = agenda()
    kept = [mine.after(HOUR, lambda: None) for _ in range(10)]
    timer = mine.after(HOUR, lambda: None)
    largest = 0
    for _ in range(20_000):
        timer.cancel()
        timer = mine.after(HOUR, lambda: None)
        largest = max(largest, len(mine))
    assert largest < 200
    for one in kept:
        one.cancel()


def test_most_of_many_cancelled() -> None:
    mine = agenda()
    ran: list[int] = []
    timers = [mine.after(HOUR + n, lambda n=n: ran.append(n)) for n in range(10_000)]  # type: ignore[misc]
    for n, timer in enumerate(timers):
        if n % 100:
            timer.cancel()
    assert len(mine) <= 2 * 100 + 64
    mine.run(FAR)
    assert ran == list(range(0, 10_000, 100))
    assert len(mine) == 0


def test_cancelling_what_has_run_or_was_cancelled() -> None:
    mine = agenda()
    ran: list[int] = []
    first, second = mine.after(0, lambda: ran.append(1)), mine.after(HOUR, lambda: ran.append(2))
    mine.run(time.monotonic_ns())
    for _ in range(1000):
        first.cancel()
    second.cancel()
    second.cancel()
    assert mine.run(time.monotonic_ns()) is not None, "a deadline that is not needed any more does no harm"
    mine.run(FAR)
    assert ran == [1] and len(mine) == 0


def test_a_timer_that_another_one_cancels() -> None:
    mine = agenda()
    ran: list[str] = []
    timers: list[Timer] = []
    mine.after(1, lambda: timers[0].cancel())
    timers.append(mine.after(2, lambda: ran.append("cancelled")))
    mine.run(FAR)
    assert ran == []


def test_a_callback_that_forgets_everything() -> None:
    mine = agenda()
    ran: list[int] = []
    mine.after(1, mine.cancel)
    mine.after(2, lambda: ran.append(2))
    assert mine.run(FAR) is None
    assert ran == [] and len(mine) == 0


def test_cancelling_from_other_threads() -> None:
    mine = agenda()
    ran: list[int] = []

    def work() -> None:
        for _ in range(2000):
            mine.after(HOUR, lambda: ran.append(1)).cancel()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(500):
        mine.run(time.monotonic_ns())
    for thread in threads:
        thread.join()
    assert len(mine) <= 200
    mine.run(FAR)
    assert ran == [] and len(mine) == 0


@given(st.lists(st.one_of(st.integers(0, 50), st.integers(-200, -1)), max_size=300))
def test_against_a_list(steps: list[int]) -> None:
    """0 and above: a timer with that time; below: cancels one of those that there are."""
    mine, ran = agenda(), []
    model: list[tuple[int, int]] = []
    timers: list[Timer] = []
    for step in steps:
        if step >= 0:
            n = len(timers)
            timers.append(mine.after(HOUR * (1 + step), lambda n=n: ran.append(n)))  # type: ignore[misc]
            model.append((step, n))
        elif timers:
            n = -step % len(timers)
            timers[n].cancel()
            model = [entry for entry in model if entry[1] != n]
        assert len(mine) <= 2 * len(model) + 65
    mine.run(FAR)
    assert ran == [n for _, n in sorted(model)]


def test_a_call_that_runs_the_rest_itself() -> None:
    """A hook that waits for its client serves it meanwhile, and with it whatever else has been deferred."""
    failed: list[Exception] = []
    agenda = Agenda(lambda: None, failed.append)
    ran: list[str] = []

    def waits() -> None:
        ran.append("waits")
        agenda.run(0)

    agenda.defer(waits, None)
    agenda.defer(lambda: ran.append("rest"), None)
    agenda.defer(lambda: ran.append("of it"), None)
    assert agenda.run(0) is None
    assert (ran, failed) == (["waits", "rest", "of it"], [])
