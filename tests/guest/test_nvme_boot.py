"""SeaBIOS boots from an NVMe namespace: a master boot record, and a partition's program that reads, writes and resets.

The programs are in boot/: 16-bit code, which SeaBIOS's interrupt 13h serves by the controller.
"""

from __future__ import annotations

import random
import struct
import subprocess
from pathlib import Path

import pytest

from vmodel.guest.artifacts import find_qemu
from vmodel.machine import parse
from vmodel.patience import patience
from vmodel.qemu import memory_args
from vmodel.span import MiB

pytestmark = pytest.mark.guest
SOURCES = Path(__file__).parent / "boot"
BLOCK = 512
#: First block of the partition, and how many follow the one with the program.
FIRST, READ = 2048, 127
#: What the program gives to isa-debug-exit makes QEMU end so.
DONE = 2 * 3 + 1

MACHINE = """
[machine]
name = "boot"
memory = "256M"

[[device]]
name = "nvme0"
model = "nvme"
address = "0000:00:03.0"
bootindex = 2
params = { namespaces = [ { path = "other.img", size = "8M" } ] }

[[device]]
name = "nvme1"
model = "nvme"
address = "0000:00:04.0"
bootindex = 1
params = { namespaces = [ { path = "boot.img", size = "8M" } ] }
"""
IOMMU = '[[iommu]]\nname = "iommu0"\nkind = "{}"\naddress = "0000:00:02.0"\n'


def assembled(name: str, address: int, folder: Path) -> bytes:
    """A program that runs at that address."""
    layout = f"-Wl,--oformat=binary,--build-id=none,-e,_start,-Ttext={address:#x}"
    line = ["cc", "-m32", "-nostdlib", "-static", "-no-pie", layout, "-o", folder / name, SOURCES / f"{name}.S"]
    subprocess.run(line, check=True)
    return (folder / name).read_bytes()


def image(folder: Path) -> bytes:
    """The disk: boot record, partition table, program, and what it is to read."""
    record, program = assembled("mbr", 0x7C00, folder), assembled("partition", 0x8000, folder)
    assert len(record) <= 446 and len(program) == BLOCK
    data = random.Random(1).randbytes(READ * BLOCK)
    total = sum(struct.unpack(f"<{len(data) // 4}I", data)) & 0xFFFF_FFFF
    entry = struct.pack("<B3xB3xII", 0x80, 0x83, FIRST, 4096)  # active, of Linux's type
    disk = bytearray(8 * MiB)
    disk[: len(record)] = record
    disk[446:462] = entry
    disk[510:512] = b"\x55\xaa"
    at = FIRST * BLOCK
    disk[at : at + BLOCK + len(data)] = program[:506] + struct.pack("<I", total) + program[510:] + data
    return bytes(disk)


@pytest.mark.parametrize("kind", [None, "virtio-iommu", "vt-d", "without shared memory"])
def test_boot(kind: str | None, tmp_path: Path) -> None:
    """From the disk with the lower bootindex, twice: the machine resets itself in between."""
    (tmp_path / "boot.img").write_bytes(image(tmp_path))
    shared = kind != "without shared memory"
    machine = parse(MACHINE + (IOMMU.format(kind) if kind and shared else ""), tmp_path / "m.toml")
    try:
        with machine.serve(tmp_path):
            line = [str(find_qemu().path), "-accel", "tcg", "-nodefaults", "-no-user-config", "-display", "none"]
            args = machine.qemu_args(tmp_path)
            if not shared:
                args = ["-machine", "q35", "-m", "256M", *args[len(memory_args("256M")) :]]
            line += [*args, "-serial", "stdio", "-device", "isa-debug-exit"]
            done = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=patience(60))
    finally:
        machine.close()
    assert done.stdout == "read.\nboot 1\nread.\nboot 2\n", done
    assert (done.returncode, done.stderr) == (DONE, "")
    # What it wrote is in the image, and nothing else has changed.
    now, before = (tmp_path / "boot.img").read_bytes(), bytearray(image(tmp_path))
    before[(FIRST + 200) * BLOCK] = 2
    assert now == before
    assert not any((tmp_path / "other.img").read_bytes())
