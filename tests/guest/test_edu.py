"""The edu device in real guests: every way in which memory and writes reach it, and every way it can end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.guest.conftest import Boot
from vmodel.devices.edu import Edu
from vmodel.patience import patience

pytestmark = pytest.mark.guest
CHECK = "examples/edu_check.c"
Compiled = Callable[[str], Path]


@pytest.mark.parametrize("mode", ["fds", "no fds", "no posted writes"])
def test_edu_check(boot: Boot, compiled: Compiled, kernel: str, mode: str) -> None:
    edu = Edu("edu0")
    properties = {"x-no-posted-writes": True} if mode == "no posted writes" else {}
    guest = boot(
        edu,
        "./edu_check",
        kernel=kernel,
        fds=mode != "no fds",
        modules=["uio_pci_generic"],
        files=[compiled(CHECK)],
        **properties,
    )
    with guest:
        result = guest.wait()
    assert result.status == 0, result.output
    assert b"equal" in result.output
    assert (edu.dma.stats.read_bytes, edu.dma.stats.write_bytes) == (4096, 4096)
    assert edu.backend.irqs.raised == 3
    assert edu.errors == 0
    deadline = time.monotonic() + patience(5)
    while len(edu.memory) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(edu.memory) == 0  # the client has gone, and its windows with it


def test_warm_reboot(boot: Boot, compiled: Compiled, kernel: str) -> None:
    edu = Edu("edu0")
    script = "echo booted; read what; [ $what = go ] || reboot -f; ./edu_check"
    guest = boot(edu, script, kernel=kernel, modules=["uio_pci_generic"], files=[compiled(CHECK)], reboot=True)
    with guest:
        guest.expect(rb"booted")
        guest.send(b"again\n")
        guest.expect(rb"booted")
        guest.send(b"go\n")
        result = guest.wait()
    assert result.status == 0, result.output
    assert edu.backend.irqs.raised == 3


def test_poweroff_leaves_the_server_ready(boot: Boot, tmp_path: Path) -> None:
    edu = Edu("edu0")
    with boot(edu, "cat /sys/bus/pci/devices/0000:00:03.0/vendor") as guest:
        assert guest.wait().output == b"0x1234\n"
    # The same server takes the next guest.
    with boot(tmp_path / "device.sock", "cat /sys/bus/pci/devices/0000:00:03.0/device") as guest:
        assert guest.wait().output == b"0x11e8\n"


@contextmanager
def served(machine: Path, run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """`vmodel serve` as a process of its own."""
    line = [sys.executable, "-m", "vmodel", "serve", str(machine), "--run-dir", str(run_dir)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("edu0 ")
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


def test_the_server_is_killed(boot: Boot, compiled: Compiled, tmp_path: Path) -> None:
    machine = Path(__file__).parents[2] / "examples" / "edu.toml"
    socket = tmp_path / "edu0.sock"
    script = (
        "echo up; read x; hexdump -n 4 -e '1/4 \"%08x\"' /sys/bus/pci/devices/0000:00:03.0/config; echo; echo alive"
    )
    with served(machine, tmp_path) as server, boot(socket, script) as guest:
        guest.expect(rb"up")
        os.kill(server.pid, signal.SIGKILL)
        server.wait()
        guest.send(b"\n")
        result = guest.wait()
        assert result.status == 0
        assert b"alive" in result.output  # the guest lives on, only the device is gone
    assert socket.exists()  # nobody cleaned up
    with served(machine, tmp_path) as server:
        with boot(socket, "./edu_check", modules=["uio_pci_generic"], files=[compiled(CHECK)]) as guest:
            assert guest.wait().status == 0
        os.kill(server.pid, signal.SIGTERM)
        assert server.wait(10) == 0
    assert not socket.exists()
