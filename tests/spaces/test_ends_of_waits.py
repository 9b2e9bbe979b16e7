"""Calls that take long or wait: others come in between, and each ends when its object does."""

from __future__ import annotations

import errno
import math
import threading
import time
from collections.abc import Callable

import pytest

from tests.spaces.vm import ASID, NH_ASID, Guest, command
from tests.spaces.world import refused
from tests.waiting import until
from vmodel.iommu import System
from vmodel.iommu.driver import PlatformDevice
from vmodel.iommu.endpoint import Endpoint
from vmodel.iommu.iommufd import Context, FaultObject, InvalidationError, Option
from vmodel.iommu.iommufd.invalidate import BATCH, MOST_ENTRIES
from vmodel.patience import patience

LONG = 60.0


def in_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


# ---- invalidations ---------------------------------------------------------------------------------


def test_others_come_in_between(guest: Guest) -> None:
    """2**19 commands take seconds, as many as Linux takes in one call; no other call waits for all of them."""
    ended = threading.Event()
    counts: list[int] = []

    def invalidate() -> None:
        try:
            counts.append(guest.viommu.invalidate([command(NH_ASID | ASID << 48)] * (1 << 16)))
        finally:
            ended.set()

    thread = in_thread(invalidate)
    calls = 0
    while not ended.is_set():
        guest.context.get_option(Option.RLIMIT_MODE)
        calls += 1
        time.sleep(0.001)
    thread.join(patience(10))
    assert counts == [1 << 16] and calls > 10
    with refused(errno.EINVAL):  # iommufd_hwpt_invalidate: IOMMU_HWPT_INVALIDATE_ENTRY_NUM_MAX
        guest.viommu.invalidate([command(NH_ASID)] * (MOST_ENTRIES + 1))


@pytest.mark.parametrize("what", ["viommu", "context"])
def test_destroyed_between_batches(what: str, guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Linux the destroyer waits; here the commands that are left are refused."""
    entries, done = [command(NH_ASID | ASID << 48)] * (3 * BATCH), 0
    one = guest.viommu.invalidate_one

    def counted(entry: bytes) -> None:
        nonlocal done
        one(entry)
        done += 1
        if done == BATCH:  # with the lock, by the same thread
            guest.viommu.destroy() if what == "viommu" else guest.context.close()

    monkeypatch.setattr(guest.viommu, "invalidate_one", counted)
    with pytest.raises(InvalidationError) as caught:
        guest.viommu.invalidate(entries)
    assert (caught.value.errno, caught.value.done, done) == (errno.ENOENT, BATCH, BATCH)


def test_the_entry_that_is_refused_counts_from_the_first_batch(guest: Guest) -> None:
    good = command(NH_ASID | ASID << 48)
    for at in (0, 1, BATCH - 1, BATCH, 3 * BATCH + 5):
        with pytest.raises(InvalidationError, match=f"entry {at}:") as caught:
            guest.viommu.invalidate([*[good] * at, command(0), good])
        assert (caught.value.errno, caught.value.done) == (errno.EIO, at)
    assert guest.viommu.invalidate([good] * BATCH) == BATCH
    assert guest.viommu.invalidate([good] * (2 * BATCH + 1)) == 2 * BATCH + 1


# ---- queues ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["destroy", "close"])
def test_a_queue_that_is_destroyed_while_it_is_read(how: str, guest: Guest) -> None:
    """In Linux the file that is read keeps the queue; here the read ends at once."""
    queue = guest.events(4)
    ended: list[float] = []

    def read() -> None:
        with refused(errno.ENOENT):
            queue.read(1 << 10, LONG)
        ended.append(time.monotonic())

    threads = [in_thread(read) for _ in range(3)]
    until(lambda: len(queue._ready._waiters) == 3, "they wait")  # type: ignore[attr-defined]
    start = time.monotonic()
    queue.destroy() if how == "destroy" else guest.context.close()
    for thread in threads:
        thread.join(patience(10))
    assert len(ended) == 3 and max(ended) - start < LONG / 2
    with refused(errno.ENOENT):
        queue.read(1 << 10, LONG)


@pytest.mark.parametrize("how", ["destroy", "close"])
def test_a_fault_object_that_is_destroyed_while_it_is_read(how: str) -> None:
    context = Context()
    fault = FaultObject(context)
    ended: list[float] = []

    def read() -> None:
        with refused(errno.ENOENT):
            fault.read(LONG)
        ended.append(time.monotonic())

    thread = in_thread(read)
    until(lambda: len(fault._ready._waiters) == 1, "it waits")  # type: ignore[attr-defined]
    start = time.monotonic()
    fault.destroy() if how == "destroy" else context.close()
    thread.join(patience(10))
    assert ended and ended[0] - start < LONG / 2
    with refused(errno.ENOENT):
        fault.read(LONG)


# ---- times -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [math.nan, -1.0, -math.inf])
def test_what_is_no_time(seconds: float, guest: Guest) -> None:
    context, queue = Context(), guest.events(4)
    fault = FaultObject(context)
    for call in (
        lambda: System(unbind_waits=seconds),
        lambda: Endpoint("dev", PlatformDevice("dev"), None, unbind_waits=seconds),
        lambda: FaultObject(context, seconds),
        lambda: fault.read(seconds),
        lambda: queue.read(1 << 10, seconds),
    ):
        with pytest.raises(ValueError, match="must be 0 seconds or more"):
            call()
    assert set(context._objects.values()) == {fault}, "nothing was made"


def test_what_is_a_time() -> None:
    context = Context()
    for seconds in (0, 0.0, 1e300, math.inf):
        System(unbind_waits=seconds)
        FaultObject(context, seconds)
    FaultObject(context, None)
    assert FaultObject(context).read(0) == []
