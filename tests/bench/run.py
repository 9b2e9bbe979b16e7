"""scripts/bench: the table of targets with what this machine measures, as ratios to a bare ping-pong.

Everything runs pinned to one CPU; each figure is the median of several repetitions, and the yardstick is measured anew
before and after.  See docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vmodel.device import MmioBar, PciDevice, on_read, on_write
from vmodel.dma import Dma
from vmodel.memory import GuestMemory
from vmodel.regs import Reg32, RegisterBank
from vmodel.server import Server
from vmodel.span import KiB, MiB

REPEAT = 7


class BenchRegs(RegisterBank, size=0x100):
    """One register without hooks, one with."""

    PLAIN = Reg32(0x00)
    HOOKED = Reg32(0x04)


class BenchDevice(PciDevice):
    """As little as can be."""

    vendor_id, device_id, class_code = 0x1234, 0xBE7C, 0xFF0000
    bar0 = MmioBar(0, size=4 * KiB)
    regs = bar0.bank(BenchRegs)

    @on_read(BenchRegs.HOOKED)
    def _read(self, stored: int) -> int:
        return stored + 1

    @on_write(BenchRegs.HOOKED)
    def _write(self, new: int) -> int:
        return new


@dataclass(frozen=True)
class Row:
    """One line of the table; `measured` and `reach` in `unit`."""

    number: int
    what: str
    measured: float
    reach: float
    unit: str
    more_is_better: bool = False

    @property
    def good(self) -> bool:
        return self.measured >= self.reach if self.more_is_better else self.measured <= self.reach


def _serve(path: str, cpu: int, ready: object) -> None:
    os.sched_setaffinity(0, {cpu})
    device = BenchDevice("bench")
    server = Server()
    server.add(device, path)
    server.start()
    # What a driver would do first: switch memory space on.
    device.config.write(4, b"\x06\x00")
    ready.set()  # type: ignore[attr-defined]
    server.wait()


@contextmanager
def served(folder: Path, cpu: int) -> Iterator[Path]:
    """The device in a process of its own."""
    path = folder / "bench.sock"
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_serve, args=(str(path), cpu, ready), daemon=True)
    process.start()
    if not ready.wait(30):
        raise RuntimeError("the server did not start")
    try:
        yield path
    finally:
        process.kill()
        process.join()


class Peer:
    """The measuring C program."""

    def __init__(self, folder: Path, cpu: int) -> None:
        self._program = folder / "peer"
        self._cpu = cpu
        source = Path(__file__).with_name("peer.c")
        subprocess.run(["cc", "-O2", "-o", self._program, source], check=True)

    def __call__(self, *args: object, count: int) -> float:
        """Median nanoseconds of one operation."""
        line = [str(self._program), str(args[0]), str(REPEAT), str(count), *map(str, args[1:])]
        done = subprocess.run(
            line,
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
            preexec_fn=lambda: os.sched_setaffinity(0, {self._cpu}),
        )
        return statistics.median(float(value) for value in done.stdout.split())


def timed(call: Callable[[], object], count: int) -> float:
    """Median nanoseconds of one call."""
    samples = []
    for _ in range(REPEAT):
        start = time.perf_counter_ns()
        for _ in range(count):
            call()
        samples.append((time.perf_counter_ns() - start) / count)
    return statistics.median(samples)


def over_socket(peer: Peer, path: Path, say: Callable[[str], None]) -> Iterator[Row]:
    """Rows 1 to 4."""

    def ratio(*args: object, count: int) -> float:
        before = peer("pp", count=20000)
        measured = peer(path, *args, count=count)
        return measured / statistics.mean((before, peer("pp", count=20000)))

    say("register reads")
    yield Row(1, "REGION_READ 4 B, no hook", ratio("read", 0, 0, count=20000), 1.28, "pp")
    yield Row(2, "REGION_READ 4 B, Python hook", ratio("read", 0, 4, count=20000), 1.45, "pp")
    say("posted writes")
    yield Row(3, "posted REGION_WRITE, no hook", ratio("write", 0, 0, count=40000), 0.26, "pp")
    yield Row(3, "posted REGION_WRITE, Python hook", ratio("write", 0, 4, count=40000), 0.34, "pp")
    for kind, reach in (("message", 2.5), ("fd", 3.5)):
        for live in (1, 1000, 10000):
            say(f"DMA_MAP with {live} windows")
            name = f"DMA_MAP + DMA_UNMAP, {'no fd' if kind == 'message' else 'fd'}, {live:,} windows"
            yield Row(4, name, ratio("map", live, kind, count=4000), reach, "pp")


def in_process(peer: Peer, say: Callable[[str], None]) -> Iterator[Row]:
    """Rows 5 and 6; through the identity domain, as there is no other yet."""
    say("DMA")
    memory = GuestMemory()
    fd = os.memfd_create("bench")
    os.ftruncate(fd, 64 * MiB)
    os.pwrite(fd, b"\1" * (64 * MiB), 0)
    memory.map(0, 64 * MiB, fd=fd)
    dma = Dma(memory)
    dma.bus_master = True
    yield Row(5, "dma.read of 4 B", timed(lambda: dma.read(0x1000, 4), 50000) / 1000, 0.8, "us")
    yield Row(5, "dma.read of 4 KiB", timed(lambda: dma.read(0x1000, 4 * KiB), 50000) / 1000, 1.2, "us")
    # Scattered in the file, side by side for the device: what a paging domain will do, done by windows here.
    scattered = GuestMemory()
    for page in range(256):
        scattered.map(page * 4 * KiB, 4 * KiB, fd=fd, offset=(page * 167 % 256) * 8 * KiB)
    dma = Dma(scattered)
    dma.bus_master = True
    buffer = bytearray(1 * MiB)
    copied = timed(lambda: dma.readinto(0, buffer), 500)
    bare = peer("memcpy", count=500)
    yield Row(6, "dma.readinto of 1 MiB, 256 scattered pages", bare / copied, 0.85, "of memcpy", more_is_better=True)
    os.close(fd)
    memory.close()
    scattered.close()


def main() -> int:
    """Prints the table; always exit status 0, as it is no test."""
    parser = argparse.ArgumentParser(prog="bench", description="Measures vmodel against docs/performance.md's targets.")
    parser.add_argument("--json", action="store_true", help="for tools")
    options = parser.parse_args()
    console = Console(stderr=True)
    cpu = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpu})
    with tempfile.TemporaryDirectory(prefix="vmodel-bench-") as name, console.status("compiling") as status:

        def say(what: str) -> None:
            status.update(what)

        folder = Path(name)
        peer = Peer(folder, cpu)
        pp = peer("pp", count=50000)
        with served(folder, cpu) as path:
            rows = list(over_socket(peer, path, say))
        rows += in_process(peer, say)
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, Linux {platform.release().partition('-')[0]}, "
    machine += f"Python {platform.python_version()}, pp = {pp / 1000:.1f} us"
    if options.json:
        print(json.dumps({"machine": machine, "rows": [{**asdict(row), "good": row.good} for row in rows]}))
        return 0
    table = Table("#", "what", "measured", "reach", "", title=machine, box=None)
    for row in rows:
        sign = "≥" if row.more_is_better else "≤"
        mark = "PASS" if row.good else "short"
        table.add_row(
            str(row.number), row.what, f"{row.measured:.2f} {row.unit}", f"{sign} {row.reach} {row.unit}", mark
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
