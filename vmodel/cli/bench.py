"""vmodel bench: measures a device without a guest."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from vmodel.cli.chart import Chart, Series, draw
from vmodel.cli.output import AsJson, console, show
from vmodel.devices.nvme.command import SUBMISSION_SIZE, NvmeCommand
from vmodel.errors import ConfigError
from vmodel.patience import patience
from vmodel.span import PAGE, KiB, MiB
from vmodel.testing.nvme import READ, WRITE, CommandStream, Latency, NvmeDriver, Pair, prps

app = typer.Typer(help="Measure a device without a guest.", no_args_is_help=True)

#: The queue depths and block sizes (in bytes) that are measured.
DEPTHS = (1, 2, 4, 8, 16, 32, 64, 128)
BLOCKS = (4 * KiB, 128 * KiB)
#: Entries of the queue (each has a data block in guest memory), and bytes of the namespace.
_ENTRIES, _NAMESPACE = 256, 256 * MiB
#: Commands are prepared for this many rounds of the queue, so that the same blocks do not repeat soon.
_ROUNDS = 32
_REPEAT = 3
_LBA = 512

_MACHINE = """\
[machine]
name = "bench"

[[device]]
name = "nvme0"
model = "nvme"
address = "0000:00:04.0"
params = {{ queues = 1, namespaces = [ {{ {place}, lba = 512 }} ] }}
"""

Svg = Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Draw IOPS and latency.")]
File = Annotated[
    Path | None, typer.Option("--file", metavar="FILE", help="Keep the blocks in FILE, which must not exist yet.")
]
Seconds = Annotated[float, typer.Option("--seconds", min=0.01, max=60, help="Seconds to measure each figure.")]
Apart = Annotated[bool, typer.Option("--apart", help="Use one CPU each for server and client, instead of sharing one.")]


@dataclass(frozen=True)
class Figure:
    """One line of the table; latencies in microseconds."""

    what: str
    block: int
    depth: int
    iops: float
    #: Commands per second of CPU time of client and server: what one otherwise idle core would reach.
    per_core: float
    mib_per_s: float
    over_memcpy: float
    p50: float
    p99: float
    p99_9: float


@app.callback()
def _bench() -> None:
    """Measure a device without a guest."""


@app.command()
def nvme(
    as_json: AsJson = False, svg: Svg = None, file: File = None, seconds: Seconds = 1.0, apart: Apart = False
) -> None:
    """Measure random reads and writes of an NVMe controller.

    vmodel's own vfio-user client sends the commands.

    IOPS/core is the number of commands per second of CPU time of client and server together.  "of memcpy" is the
    bandwidth divided by that of memcpy between the same blocks.  Both are valid on a busy machine, too.
    """
    cpus = sorted(os.sched_getaffinity(0))
    if apart and len(cpus) < 2:
        raise ConfigError("--apart needs two CPUs")
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpus[0]})
    try:
        with _served(file, cpus[1] if apart else cpus[0]) as (path, server):
            figures = list(_measure(path, server, seconds))
    finally:
        os.sched_setaffinity(0, before)
    if svg is not None:
        try:
            svg.write_text(plot(figures))
        except OSError as error:
            raise ConfigError(f"--svg {svg}: {error.strerror}") from error
    if as_json:
        print(json.dumps([asdict(figure) for figure in figures]))
    elif svg is None:
        _show(figures)


@contextlib.contextmanager
def _served(file: Path | None, cpu: int) -> Iterator[tuple[Path, int]]:
    """Starts a server in a process of its own, pinned to a CPU; yields the controller's socket and the process id."""
    place = f'memory = "{_NAMESPACE}"'
    if file is not None:
        if file.exists():
            raise ConfigError(f"--file {file}: exists, and would be overwritten")
        place = f'path = "{file.absolute()}", size = "{_NAMESPACE}"'
    with tempfile.TemporaryDirectory(prefix="vmodel-bench") as folder:
        machine = Path(folder) / "bench.toml"
        machine.write_text(_MACHINE.format(place=place))
        command = [sys.executable, "-m", "vmodel", "serve", str(machine), "--run-dir", folder]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            os.sched_setaffinity(server.pid, {cpu})
            assert server.stdout is not None
            lines = list(iter(server.stdout.readline, "ready\n")) if server.poll() is None else []
            if not lines:
                raise ConfigError("the server does not start")
            yield Path(lines[0].split()[1]), server.pid
        finally:
            server.terminate()
            server.wait()
            if file is not None:
                file.unlink(missing_ok=True)


def _cpu_seconds(server: int) -> float:
    """The CPU time, in seconds, that this process and the server have used so far."""
    tasks = Path(f"/proc/{server}/task").iterdir()
    return time.process_time() + sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def _measure(path: Path, server: int, seconds: float) -> Iterator[Figure]:
    data = max(BLOCKS) * _ENTRIES
    with NvmeDriver.connect(path, ram_size=data + 8 * MiB, timeout=patience(30)) as driver:
        pair = driver.create(1, _ENTRIES)
        buffers, lists = driver.take(data), driver.take(_ENTRIES * PAGE)
        _fill(driver, pair, buffers, lists)
        for block in BLOCKS:
            memcpy = _Memcpy(block)
            for opcode, name in ((READ, "read"), (WRITE, "write")):
                stream = CommandStream(driver, pair, _commands(driver, opcode, block, buffers, lists))
                stream.run(32, seconds / 10)  # warm
                for depth in DEPTHS:
                    yield _figure(f"random {name}", block, depth, stream, server, seconds, memcpy)


def _figure(
    what: str, block: int, depth: int, stream: CommandStream, server: int, seconds: float, memcpy: _Memcpy
) -> Figure:
    runs, found = [], []
    for _ in range(_REPEAT):
        # Measured next to each run, as memory bandwidth varies with the load of the machine.
        copied = memcpy.rate(seconds / _REPEAT / 4)
        start, used = time.perf_counter(), _cpu_seconds(server)
        latencies = stream.run(depth, seconds / _REPEAT)
        count = sum(latency.count for latency in latencies)
        per_core = count / (_cpu_seconds(server) - used)
        runs.append((count / (time.perf_counter() - start), per_core, per_core * block / copied))
        found += latencies
    iops, per_core, over_memcpy = (statistics.median(run[n] for run in runs) for n in range(3))
    return Figure(
        what, block, depth, iops, per_core, iops * block / MiB, over_memcpy, *percentiles(found, (0.5, 0.99, 0.999))
    )


def percentiles(found: Sequence[Latency], shares: Sequence[float]) -> list[float]:
    """For each of `shares` (0 to 1): the latency in microseconds that this share of all commands does not exceed."""
    ordered = sorted(found, key=lambda latency: latency.nanoseconds)
    total = sum(latency.count for latency in ordered)
    result = []
    for share in shares:
        seen = 0
        for latency in ordered:
            seen += latency.count
            if seen >= share * total:
                result.append(latency.nanoseconds / 1000)
                break
    return result


def _pointer(driver: NvmeDriver, n: int, block: int, buffers: int, lists: int) -> bytes:
    """The data pointer of entry `n`; its PRP list, if it needs one, is written to guest memory."""
    first = buffers + n * block
    pages = [first + at for at in range(0, block, PAGE)]
    if len(pages) <= 2:
        return prps(*pages)
    at = lists + n * PAGE
    entries = struct.pack(f"<{len(pages) - 1}Q", *pages[1:])
    driver.ram.view[at : at + len(entries)] = entries
    return prps(first, at)


def _commands(driver: NvmeDriver, opcode: int, block: int, buffers: int, lists: int) -> bytes:
    """Submission queue entries for random blocks, for `_ROUNDS` rounds of the queue."""
    chance = random.Random(block)
    pointers = [_pointer(driver, n, block, buffers, lists) for n in range(_ENTRIES)]
    image = bytearray()
    for n in range(_ENTRIES * _ROUNDS):
        slba = chance.randrange(_NAMESPACE // block) * (block // _LBA)
        slot = n % _ENTRIES
        command = NvmeCommand.make(
            opcode, cid=slot, nsid=1, dptr=pointers[slot], cdw10=slba, cdw11=slba >> 32, cdw12=block // _LBA - 1
        )
        image += command.build()
    assert len(image) == _ENTRIES * _ROUNDS * SUBMISSION_SIZE
    return bytes(image)


def _fill(driver: NvmeDriver, pair: Pair, buffers: int, lists: int) -> None:
    """Writes the whole namespace: reads of unwritten blocks would all hit the kernel's one page of zeros."""
    block = max(BLOCKS)
    driver.ram.view[buffers : buffers + block] = random.Random(0).randbytes(block)
    pointer = _pointer(driver, 0, block, buffers, lists)
    for slba in range(0, _NAMESPACE // _LBA, block // _LBA):
        driver.send(pair, NvmeCommand.make(WRITE, nsid=1, dptr=pointer, cdw10=slba, cdw12=block // _LBA - 1))


class _Memcpy:
    """Copies random blocks to a ring of `_ENTRIES` blocks, as the queue does."""

    def __init__(self, block: int) -> None:
        self._block = block
        self._store, self._ring = mmap.mmap(-1, _NAMESPACE), mmap.mmap(-1, block * _ENTRIES)
        for at in range(0, _NAMESPACE, MiB):
            self._store[at : at + MiB] = b"\xa5" * MiB
        chance = random.Random(block)
        self._places = [chance.randrange(_NAMESPACE // block) * block for _ in range(_ENTRIES * _ROUNDS)]
        self._at = 0

    def rate(self, seconds: float) -> float:
        """Bytes copied per second of CPU time, measured for `seconds`."""
        block, copied = self._block, 0
        with memoryview(self._store) as source, memoryview(self._ring) as target:
            start = time.process_time()
            while time.process_time() - start < seconds:
                for n, at in enumerate(self._places[self._at : self._at + _ENTRIES]):
                    target[n * block : (n + 1) * block] = source[at : at + block]
                self._at = (self._at + _ENTRIES) % len(self._places)
                copied += _ENTRIES * block
            return copied / (time.process_time() - start)


def plot(figures: Sequence[Figure]) -> str:
    """IOPS and latencies (median, 99.9th percentile) over queue depth, as an SVG document."""
    kinds = list(dict.fromkeys((figure.what, figure.block) for figure in figures))

    def lines(value: str) -> list[Series]:
        return [
            Series(
                f"{what}, {block // KiB} KiB",
                [(f.depth, getattr(f, value)) for f in figures if (f.what, f.block) == (what, block)],
            )
            for what, block in kinds
        ]

    depth = "queue depth"
    charts = [
        Chart("IOPS", depth, "commands a second", lines("iops")),
        Chart("Latency, median", depth, "µs", lines("p50")),
        Chart("Latency, 99.9th percentile", depth, "µs", lines("p99_9")),
    ]
    return draw("NVMe over queue depth", charts)


def _show(figures: Sequence[Figure]) -> None:
    heads = ("random", "block", "depth", "IOPS", "IOPS/core", "MiB/s", "of\nmemcpy", "p50\nµs", "p99\nµs", "p99.9\nµs")
    table = Table(*heads, box=None, pad_edge=False, padding=(0, 1, 0, 0))  # 80 columns are enough
    for f in figures:
        table.add_row(
            f.what.removeprefix("random "),
            f"{f.block // KiB} KiB",
            str(f.depth),
            f"{f.iops:,.0f}",
            f"{f.per_core:,.0f}",
            f"{f.mib_per_s:,.0f}",
            f"{f.over_memcpy:.2f}",
            *(f"{value:.1f}" for value in (f.p50, f.p99, f.p99_9)),
        )
    show(table, console())
