"""scripts/bench --nvme: what NVMe costs a guest, by our controller and by QEMU's own in the same run; rows 11, 12, 19.

Unlike the other rows these are not pinned: a guest's vCPU and the server each want a CPU.
"""

from __future__ import annotations

import os
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from measure import Row
from rich.table import Table

from vmodel.guest.artifacts import find_kernel
from vmodel.guest.running import GuestSpec, run_guest
from vmodel.machine import parse
from vmodel.qemu import memory_args
from vmodel.span import MiB

Say = Callable[[str], None]
KERNEL = "stable"
#: Boots of each guest, in turn; repetitions in each.
ROUNDS, REPEAT = 3, 5
#: In the order of the program's lines.
KINDS = ("4 KiB reads", "4 KiB writes", "64 KiB reads", "64 KiB writes")
COUNTS = (2000, 2000, 200, 200)
IMAGE = 128 * MiB

#: By (whose, IOMMU).
COVERED = "vmodel, with coverage"
GUESTS = (
    ("vmodel", ""),
    (COVERED, ""),
    ("QEMU", ""),
    ("vmodel", "VT-d"),
    ("vmodel", "virtio-iommu"),
    ("QEMU", "virtio-iommu"),
)
MACHINE = """
[machine]
name = "bench"
memory = "512M"

[[device]]
name = "nvme0"
model = "nvme"
address = "0000:00:03.0"
params = { namespaces = [ { path = "disk.img", size = "128M" } ] }
"""
IOMMU = '[[iommu]]\nname = "iommu0"\nkind = "{}"\naddress = "0000:00:02.0"\n'


@dataclass(frozen=True)
class Measured:
    """Nanoseconds of all transfers of a kind, of the median one, of the 99th of 100; medians of all repetitions."""

    whose: str
    iommu: str
    kind: str
    total: float
    median: float
    slow: float


def _samples(program: Path, iommu: str, qemu_args: list[str], coverage: Sequence[str] = ()) -> list[tuple[float, ...]]:
    """A line for each repetition and kind."""
    spec = GuestSpec(
        command=["./nvme_io", "/dev/nvme0n1", str(REPEAT)],
        kernel=find_kernel(KERNEL),
        modules=[*(["virtio_iommu"] if iommu == "virtio-iommu" else []), "nvme"],
        files=[program],
        qemu_args=qemu_args,
        coverage=coverage,
        timeout=180,
    )
    result = run_guest(spec)
    lines = result.output.decode(errors="replace").splitlines()
    if result.status or len(lines) != REPEAT * len(KINDS):
        raise RuntimeError(f"the guest's program failed: {result.output.decode(errors='replace')}\n{result.console}")
    return [tuple(map(float, line.split())) for line in lines]


def _ours(program: Path, folder: Path, iommu: str, coverage: Sequence[str] = ()) -> list[tuple[float, ...]]:
    text = MACHINE + (IOMMU.format(iommu.lower()) if iommu else "")
    machine = parse(text, folder / "m.toml")
    try:
        with machine.serve(folder):
            return _samples(program, iommu, machine.qemu_args(folder), coverage)
    finally:
        machine.remove_acpi(folder)
        machine.close()


def _qemus(program: Path, folder: Path, iommu: str) -> list[tuple[float, ...]]:
    args = [*memory_args("512M"), "-nic", "none"]
    if iommu:
        args += ["-device", "virtio-iommu-pci,addr=2.0"]
    # As ours: through the page cache of the host.
    args += ["-drive", f"file={folder / 'disk.img'},if=none,id=disk,format=raw,cache=writeback,discard=unmap"]
    return _samples(program, iommu, [*args, "-device", "nvme,serial=bench,drive=disk,max_ioqpairs=16,addr=3.0"])


def from_guests(folder: Path, say: Say) -> Iterator[Measured]:
    """Ours and QEMU's own, in turn, on one image."""
    program = folder / "nvme_io"
    source = Path(__file__).parent / "nvme_io.c"
    subprocess.run(["cc", "-std=gnu11", "-O2", "-static", "-o", program, source], check=True)
    fd = os.open(folder / "disk.img", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, IMAGE)
    os.close(fd)
    found: dict[tuple[str, str], list[tuple[float, ...]]] = {guest: [] for guest in GUESTS}
    for number in range(ROUNDS):
        for whose, iommu in GUESTS:
            say(f"{whose}{' with ' if iommu else ''}{iommu}, {number + 1} of {ROUNDS}")
            if whose == COVERED:
                found[whose, iommu] += _ours(program, folder, iommu, ["nvme", "nvme_core"])
            else:
                found[whose, iommu] += (_ours if whose == "vmodel" else _qemus)(program, folder, iommu)
    for (whose, iommu), lines in found.items():
        for n, kind in enumerate(KINDS):
            columns = zip(*lines[n :: len(KINDS)], strict=True)
            yield Measured(whose, iommu, kind, *(statistics.median(column) for column in columns))


def rows(measured: list[Measured]) -> Iterator[Row]:
    """Rows 11 and 12: ours over QEMU's; row 19: with coverage over without."""
    times = {(m.whose, m.iommu, m.kind): m.total for m in measured}
    for number, iommu, theirs, reach in (
        (11, "", "", 1.1),
        (12, "VT-d", "virtio-iommu", 1.0),
        (12, "virtio-iommu", "virtio-iommu", 1.3),
    ):
        for count, kind in zip(COUNTS, KINDS, strict=True):
            what = f"guest NVMe, {'behind ' + iommu if iommu else 'no IOMMU'}: {count:,} {kind}"
            yield Row(number, what, times["vmodel", iommu, kind] / times["QEMU", theirs, kind], reach, "of QEMU's")
    for count, kind in zip(COUNTS, KINDS, strict=True):
        what = f"guest NVMe with coverage: {count:,} {kind}"
        yield Row(19, what, times[COVERED, "", kind] / times["vmodel", "", kind], 1.1, "of the time without")


def table(measured: list[Measured]) -> Table:
    """The times themselves."""
    made = Table("controller", "IOMMU", "direct, one at a time", "time", "median", "99th", box=None)
    for m in measured:
        micro = (f"{value / 1e3:.0f} us" for value in (m.median, m.slow))
        made.add_row(m.whose, m.iommu or "none", m.kind, f"{m.total / 1e6:.0f} ms", *micro)
    return made
