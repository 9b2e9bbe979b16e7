"""Client files that shrink, are huge, many, or on file systems that never answer: nobody but their client is hurt."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
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

#: With ASan a signal that ends the process ends it with this code; see test_sanitizers.py.
KILLED = 99 if "VMODEL_SANITIZED" in os.environ else -signal.SIGBUS
MAPPINGS = 512
BYTES = 1 << 40

PRELUDE = """
import faulthandler, mmap, os, resource, signal, sys
from vmodel import _shim
from vmodel.dma import Dma
from vmodel.errors import DmaFault, Reason
from vmodel.memory import GuestMemory
from vmodel.span import PAGE, Span
def memfd(size):
    fd = os.memfd_create("guest-ram")
    os.ftruncate(fd, size)
    return fd
def device(memory):
    dma = Dma(memory)
    dma.bus_master = True
    return dma
memory = GuestMemory(_shim.Files())
dma = device(memory)
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Runs it in a process of its own, which it may end."""
    command = [sys.executable, "-c", PRELUDE + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


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


@pytest.mark.parametrize("order", ["range(pages - 1, 0, -2)", "range(1, pages, 2)"], ids=["downwards", "upwards"])
def test_a_truncated_file_takes_two_areas_of_the_kernel(order: str) -> None:
    """vm.max_map_count (65,530) is the whole process's: the repair of a page must not take one each."""
    done = run(
        f"""
pages = 140_000
fd = memfd(pages * PAGE)
memory.map(0, pages * PAGE, fd=fd)
os.ftruncate(fd, 0)
before = len(open("/proc/self/maps").readlines())
for page in {order}:
    try:
        dma.read(page * PAGE, 4)
    except DmaFault as fault:
        assert fault.reason is Reason.TRUNCATED
    else:
        sys.exit("it was read")
print(len(open("/proc/self/maps").readlines()) - before)
"""
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) <= 8  # the heap may grow as well


@pytest.mark.skipif(KILLED == 99, reason="ASan itself ends the process where it gets no memory")
def test_no_area_left_is_no_crash() -> None:
    """Where another part of the process has taken all of them, the mapping as a whole is replaced by zeros."""
    done = run(
        """
fd = memfd(64 * PAGE)
memory.map(0, 64 * PAGE, fd=fd)
os.ftruncate(fd, 32 * PAGE)
kept = []
try:
    while True:
        # Read-only and writable in turn, so that no two are one area.
        kept.append(mmap.mmap(-1, PAGE, prot=(mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE)[len(kept) % 2]))
except OSError:
    pass
for page in (60, 40):
    try:
        dma.read(page * PAGE, 4)
    except DmaFault as fault:
        assert fault.reason is Reason.TRUNCATED
    else:
        sys.exit("it was read")
print(len(kept) > 1000)
sys.stdout.flush()
os._exit(0)
"""
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr[-2000:]


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


FOREIGN = """
fd = memfd(PAGE)
foreign = mmap.mmap(fd, PAGE)
os.ftruncate(fd, 0)
"""


@pytest.mark.parametrize(
    "code",
    [
        FOREIGN + "foreign[0]",
        # Somebody who calls whoever was there before must not be called in turn, over and over.
        FOREIGN + "faulthandler.enable(); _shim.Files(); foreign[0]",
        FOREIGN + "faulthandler.enable(); foreign[0]",
        "os.kill(os.getpid(), signal.SIGBUS); import time; time.sleep(1)",
    ],
    ids=["fault", "chain", "displaced", "sent"],
)
def test_a_sigbus_that_is_not_ours_ends_the_process(code: str) -> None:
    assert run(code + "\nprint('alive')").returncode == KILLED


def test_a_host_that_ignores_sigbus_still_does() -> None:
    done = run("signal.signal(signal.SIGBUS, signal.SIG_IGN)\nos.kill(os.getpid(), signal.SIGBUS)\nprint('alive')")
    assert done.stdout == "alive\n"
    # Before our handler is there as well, where SIGBUS had been ignored already.
    command = [sys.executable, "-c", f"import signal; signal.signal(signal.SIGBUS, signal.SIG_IGN)\n{PRELUDE}"]
    command[-1] += "os.kill(os.getpid(), signal.SIGBUS)\nprint('alive')"
    assert subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout == "alive\n"


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


def test_a_log_without_memory_says_that_all_is_dirty() -> None:
    """Writes 128 MiB apart take a page of bits each.  A superset is right for migration, a lost bit is not."""
    done = run(
        """
fd = memfd(PAGE)
domain = _shim.Domain.paging(PAGE, 0, 2**48 - 1, PAGE - 1, 100_000)
memory.map(0, PAGE, fd=fd)
requester = _shim.Requester(memory.shim)
requester.enable(True)
requester.attach(domain)
for n in range(16_396):
    domain.map(n << 27, 0, PAGE, 3)
domain.dirty_start()
if "VMODEL_SANITIZED" not in os.environ:
    used = int(open("/proc/self/statm").read().split()[0]) * PAGE
    resource.setrlimit(resource.RLIMIT_AS, (used + (24 << 20), resource.RLIM_INFINITY))
for n in range(16_396):
    requester.write(n << 27, b"x")
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
for page in (0, 1, 5, 16_395 << 15):
    assert domain.dirty_report(page * PAGE, PAGE, PAGE, False)[0] == 1, page
assert domain.dirty_report(0, 100 * PAGE, PAGE, False) == (2**100 - 1).to_bytes(16, "little")
domain.dirty_stop()
domain.dirty_start()
requester.write(1 << 27, b"x")
assert domain.dirty_report(0, 64 * PAGE, PAGE, False) == bytes(8)
assert domain.dirty_report(1 << 27, 64 * PAGE, PAGE, False) == b"\\x01" + bytes(7)
print("fine")
"""
    )
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr[-2000:]


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


def test_a_handler_that_came_later_is_displaced() -> None:
    """pytest, and users, switch Python's faulthandler on after vmodel was imported."""
    done = run(
        """
faulthandler.enable()
fd = memfd(2 * PAGE)
memory.map(0, 2 * PAGE, fd=fd)
os.ftruncate(fd, 0)
try:
    dma.read(0, 4)
except DmaFault as fault:
    print(fault.reason.name)
"""
    )
    assert (done.returncode, done.stdout) == (0, "TRUNCATED\n"), done.stderr
