"""Fds of the host that a model watches."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import until
from vmodel.device import MmioBar, PciDevice
from vmodel.device.watches import MOST, Watches
from vmodel.errors import GuestError
from vmodel.regs import Reg32, RegisterBank
from vmodel.testing.fakes import FakeDriver, FakeMemory


class LineRegs(RegisterBank, size=4):
    X = Reg32(0)


class Line(PciDevice):
    vendor_id, device_id, class_code = 0x1234, 0x0002, 0x070000
    bar0 = MmioBar(0, size=4096)
    regs = bar0.bank(LineRegs)


@pytest.fixture
def driver() -> Iterator[FakeDriver]:
    device = Line("line0")
    with FakeMemory() as memory, FakeDriver(device, memory) as driver:
        yield driver
    device.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def test_calls_run_on_the_device_s_thread_until_cancelled(
    driver: FakeDriver, pair: tuple[socket.socket, socket.socket]
) -> None:
    mine, theirs = pair
    got: list[tuple[str, bytes]] = []
    watch = driver.device.watch(mine.fileno(), lambda: got.append((threading.current_thread().name, mine.recv(1))))
    theirs.send(b"ab")
    until(lambda: len(got) == 2, "both bytes, one in each call")
    assert got == [("vmodel-line0", b"a"), ("vmodel-line0", b"b")]
    driver.reset()
    theirs.send(b"c")
    until(lambda: len(got) == 3, "a reset does not end it")
    watch.cancel()
    watch.cancel()
    theirs.send(b"d")
    driver.settle()
    assert len(got) == 3 and mine.recv(9) == b"d"


def test_an_fd_that_is_always_readable_does_not_starve_the_client(
    driver: FakeDriver, pair: tuple[socket.socket, socket.socket]
) -> None:
    pair[1].send(b"x")
    calls: list[int] = []
    driver.device.watch(pair[0].fileno(), lambda: calls.append(1))
    until(lambda: len(calls) > 10, "calls")
    for value in range(200):
        driver.write(LineRegs.X, value)
        assert driver.read(LineRegs.X) == value
    before = len(calls)
    until(lambda: len(calls) > before + 10, "the client does not starve it either")


@pytest.mark.parametrize(("error", "ends"), [(ValueError("x"), True), (GuestError("x"), False)])
def test_a_call_that_fails(
    driver: FakeDriver, pair: tuple[socket.socket, socket.socket], error: Exception, ends: bool
) -> None:
    def fails() -> None:
        pair[0].recv(1)
        raise error

    driver.device.watch(pair[0].fileno(), fails)
    pair[1].send(b"a")
    until(lambda: driver.device.errors == 1, "the error is counted")
    until(lambda: bool(driver.device.backend.watches._watched) is not ends, "the watch ends only for a bug")
    assert driver.device.backend.bugs == ends


def test_what_cannot_be_watched(driver: FakeDriver, tmp_path: Path, pair: tuple[socket.socket, socket.socket]) -> None:
    with (tmp_path / "x").open("w") as file, pytest.raises(PermissionError):
        driver.device.watch(file.fileno(), lambda: None)
    with pytest.raises(OSError, match="Bad file"):
        driver.device.watch(-1, lambda: None)
    for _ in range(MOST):
        driver.device.watch(pair[0].fileno(), lambda: None)
    with pytest.raises(OSError, match="more than 32 fds"):
        driver.device.watch(pair[0].fileno(), lambda: None)


def test_the_device_s_end_closes_them(pair: tuple[socket.socket, socket.socket]) -> None:
    device = Line("line0")
    device.watch(pair[0].fileno(), lambda: None)
    pair[1].send(b"a")
    device.close()
    device.close()
    assert not any(thread.name == "vmodel-watch" for thread in threading.enumerate())
    pair[0].close()
    with pytest.raises(BrokenPipeError):  # no duplicate of the fd is left
        pair[1].send(b"b")


def test_an_end_that_hangs_is_bounded_and_logged(
    pair: tuple[socket.socket, socket.socket], caplog: pytest.LogCaptureFixture
) -> None:
    """Where the device's thread takes no call, the log names the place, and whoever closes the device goes on."""
    hangs, free = threading.Event(), threading.Event()

    def post(call: object) -> None:
        hangs.set()
        assert free.wait(60)

    watches = Watches("line0", post, lambda what, error: None)
    watches.add(pair[0].fileno(), lambda: None)
    pair[1].send(b"x")
    assert hangs.wait(60)
    with caplog.at_level(logging.ERROR):
        watches.close()
    free.set()
    (line,) = caplog.messages
    assert line.startswith("line0: the thread that watches its fds does not end, it is in ") and "post" in line
