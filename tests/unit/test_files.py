"""Client files that shrink, are huge, many, or on file systems that never answer: nobody but their client is hurt."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.fuse import SilentFile
from vmodel import _shim
from vmodel.dma import Dma
from vmodel.errors import DmaFault, Reason
from vmodel.memory import MAX_WINDOWS, GuestMemory
from vmodel.span import PAGE, GiB, MiB, Span

MAPPINGS = 512
BYTES = 1 << 40


def memfd(size: int) -> int:
    fd = os.memfd_create("guest-ram")
    os.ftruncate(fd, size)
    return fd


def device(memory: GuestMemory) -> Dma:
    dma = Dma(memory)
    dma.bus_master = True
    return dma


@pytest.fixture
def clients() -> tuple[GuestMemory, GuestMemory]:
    """Two functions of one server."""
    files = _shim.Files()
    return GuestMemory(files), GuestMemory(files)


# ---- files that shrink ----------------------------------------------------------------------------


def test_what_is_left_of_a_file_goes_on(clients: tuple[GuestMemory, GuestMemory]) -> None:
    fd = memfd(16 * PAGE)
    dmas = [device(memory) for memory in clients]
    for memory in clients:
        memory.map(0, 16 * PAGE, fd=fd)
    with dmas[0].view(12 * PAGE, PAGE, writable=True) as view:
        view[:4] = b"data"
        os.ftruncate(fd, 8 * PAGE)
        for dma in dmas:
            for page in (15, 8, 11):
                with pytest.raises(DmaFault) as caught:
                    dma.write(page * PAGE, b"x")
                assert caught.value.reason is Reason.TRUNCATED
            dma.write(7 * PAGE, b"here")
            assert dma.read(7 * PAGE, 4) == b"here"
        assert bytes(view[:4]) == bytes(4)
        view[:4] = b"lost"
    assert os.fstat(fd).st_size == 8 * PAGE
    os.close(fd)


def test_threads_on_files_that_come_shrink_and_go() -> None:
    """R4: the handler looks at mappings that other threads are just giving back."""
    files, stop, errors = _shim.Files(), threading.Event(), list[BaseException]()
    rounds = [0] * 6

    def guarded(call: Callable[[int], None], n: int) -> None:
        try:
            while not stop.is_set():
                call(n)
                rounds[n] += 1
        except BaseException as error:
            errors.append(error)

    memories = [GuestMemory(files) for _ in range(6)]
    dmas = [device(memory) for memory in memories]

    def shrink(n: int) -> None:
        fd = memfd(64 * PAGE)
        memories[n].map(0, 64 * PAGE, fd=fd)
        os.ftruncate(fd, 8 * PAGE)
        for page in (63, 40, 20, 10, 8):
            for call in (
                lambda at: dmas[n].read(at, 8),
                lambda at: dmas[n].write(at, b"x"),
                lambda at: dmas[n].swap(at, 8, 1),
            ):
                with pytest.raises(DmaFault) as caught:
                    call(page * PAGE)
                assert caught.value.reason is Reason.TRUNCATED
        dmas[n].write(7 * PAGE, b"x")
        memories[n].unmap_all()
        os.close(fd)

    def come_and_go(n: int) -> None:
        for _ in range(20):
            fd = memfd(4 * PAGE)
            memories[n].map(0, 4 * PAGE, fd=fd)
            os.close(fd)
            memories[n].unmap_all()

    threads = [
        threading.Thread(target=guarded, args=(shrink if n < 3 else come_and_go, n), daemon=True) for n in range(6)
    ]
    for thread in threads:
        thread.start()
    begin = time.monotonic()
    while not errors and (time.monotonic() < begin + 1 or (min(rounds) < 5 and time.monotonic() < begin + 60)):
        time.sleep(0.01)
    stop.set()
    for thread in threads:
        thread.join(30)
    assert not errors, errors
    assert min(rounds) >= 5
    assert files.mapped == 0


# ---- what a client may take --------------------------------------------------------------------------


def test_a_huge_file_costs_its_windows_only(clients: tuple[GuestMemory, GuestMemory]) -> None:
    huge = memfd(1 << 46)
    before = address_space()
    for n in range(8):
        clients[0].map(n * PAGE, PAGE, fd=huge, offset=n << 43)
    assert address_space() - before <= 8 * GiB + 64 * MiB
    dma = device(clients[0])
    dma.write(7 * PAGE, b"far")
    assert os.pread(huge, 3, 7 << 43) == b"far"
    with pytest.raises(OSError) as caught:
        clients[0].map(GiB, 1 << 46, fd=huge)
    assert caught.value.errno == errno.ENOSPC
    os.close(huge)


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * PAGE


def test_address_space_is_a_clients_own(clients: tuple[GuestMemory, GuestMemory]) -> None:
    huge, small = memfd(2 * BYTES), memfd(PAGE)
    with pytest.raises(OSError) as caught:
        for n in range(MAX_WINDOWS):
            clients[0].map(n * BYTES // 4, BYTES // 4, fd=huge, offset=n * BYTES // 4)
    assert caught.value.errno == errno.ENOSPC
    assert len(clients[0]) == 4
    with pytest.raises(OSError):
        clients[0].map(1 << 50, PAGE, fd=small)
    clients[1].map(0, BYTES // 2, fd=huge)
    clients[1].map(1 << 50, PAGE, fd=small)
    # What is given back may be taken again; more windows in what is mapped cost nothing.
    clients[0].unmap(0, BYTES // 4)
    clients[0].map(1 << 50, PAGE, fd=small)
    clients[0].map(1 << 51, PAGE, fd=small)
    for memory in clients:
        memory.unmap_all()
    assert clients[0].shim.files.mapped == 0
    os.close(huge)
    os.close(small)


def test_mappings_are_a_clients_own(clients: tuple[GuestMemory, GuestMemory]) -> None:
    """One client's thousands of memfds leave the other its own."""

    def take(memory: GuestMemory, n: int) -> None:
        fd = memfd(PAGE)
        try:
            memory.map(n * PAGE, PAGE, fd=fd)
        finally:
            os.close(fd)

    with pytest.raises(OSError) as caught:
        for n in range(5000):
            take(clients[0], n)
    assert caught.value.errno == errno.ENOSPC
    assert len(clients[0]) == MAPPINGS
    for n in range(MAPPINGS):
        take(clients[1], n)
    device(clients[1]).write(0, b"mine")
    clients[0].unmap(0, PAGE)
    take(clients[0], 0)


def test_windows_side_by_side_share_a_mapping(clients: tuple[GuestMemory, GuestMemory]) -> None:
    """As many windows as max_dma_maps says, in one file."""
    pages = 20_000
    fd = memfd(pages * PAGE)
    for n in range(pages):
        clients[0].map(n * 2 * PAGE, PAGE, fd=fd, offset=n * PAGE)
    assert clients[0].shim.files.mapped == 1
    dma = device(clients[0])
    dma.write((pages - 1) * 2 * PAGE, b"last")
    assert os.pread(fd, 4, (pages - 1) * PAGE) == b"last"
    os.close(fd)


def test_a_window_over_the_edge_of_a_gib(clients: tuple[GuestMemory, GuestMemory]) -> None:
    fd = memfd(3 * GiB)
    clients[0].map(0, 2 * PAGE, fd=fd, offset=GiB - PAGE)
    clients[0].map(GiB, PAGE, fd=fd, offset=2 * GiB)
    dma = device(clients[0])
    dma.write(PAGE - 2, b"edge")
    dma.write(GiB, b"next")
    assert os.pread(fd, 4, GiB - 2) == b"edge"
    assert os.pread(fd, 4, 2 * GiB) == b"next"
    os.close(fd)


# ---- the dirty log ---------------------------------------------------------------------------------


def test_a_log_that_is_read_does_not_lose_count(clients: tuple[GuestMemory, GuestMemory]) -> None:
    """What counts is how much is dirty at a time."""
    clients[0].map(0, 1 << 43)
    clients[0].dirty_start()
    dma = _shim.Requester(clients[0].shim)
    dma.enable(True)
    chunk = 1 << 27
    for n in range(40_000):
        with pytest.raises(_shim.ByMessage):
            dma.write(n * chunk, b"x")
        if n % 10_000 == 9_999:
            for m in range(n - 9_999, n + 1):
                report = clients[0].dirty_report(Span.sized(m * chunk, chunk))
                assert report[0] == 1
                assert not any(report[1:])
    clients[0].dirty_stop()


# ---- file systems that never answer -------------------------------------------------------------------


@pytest.fixture
def silent(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[int]:
    """A file of a FUSE file system that has fallen silent."""
    try:
        file = SilentFile(tmp_path / "file", request.param)
    except OSError as error:
        pytest.skip(f"FUSE cannot be mounted here: {error}")
    try:
        fd = os.open(tmp_path / "file", os.O_RDWR)
        os.fstat(fd)
        file.silent = True
        yield fd
    finally:
        file.close()
    with contextlib.suppress(OSError):  # it says that nobody has answered
        os.close(fd)


@pytest.mark.parametrize("silent", [0, 3600], ids=["attributes", "statfs"], indirect=True)
def test_a_file_system_that_never_answers(clients: tuple[GuestMemory, GuestMemory], silent: int) -> None:
    """The client gets its error at once, and others are served meanwhile."""
    codes = []

    def hang() -> None:
        try:
            clients[0].map(0, PAGE, fd=silent)
        except OSError as error:
            codes.append(error.errno)

    def work() -> None:
        fd = memfd(PAGE)
        clients[1].map(0, PAGE, fd=fd)
        clients[1].unmap_all()
        os.close(fd)

    threads = [threading.Thread(target=call, daemon=True) for call in (hang, work)]
    for thread in threads:
        thread.start()
        thread.join(5)
    assert [thread.is_alive() for thread in threads] == [False, False]
    assert codes == [errno.EOPNOTSUPP]


@pytest.mark.parametrize("folder", ["/dev/shm", "/tmp"])
def test_files_of_memory_and_of_disks(clients: tuple[GuestMemory, GuestMemory], folder: str) -> None:
    """memory-backend-file of QEMU's: any local file system."""
    if not os.access(folder, os.W_OK):
        pytest.skip(f"{folder} cannot be written to")
    fd = os.open(folder, os.O_RDWR | os.O_TMPFILE, 0o600)
    os.ftruncate(fd, 4 * PAGE)
    clients[0].map(0, 4 * PAGE, fd=fd)
    device(clients[0]).write(PAGE, b"there")
    assert os.pread(fd, 5, PAGE) == b"there"
    os.close(fd)
