"""scripts/bench: the table of targets with what this machine measures, as ratios to a bare ping-pong.

Everything runs pinned to one CPU; each figure is the median of several repetitions, and the yardstick is measured again
before and after.  See docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import measure
from measure import Program, Row, times
from rich.console import Console
from rich.table import Table
from translation import growth, plot, translated

from vmodel.device import MmioBar, PciDevice, on_read, on_write
from vmodel.device.taps import tap
from vmodel.points import Point
from vmodel.regs import Reg32, RegisterBank
from vmodel.server import Server
from vmodel.span import KiB


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


def _serve(path: str, cpu: int, ready: object) -> None:
    os.sched_setaffinity(0, {cpu})
    server = Server()
    for name in ("bench", "disarmed"):
        device = BenchDevice(name)
        server.add(device, path.replace("bench.sock", f"{name}.sock"))
        # What a driver would do first: switch memory space on.
        device.config.write(4, b"\x06\x00")
    was_armed(device)
    server.start()
    ready.set()  # type: ignore[attr-defined]
    server.wait()


@contextmanager
def served(folder: Path, cpu: int) -> Iterator[tuple[Path, int]]:
    """The devices in a process of its own: a socket, and the process."""
    path = folder / "bench.sock"
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_serve, args=(str(path), cpu, ready), daemon=True)
    process.start()
    if not ready.wait(30):
        raise RuntimeError("the server did not start")
    try:
        assert process.pid is not None
        yield path, process.pid
    finally:
        process.kill()
        process.join()


def over_socket(peer: Program, path: Path, say: Callable[[str], None]) -> Iterator[Row]:
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


def disarmed(peer: Program, path: Path, server: int, say: Callable[[str], None]) -> Iterator[Row]:
    """Row 13: paths on which faults were armed and are no more, over those on which they never were; in turn.

    By the CPU time that the server takes: differences of 1 % drown in the wall time of a machine that does other work.
    """
    say("disarmed fault points")

    def cost(device: Path, what: str, offset: int) -> float:
        before = cpu_time(server)
        peer.lines(device, 1, times(5000), what, 0, offset)
        return cpu_time(server) - before

    paths = path, path.with_name("disarmed.sock")
    for what, offset, name in (
        ("read", 0, "REGION_READ, no hook"),
        ("read", 4, "REGION_READ, Python hook"),
        ("write", 0, "posted REGION_WRITE, no hook"),
        ("write", 4, "posted REGION_WRITE, Python hook"),
    ):
        pairs = [[cost(device, what, offset) for device in paths] for _ in range(3 * measure.REPEAT)]
        yield Row(13, f"{name}, disarmed", statistics.median(b / a for a, b in pairs), 1.01, "of plain")
    never, after = plain_device("never"), plain_device("after")
    was_armed(after)

    def read(device: BenchDevice) -> float:
        dma, before = device.dma, time.thread_time_ns()
        for _ in range(times(5000)):
            dma.read(0, 4)
        return time.thread_time_ns() - before

    pairs = [[read(never), read(after)] for _ in range(10 * measure.REPEAT)]
    yield Row(13, "dma.read of 4 B, disarmed", statistics.median(b / a for a, b in pairs), 1.01, "of plain")


def cpu_time(process: int) -> int:
    """Nanoseconds of CPU that the threads of a process have had."""
    threads = Path(f"/proc/{process}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads)


def plain_device(name: str) -> BenchDevice:
    """One that reaches a page of memory."""
    device = BenchDevice(name)
    fd = os.memfd_create(name)
    os.ftruncate(fd, 4 * KiB)
    device.memory.map(0, 4 * KiB, fd=fd)
    os.close(fd)
    device.dma.bus_master = True
    return device


def was_armed(device: BenchDevice) -> None:
    """All points, once."""
    tap(device.backend, set(Point), lambda event, proceed: proceed(event))
    tap(device.backend, (), None)


def guests(console: Console, as_json: bool) -> int:
    """scripts/bench --iommu."""
    import guest_iommu  # it needs QEMU and kernels

    with tempfile.TemporaryDirectory(prefix="vmodel-bench-") as name, console.status("compiling") as status:
        measured = [*guest_iommu.from_guests(Path(name), status.update), *guest_iommu.in_process(status.update)]
        rates = list(guest_iommu.hit_rates(status.update))
    if as_json:
        rows = [{**asdict(row), "pair": row.pair, "per_second": row.per_second} for row in measured]
        print(json.dumps({"machine": machine(), "mapping": rows, "iotlb": dict(rates)}))
        return 0
    for table in guest_iommu.tables(measured, rates, machine()):
        Console(width=None if sys.stdout.isatty() else 140).print(table)
    return 0


def nvme(console: Console, as_json: bool) -> int:
    """scripts/bench --nvme."""
    import guest_nvme  # it needs QEMU and a kernel

    with tempfile.TemporaryDirectory(prefix="vmodel-bench-") as name, console.status("compiling") as status:
        measured = list(guest_nvme.from_guests(Path(name), status.update))
    rows = list(guest_nvme.rows(measured))
    if as_json:
        print(json.dumps({"machine": machine(), "rows": as_dicts(rows), "times": [asdict(m) for m in measured]}))
        return 0
    for table in (of_rows(rows, machine()), guest_nvme.table(measured)):
        Console(width=None if sys.stdout.isatty() else 120).print(table)
    return 0


def as_dicts(rows: list[Row]) -> list[dict[str, object]]:
    """For tools."""
    return [{**asdict(row), "good": row.good} for row in rows]


def of_rows(rows: list[Row], title: str) -> Table:
    """The table of targets and what was measured."""
    table = Table("#", "what", "measured", "reach", "", title=title, box=None)
    for row in rows:
        sign = "≥" if row.more_is_better else "≤"
        mark = "PASS" if row.good else "short"
        table.add_row(
            str(row.number), row.what, f"{row.measured:.2f} {row.unit}", f"{sign} {row.reach} {row.unit}", mark
        )
    return table


def machine() -> str:
    """What these figures are of."""
    system = f"{platform.machine()}, {os.cpu_count()} CPUs, Linux {platform.release().partition('-')[0]}"
    return f"{system}, Python {platform.python_version()}"


def main() -> int:
    """Prints the table; always exit status 0, as it is no test."""
    parser = argparse.ArgumentParser(prog="bench", description="Measures vmodel against docs/performance.md's targets.")
    parser.add_argument("--json", action="store_true", help="for tools")
    parser.add_argument("--plot", metavar="FILE.svg", help="only draw how translation grows with mappings")
    parser.add_argument("--iommu", action="store_true", help="only what mapping costs guests, beside QEMU's own IOMMUs")
    parser.add_argument("--nvme", action="store_true", help="only what NVMe costs guests, beside QEMU's own controller")
    parser.add_argument("--try", action="store_true", dest="only_try", help="whether it runs: figures mean nothing")
    options = parser.parse_args()
    if options.only_try:
        measure.only_try()
    console = Console(stderr=True)
    if options.iommu:
        return guests(console, options.json)
    if options.nvme:
        return nvme(console, options.json)
    cpu = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpu})
    with tempfile.TemporaryDirectory(prefix="vmodel-bench-") as name, console.status("compiling") as status:

        def say(what: str) -> None:
            status.update(what)

        folder = Path(name)
        here = Path(__file__).parent
        shim = here.parents[1] / "c_shim"
        domains = Program(folder, cpu, "iommu", [here / "iommu.c", *sorted(shim.glob("*.c"))], f"-I{shim}")
        if options.plot:
            plot(growth(domains, say), Path(options.plot))
            return 0
        peer = Program(folder, cpu, "peer", [here / "peer.c"])
        pp = peer("pp", count=50000)
        with served(folder, cpu) as (path, server):
            rows = [*over_socket(peer, path, say), *disarmed(peer, path, server, say)]
        rows += translated(peer, domains, say)
        rows.sort(key=lambda row: row.number)
    title = f"{machine()}, pp = {pp / 1000:.1f} us"
    if options.json:
        print(json.dumps({"machine": title, "rows": as_dicts(rows)}))
        return 0
    Console(width=None if sys.stdout.isatty() else 120).print(of_rows(rows, title))
    return 0


if __name__ == "__main__":
    sys.exit(main())
