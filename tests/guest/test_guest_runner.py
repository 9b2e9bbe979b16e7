"""The guest runner: what it says of a guest's end is what happened."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.guest.kernels import CHOSEN
from tests.waiting import until
from vmodel.guest import modules
from vmodel.guest.artifacts import Kernel, find_kernel
from vmodel.guest.running import (
    Guest,
    GuestOff,
    GuestPanic,
    GuestSpec,
    GuestTimeout,
    ModuleError,
    QemuDied,
    run_guest,
)
from vmodel.patience import patience

pytestmark = pytest.mark.guest


@pytest.mark.parametrize("kernel", CHOSEN)
def test_status_output_and_modules(kernel: str, tmp_path: Path) -> None:
    """One boot of each kernel: status, 8-bit output, loaded modules with dependencies, modprobe, files, artefacts."""
    tool = tmp_path / "tool"
    tool.write_text("#!/bin/sh\necho tool got $1\n")
    tool.chmod(0o755)
    data = tmp_path / "data"
    data.write_bytes(bytes(range(256)))
    script = """
        uname -r
        /root/tool 'a b'
        grep -c -e '^nvme ' -e '^nvme_core ' -e '^gpio_regmap ' /proc/modules
        grep -c '^e1000e ' /proc/modules
        modprobe e1000e && grep -c '^e1000e ' /proc/modules
        echo 'kernel talks' > /dev/kmsg
        cat /opt/data
        exit 7
    """
    result = run_guest(
        GuestSpec(
            command=script,
            kernel=find_kernel(kernel),
            modules=["nvme", "gpio-pci-idio-16"],
            extra_modules=["e1000e"],
            files=[tool, (data, "/opt/data")],
            append="loglevel=7",
        ),
        artifacts=tmp_path / "logs",
    )
    assert result.status == 7
    release, got, loaded, before, after, rest = result.output.split(b"\n", 5)
    assert release.decode() == find_kernel(kernel).release
    assert (got, loaded, before, after) == (b"tool got a b", b"3", b"0", b"1")
    assert rest == bytes(range(256))
    assert "kernel talks" in result.console
    assert result.powered_off
    assert result.boots == 1
    assert (tmp_path / "logs" / "output.log").read_bytes() == result.output
    assert "kernel talks" in (tmp_path / "logs" / "console.log").read_text()
    assert str(find_kernel(kernel).image) in (tmp_path / "logs" / "qemu.line").read_text()
    assert (tmp_path / "logs" / "qemu.log").read_text() == ""


@pytest.mark.parametrize(("command", "status"), [(["true"], 0), ("kill -9 $$", 137), (["sh", "-c", "exit 255"], 255)])
def test_status(command: list[str] | str, status: int) -> None:
    assert run_guest(GuestSpec(command=command)).status == status


def test_static_program(tmp_path: Path) -> None:
    """A C program built here; it dies of a signal, which the shell's status reports."""
    (tmp_path / "prog.c").write_text(
        '#include <stdio.h>\n#include <stdlib.h>\nint main(void) { puts("built here"); fflush(stdout); abort(); }\n'
    )
    subprocess.run(["gcc", "-static", "-O1", "-o", tmp_path / "prog", tmp_path / "prog.c"], check=True, timeout=60)
    result = run_guest(GuestSpec(command=["/root/prog"], files=[tmp_path / "prog"]))
    assert result.output.startswith(b"built here\n")
    assert result.status == 128 + signal.SIGABRT


@pytest.mark.parametrize("allow_reboot", [False, True])
def test_panic(allow_reboot: bool) -> None:
    """Also where a reboot is allowed: the guest would panic, reboot and panic until the time is over."""
    spec = GuestSpec(command="echo c > /proc/sysrq-trigger", timeout=60, allow_reboot=allow_reboot)
    start = time.monotonic()
    with pytest.raises(GuestPanic, match="sysrq triggered crash"):
        run_guest(spec)
    assert time.monotonic() - start < patience(50)


def test_timeout_ends_qemu_and_keeps_the_logs(tmp_path: Path) -> None:
    with Guest(GuestSpec(command="echo started; sleep 1000", timeout=15), artifacts=tmp_path / "logs") as guest:
        pid = guest.pid
        with pytest.raises(GuestTimeout, match=r"did not end in 15 s.*; logs are in .*logs"):
            guest.wait()
        assert not guest.running()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert (tmp_path / "logs" / "output.log").read_bytes() == b"started\n"


def test_talking_reboot_and_qmp() -> None:
    """stdin, expect, console streaming, a warm reboot, QMP: with one interactive guest."""
    streamed = bytearray()
    came = threading.Event()

    def on_console(data: bytes) -> None:  # in pieces as small as a byte
        streamed.extend(data)
        if b"console line" in streamed:
            came.set()

    script = """
        echo boot $VMODEL_BOOT
        echo '<1>console line' > /dev/kmsg
        while read what; do
            case $what in reboot) reboot -f; sleep 100;; end) exit 3;; *) echo "got $what";; esac
        done
    """
    spec = GuestSpec(command=script, allow_reboot=True)
    with Guest(spec, on_console=on_console) as guest:
        guest.expect(rb"boot 1\n")
        assert came.wait(5)
        guest.expect(rb"console line", 5, port="console")
        guest.send(b"x\n")
        guest.expect(rb"got x\n", 10)
        guest.send(b"x\n")
        guest.expect(rb"got x\n", 10)  # the second one: the first is consumed
        with pytest.raises(GuestTimeout):
            guest.expect(rb"got x\n", 0.5)
        with socket.socket(socket.AF_UNIX) as qmp:
            qmp.settimeout(10)
            qmp.connect(str(guest.qmp))
            with qmp.makefile() as lines:
                greeting = json.loads(lines.readline())
        assert greeting["QMP"]["version"]["qemu"]["major"] >= 10
        guest.send(b"reboot\n")
        guest.expect(rb"boot 2\n")
        guest.send(b"end\n")
        result = guest.wait()
    assert (result.status, result.boots) == (3, 2)


def test_reboot_is_an_end_unless_allowed() -> None:
    with pytest.raises(GuestOff, match="powered off or rebooted before the command ended"):
        run_guest(GuestSpec(command="reboot -f; sleep 100"))


def test_qemu_killed() -> None:
    with Guest(GuestSpec(command="echo up; sleep 1000")) as guest:
        guest.expect(rb"up\n")
        os.kill(guest.pid, signal.SIGKILL)
        with pytest.raises(QemuDied, match="by signal 9"):
            guest.expect(rb"never")
        with pytest.raises(QemuDied):
            guest.wait()


KILLED = """
from vmodel.guest.running import Guest, GuestSpec
with Guest(GuestSpec(command="sleep 1000")) as guest:
    guest.monitor.execute("query-status")  # it has carried out its arguments
    print(guest.pid, flush=True)
    guest.wait()
"""


def test_qemu_ends_when_vmodel_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        qemu = Path(f"/proc/{int(run.stdout.readline())}")
        run.kill()
    # What nobody waits for in a container stays as a zombie, which has no command line.
    until(lambda: not qemu.exists() or not (qemu / "cmdline").read_bytes(), "the end of QEMU", 10)


def test_qemu_refuses_its_arguments() -> None:
    with pytest.raises(QemuDied, match="no-such-device"):
        run_guest(GuestSpec(command=["true"], qemu_args=["-device", "no-such-device"]))


def test_module_that_does_not_load(tmp_path: Path) -> None:
    """A module of another kernel: the run ends at once and says which."""
    kernel = find_kernel()
    assert kernel.modules is not None
    elf = modules.load_module(next(kernel.modules.rglob("dummy.ko*")))
    folder = tmp_path / "lib" / "modules" / kernel.release
    folder.mkdir(parents=True)
    (folder / "dummy.ko").write_bytes(elf.replace(b"vermagic=", b"vermagic=0"))
    with pytest.raises(ModuleError, match="dummy"):
        run_guest(GuestSpec(command=["true"], kernel=Kernel(kernel.release, kernel.image, folder), modules=["dummy"]))


def test_an_error_in_a_callback_is_raised() -> None:
    def callback(data: bytes) -> None:
        raise ZeroDivisionError("in a callback")

    with pytest.raises(ZeroDivisionError, match="in a callback"):
        run_guest(GuestSpec(command="echo x; sleep 1000"), on_output=callback)


BROKEN = """
from vmodel.device import PciDevice

class Card(PciDevice):
    vendor_id, device_id, class_code = 0x1234, 0x5678, 0x058000

    def on_reset(self, kind):
        raise ValueError("broken")
"""


@pytest.mark.parametrize(("command", "status"), [("true", 70), ("exit 3", 3)])
def test_a_model_that_fails_has_a_status_of_its_own(tmp_path: Path, command: str, status: int) -> None:
    """However well the guest takes it; the user's own line is at the end.  A command that failed keeps its status."""
    (tmp_path / "card.py").write_text(BROKEN)
    (tmp_path / "m.toml").write_text(
        '[machine]\nname = "m"\n[[device]]\nname = "c0"\nmodel = "card.py:Card"\naddress = "0000:00:03.0"\n'
    )
    line = [sys.executable, "-m", "vmodel", "guest", f"{tmp_path}/m.toml", "--run-dir", f"{tmp_path}/run"]
    done = subprocess.run(
        [*line, "--", "sh", "-c", command], capture_output=True, text=True, timeout=patience(120), check=False
    )
    assert done.returncode == status, done.stderr
    assert "vmodel: model error: c0: on_reset: ValueError: broken (card.py line 8)\n" in done.stderr
