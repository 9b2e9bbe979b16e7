"""What was written and flushed is in the file, however the server ends."""

from __future__ import annotations

import contextlib
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmodel.devices.nvme.command import NvmeCommand
from vmodel.patience import patience
from vmodel.testing.nvme import FLUSH, READ, WRITE, NvmeDriver, prps

pytestmark = pytest.mark.slow

ROUNDS = 15
BLOCKS = 64  # of 4096 bytes
MACHINE = """
[machine]
name = "durable"

[[device]]
name = "nvme0"
model = "nvme"
address = "0000:00:04.0"
params = {{ queues = 2, namespaces = [ {{ path = "disk.img", size = "{size}", lba = 4096 }} ] }}
"""


@contextlib.contextmanager
def server(folder: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A server in a process of its own; the controller's socket."""
    machine = folder / "machine.toml"
    machine.write_text(MACHINE.format(size=f"{BLOCKS * 4}K"))
    command = [sys.executable, "-m", "vmodel", "serve", str(machine), "--run-dir", str(folder / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        lines = list(iter(process.stdout.readline, "ready\n"))
        yield process, Path(lines[0].split()[1])
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def block(lba: int, version: int) -> bytes:
    """A block that tells which version it is, whole."""
    return struct.pack("<QQ", lba, version) * 256


def version_of(lba: int, data: bytes) -> int:
    """The version of a block; -1 when it is not whole."""
    _, version = struct.unpack_from("<QQ", data)
    return version if data in (block(lba, version), bytes(4096)) else -1


@pytest.mark.parametrize("forced", [False, True], ids=["flush", "fua"])
def test_flushed_blocks_survive_a_kill(tmp_path: Path, forced: bool) -> None:
    chance = random.Random(int(forced))
    flushed, written = [0] * BLOCKS, [0] * BLOCKS
    version = killed_within = 0
    for _ in range(ROUNDS):
        with server(tmp_path) as (process, path):
            driver = NvmeDriver.connect(path)
            pair = driver.create(1, 64)
            data = driver.take(BLOCKS * 4096)
            check(driver, data, flushed, written)
            # It is killed by and by, from a process that does not wait for it.
            delay = chance.uniform(0.005, 0.06)
            killer = subprocess.Popen(["sh", "-c", f"sleep {delay:.3f}; kill -9 {process.pid}"])
            try:
                while True:
                    chosen = chance.sample(range(BLOCKS), 8)
                    for lba in chosen:
                        version += 1
                        at = data + lba * 4096
                        driver.ram.view[at : at + 4096] = block(lba, version)
                        written[lba] = version
                        command = NvmeCommand.make(WRITE, nsid=1, cdw10=lba, cdw12=forced << 30, dptr=prps(at))
                        driver.send(pair, command)
                        if forced:
                            flushed[lba] = version
                    if not forced:
                        driver.send(pair, NvmeCommand.make(FLUSH, nsid=1))
                        for lba in chosen:
                            flushed[lba] = written[lba]
            except OSError:
                killed_within += 1
            finally:
                with contextlib.suppress(OSError):
                    driver.close()
                killer.wait()
            assert process.wait() == -signal.SIGKILL
        image = (tmp_path / "disk.img").read_bytes()
        for lba in range(BLOCKS):
            found = version_of(lba, image[lba * 4096 :][:4096])
            assert flushed[lba] <= found <= written[lba], f"block {lba}"
    assert killed_within == ROUNDS
    assert version >= 8  # at least one burst, however slow the machine is


def check(driver: NvmeDriver, data: int, flushed: list[int], written: list[int]) -> None:
    """Reads all blocks by the device."""
    pair = driver.create(2, 64)
    for lba in range(BLOCKS):
        driver.send(pair, NvmeCommand.make(READ, nsid=1, cdw10=lba, dptr=prps(data)))
        found = version_of(lba, bytes(driver.ram.view[data : data + 4096]))
        assert flushed[lba] <= found <= written[lba], f"block {lba}"


def test_two_servers_of_one_image(tmp_path: Path) -> None:
    with server(tmp_path):
        command = [sys.executable, "-m", "vmodel", "serve", str(tmp_path / "machine.toml"), "--run-dir"]
        done = subprocess.run(
            [*command, str(tmp_path / "other")], capture_output=True, text=True, timeout=patience(60), check=False
        )
        assert done.returncode == 2 and not done.stdout
        (line,) = done.stderr.splitlines()
        assert "disk.img is in use by another server" in line
    # A server that was killed holds nothing.
    start = time.monotonic()
    with server(tmp_path) as (_, path), NvmeDriver.connect(path):
        assert time.monotonic() - start < patience(60)
