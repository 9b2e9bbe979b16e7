"""Fds of the host that a model watches."""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
import tty
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import needs
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
    with (tmp_path / "x").open("w") as file, pytest.raises(PermissionError, match="always readable"):
        driver.device.watch(file.fileno(), lambda: None)
    with pytest.raises(OSError, match="Bad file"):
        driver.device.watch(-1, lambda: None)
    for _ in range(MOST):
        driver.device.watch(pair[0].fileno(), lambda: None)
    with pytest.raises(OSError, match="more than 32 fds"):
        driver.device.watch(pair[0].fileno(), lambda: None)


def test_a_pty(driver: FakeDriver) -> None:
    """What is typed at the other end, with a Ctrl-D as a byte; EIO once nobody has the other end open."""
    needs.pty()
    ours, theirs = os.openpty()
    tty.setraw(theirs)
    got = bytearray()
    ends: list[int | None] = []

    def incoming() -> None:
        try:
            got.extend(os.read(ours, 64))
        except OSError as error:
            ends.append(error.errno)
            watch.cancel()

    watch = driver.device.watch(ours, incoming)
    os.write(theirs, b"a\x04b\n")
    until(lambda: bytes(got) == b"a\x04b\n", "the bytes")
    os.close(theirs)
    until(lambda: ends == [errno.EIO], "the end")
    driver.settle()
    assert ends == [errno.EIO] and driver.device.errors == 0
    os.close(ours)


def test_an_eventfd(driver: FakeDriver) -> None:
    """Its counter adds up what was written before the call."""
    fd = os.eventfd(0)
    got: list[int] = []
    driver.device.watch(fd, lambda: got.append(os.eventfd_read(fd)))
    driver.settle()
    assert got == []
    os.eventfd_write(fd, 3)
    until(lambda: got == [3], "the counter")
    for _ in range(100):
        os.eventfd_write(fd, 2)
    until(lambda: sum(got) == 203, "all of it")
    os.close(fd)
    driver.settle()
    assert sum(got) == 203


def test_a_fifo_whose_writer_goes_and_comes_back(driver: FakeDriver, tmp_path: Path) -> None:
    """At its end the call runs again and again until it cancels or there is a writer; the guest is served, too."""
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    got = bytearray()
    ends: list[bytes] = []

    def incoming() -> None:
        data = os.read(reader, 64)
        got.extend(data)
        if not data:
            ends.append(data)

    watch = driver.device.watch(reader, incoming)
    driver.settle()
    assert ends == [], "there was no writer yet: that is no end"
    for text in (b"first", b"second"):
        with (tmp_path / "fifo").open("wb", buffering=0) as writer:
            writer.write(text)
            until(lambda text=text: got.endswith(text), "what was written")  # type: ignore[misc]
        before = len(ends)
        until(lambda before=before: len(ends) > before + 2, "the end")  # type: ignore[misc]
        driver.write(LineRegs.X, 7)
        assert driver.read(LineRegs.X) == 7
    watch.cancel()
    driver.settle()
    before = len(ends)
    driver.settle()
    assert (bytes(got), len(ends), driver.device.errors) == (b"firstsecond", before, 0)
    os.close(reader)


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
