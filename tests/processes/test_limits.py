"""Client files at the limits of a process, each in a process that may end by it: SIGBUS, areas of memory, memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from vmodel.patience import patience

#: With ASan a signal that ends the process ends it with this code; see test_sanitizers.py.
KILLED = 99 if "VMODEL_SANITIZED" in os.environ else -signal.SIGBUS

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
    return subprocess.run(command, capture_output=True, text=True, timeout=patience(120), check=False)


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
    while True:  # until the kernel refuses, at vm.max_map_count
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
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience(60), check=False)
    assert done.stdout == "alive\n"


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
